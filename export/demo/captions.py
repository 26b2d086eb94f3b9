"""What the demo's clips show and how captions say it: one or two things, each with one motion, over a background.

Some combinations of shape, colour and motion are held out of training (`held_out`); `bench quality` asks for those.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

Rgb = tuple[float, float, float]

SHAPES = ("circle", "square", "triangle", "star", "ring")
COLOURS: dict[str, Rgb] = {
    "red": (0.86, 0.12, 0.12),
    "orange": (0.96, 0.52, 0.08),
    "yellow": (0.96, 0.88, 0.16),
    "green": (0.14, 0.62, 0.22),
    "blue": (0.12, 0.28, 0.85),
    "purple": (0.48, 0.16, 0.62),
    "pink": (0.98, 0.58, 0.76),
    "white": (0.94, 0.94, 0.94),
}
BACKGROUNDS: dict[str, Rgb] = {
    "black": (0.06, 0.06, 0.06),
    "gray": (0.48, 0.48, 0.48),
    **{name: COLOURS[name] for name in ("white", "blue", "green", "yellow")},
}
PATTERNS = ("plain", "striped", "dotted")
SIZES = ("small", "medium", "large")  # medium goes without saying

# motion -> how captions call it
MOTIONS: dict[str, tuple[str, ...]] = {
    "left": ("moving left", "sliding to the left", "drifting left"),
    "right": ("moving right", "sliding to the right", "drifting right"),
    "up": ("moving up", "rising", "drifting upwards"),
    "down": ("moving down", "falling", "drifting downwards"),
    "up left": ("moving up and left", "drifting diagonally up and left"),
    "up right": ("moving up and right", "drifting diagonally up and right"),
    "down left": ("moving down and left", "drifting diagonally down and left"),
    "down right": ("moving down and right", "drifting diagonally down and right"),
    "bounce vertical": ("bouncing up and down", "jumping up and down"),
    "bounce horizontal": ("bouncing from side to side", "bouncing left and right"),
    "grow": ("growing", "getting bigger"),
    "shrink": ("shrinking", "getting smaller"),
    "clockwise": ("turning clockwise", "spinning clockwise"),
    "counterclockwise": ("turning counterclockwise", "spinning counterclockwise"),
    "still": ("standing still", "at rest"),
}
TWO_THINGS = 0.5  # share of training's scenes: which word belongs to which thing is the hardest to learn
TURNS = ("clockwise", "counterclockwise")  # not seen on what is round
ROUND = ("circle", "ring")
RESIZES = ("grow", "shrink")  # the size is then a part of the motion

_SIZE_WORDS = {"small": ("small", "little", "tiny"), "medium": ("",), "large": ("large", "big", "huge")}
_SCENES = (
    "{things} over a {background} background",
    "{things} on a {background} background",
    "{things} in front of a {background} background",
    "a video of {things} over a {background} background",
    "over a {background} background, {things}",
    "{background} background with {things}",
)


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    size: str
    motion: str


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str
    pattern: str

    def caption(self, random: np.random.Generator) -> str:
        """One of the ways to say it."""

        def one_of(choices: tuple[str, ...]) -> str:
            return choices[random.integers(len(choices))]

        things = " and ".join(
            " ".join(f"a {one_of(_SIZE_WORDS[t.size])} {t.colour} {t.shape} {one_of(MOTIONS[t.motion])}".split())
            for t in self.things
        ).replace("a orange", "an orange")
        pattern = one_of(("plain", "")) if self.pattern == "plain" else self.pattern
        return one_of(_SCENES).format(things=things, background=f"{pattern} {self.background}".strip())


def held_out(thing: Thing) -> bool:
    """Whether training never shows this shape with this colour and motion; about one combination in seven."""
    shape, colour, motion = SHAPES.index(thing.shape), [*COLOURS].index(thing.colour), [*MOTIONS].index(thing.motion)
    return (shape + 2 * colour + 3 * motion) % 7 == 0


def sample_scene(random: np.random.Generator, things: int, held: bool = False) -> Scene:
    """A random scene whose things are all held out of training (`held`), or all not; no colour comes twice."""
    background = [*BACKGROUNDS][random.integers(len(BACKGROUNDS))]
    free = [colour for colour in COLOURS if colour != background]
    found: list[Thing] = []
    while len(found) < things:
        motion = [*MOTIONS][random.integers(len(MOTIONS))]
        size = SIZES[random.integers(len(SIZES) if things == 1 else 2)]
        thing = Thing(
            SHAPES[random.integers(len(SHAPES))],
            free[random.integers(len(free))],
            "medium" if motion in RESIZES else size,
            motion,
        )
        invisible = thing.motion in TURNS and thing.shape in ROUND
        taken = thing.colour in [other.colour for other in found]
        if not invisible and not taken and held_out(thing) == held:
            found.append(thing)
    return Scene(tuple(found), background, PATTERNS[random.integers(len(PATTERNS))])


def training_scenes(count: int, seed: int) -> Iterator[tuple[Scene, str]]:
    """Scenes and captions, half of them with two things."""
    random = np.random.default_rng([seed, 1])
    for _ in range(count):
        scene = sample_scene(random, 2 if random.random() < TWO_THINGS else 1)
        yield scene, scene.caption(random)


def evaluation_scenes(count: int, seed: int) -> Iterator[tuple[Scene, str]]:
    """Held-out scenes and captions; every fourth has two things, so that any first part of the list is alike."""
    random = np.random.default_rng([seed, 2])
    for index in range(count):
        scene = sample_scene(random, 2 if index % 4 == 3 else 1, held=True)
        yield scene, scene.caption(random)


def words() -> list[str]:
    """Every word of every caption."""
    texts = [*SHAPES, *COLOURS, *BACKGROUNDS, *PATTERNS, *_SCENES, "an", "and"]
    texts += [phrase for phrases in (*MOTIONS.values(), *_SIZE_WORDS.values()) for phrase in phrases]
    found = {word.strip(",") for text in texts for word in text.split() if "{" not in word}
    return sorted(found)
