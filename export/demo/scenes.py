"""Captioned clips drawn from numbers: signed distances, analytic anti-aliasing, any resolution, on any device.

The frame spans x from -1.8 to 1.8 (right) and y from -1 to 1 (down), the 16:9 of the finished video; the 64 x 40 and
256 x 160 pixels of the stages before it are a little wider than high. Time u runs from 0 to 1 over 29 frames.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from random import Random

import torch
from torch import Tensor

from export.demo.captions import BACKGROUNDS, COLOURS, PATTERNS, Scene, Thing

FRAMES = 29
HALF_WIDTH, HALF_HEIGHT = 1.8, 1.0
MOST_THINGS = 2

_RADIUS = {"small": 0.22, "medium": 0.32, "large": 0.45}
_RESIZED = {"grow": (0.2, 0.48), "shrink": (0.48, 0.2)}
_CORNERS = {"square": 4, "triangle": 3, "star": 5}
# Outer radius over nominal: shapes of one size look alike large.
_REACH = {"circle": 1.0, "square": 1.25, "triangle": 1.35, "star": 1.35, "ring": 1.1}
_INNER = {"star": 0.45, "ring": 0.58}
_GRAIN, _HATCH, _PATTERN = 0.08, 0.07, 0.3  # periods: the first two are finer than a pixel of a key frame
_DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


# Of each clip: left and top [B, 1], in pixels of the frame; (width, height).
Window = tuple[Tensor, Tensor, tuple[int, int]]


@dataclass(frozen=True)
class Clips:
    """Numbers that a batch of clips is drawn from, float32, [B, 2 things] or [B]; axis 1 ends in x, y or RGB."""

    corners: Tensor  # [B, 2]; 0 for round things
    inner: Tensor  # [B, 2] inner over outer radius: of a star's notches, of a ring's hole
    colour: Tensor  # [B, 2, 3] in [0, 1]
    radius: Tensor  # [B, 2, 2] outer, at the start and at the end; 0 for no thing
    start: Tensor  # [B, 2, 2]
    end: Tensor  # [B, 2, 2]
    swing: Tensor  # [B, 2, 2] amplitude of bouncing
    phase: Tensor  # [B, 2]
    angle: Tensor  # [B, 2, 2] at the start and at the end, clockwise
    background: Tensor  # [B, 3]
    pattern: Tensor  # [B] index into PATTERNS
    slant: Tensor  # [B] direction of stripes and grain

    def __getitem__(self, index: Tensor | slice) -> "Clips":
        return Clips(*(getattr(self, field.name)[index] for field in fields(self)))

    def to(self, device: str) -> "Clips":
        return Clips(*(getattr(self, field.name).to(device) for field in fields(self)))


def lay_out(scenes: Sequence[Scene], seed: int) -> Clips:
    """Draw what captions leave open: places, exact sizes and hues, phases. Things stay in the frame and apart."""
    random = Random(seed)
    rows = [_numbers(scene, random) for scene in scenes]
    return Clips(*(torch.tensor(column, dtype=torch.float32) for column in zip(*rows, strict=True)))


def _numbers(scene: Scene, random: Random) -> tuple:
    """One clip's entries of `Clips`, in their order."""
    halves = [(-HALF_WIDTH, 0.0), (0.0, HALF_WIDTH)]
    random.shuffle(halves)
    sides = halves if len(scene.things) > 1 else [(-HALF_WIDTH, HALF_WIDTH)]
    things = [_thing(thing, side, random) for thing, side in zip(scene.things, sides, strict=True)]
    things += [_NO_THING] * (MOST_THINGS - len(things))
    background = [c + random.uniform(-0.03, 0.03) for c in BACKGROUNDS[scene.background]]
    return *zip(*things, strict=True), background, PATTERNS.index(scene.pattern), random.uniform(0.2, 1.4)


def _thing(thing: Thing, side: tuple[float, float], random: Random) -> tuple:
    """A thing's entries of `Clips`, in their order; it stays between the two x of `side`."""
    scale = _REACH[thing.shape] * random.uniform(0.92, 1.08)
    first, last = (scale * r for r in _RESIZED.get(thing.motion, (_RADIUS[thing.size],) * 2))
    margin = max(first, last) + 0.06
    limits = (side[0] + margin, side[1] - margin), (-HALF_HEIGHT + margin, HALF_HEIGHT - margin)
    bouncing = {"bounce horizontal": 0, "bounce vertical": 1}.get(thing.motion)
    start, end, swing = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
    for axis, (low, high) in enumerate(limits):
        sign = sum(_DIRECTIONS.get(word, (0, 0))[axis] for word in thing.motion.split())
        if sign:  # from near one edge to near the other
            fifth = (high - low) / 5
            ends = random.uniform(low, low + fifth), random.uniform(high - fifth, high)
            start[axis], end[axis] = ends if sign > 0 else ends[::-1]
        else:
            if axis == bouncing:
                swing[axis] = min((high - low) / 2, random.uniform(0.45, 0.7))
            start[axis] = end[axis] = random.uniform(low + swing[axis], high - swing[axis])
    corners = _CORNERS.get(thing.shape, 0)
    # Straight edges reach inwards as far as the middle between two corners.
    inner = _INNER.get(thing.shape, math.cos(math.pi / corners) if corners else 0.0)
    colour = [c + random.uniform(-0.04, 0.04) for c in COLOURS[thing.colour]]
    tilt = random.uniform(-0.12, 0.12) + (math.pi / 4 if thing.shape == "square" else 0)  # a square stands on an edge
    turn = random.uniform(0.6, 0.95) * math.pi * {"clockwise": 1, "counterclockwise": -1}.get(thing.motion, 0)
    phase = random.uniform(0, 2 * math.pi)
    return corners, inner, colour, (first, last), start, end, swing, phase, (tilt, tilt + turn)


_NO_THING = 0, 0.0, (0.0,) * 3, (0.0,) * 2, (0.0,) * 2, (0.0,) * 2, (0.0,) * 2, 0.0, (0.0,) * 2


def centres(clips: Clips, frames: Tensor) -> Tensor:
    """Where things are at `frames` [B, F]: [B, 2 things, 2 axes, F], x from -1.8 to 1.8 and y from -1 to 1."""
    u = frames[:, None, None] / (FRAMES - 1)
    wave = torch.sin(3 * math.pi * u + clips.phase[..., None, None])  # one and a half periods
    start, end, swing = (values[..., None] for values in (clips.start, clips.end, clips.swing))
    return start + (end - start) * u + swing * wave


def render(clips: Clips, frames: Tensor, size: tuple[int, int], window: Window | None = None) -> Tensor:
    """Draw each clip at `frames` [B, F], numbers from 0 to 28: [B, 3, F, H, W] in [-1, 1].

    `size` is (width, height) of the whole frame; `window` the part of it to draw.
    """
    width, height = size
    pixel = math.sqrt(2 * HALF_WIDTH / width * 2 * HALF_HEIGHT / height)
    left, top, (columns, rows) = window or (torch.zeros_like(frames[:, :1]),) * 2 + (size,)
    x = left + torch.arange(columns, device=frames.device)  # [B, W]
    y = top + torch.arange(rows, device=frames.device)
    x = (((x + 0.5) * (2 / width) - 1) * HALF_WIDTH)[:, None, :]
    y = (((y + 0.5) * (2 / height) - 1) * HALF_HEIGHT)[:, :, None]
    u = frames / (FRAMES - 1)

    image = _background(clips, x, y, pixel)[:, :, None]  # [B, 3, 1, H, W]
    image = image.expand(-1, -1, frames.shape[1], -1, -1)
    centre = centres(clips, frames)[..., None, None]  # [B, 2 things, 2 axes, F, 1, 1]
    for i in reversed(range(MOST_THINGS)):

        def at(values: Tensor, i: int = i) -> Tensor:  # [B, 2, 2]: from start to end, [B, F, 1, 1]
            return (values[:, i, :1] + (values[:, i, 1:] - values[:, i, :1]) * u)[..., None, None]

        dx, dy = x[:, None] - centre[:, i, 0], y[:, None] - centre[:, i, 1]  # [B, F, H, W] where they meet
        radius, angle = at(clips.radius), at(clips.angle)
        corners, inner = clips.corners[:, i, None, None, None], clips.inner[:, i, None, None, None]
        distance = _distance(dx, dy, radius, angle, corners, inner)
        cover = (0.5 - distance / pixel).clamp(0, 1) * (radius > 0)
        # Lit from the upper left; fine lines turn with the thing, so that they tell how it moves.
        across = dx * torch.cos(angle) + dy * torch.sin(angle)
        light = -0.1 * (dx + dy) / radius.clamp(min=0.05) + 0.09 * _wave(across, _HATCH, pixel)
        colour = clips.colour[:, i, :, None, None, None] + light[:, None]
        image = image + (colour - image) * cover[:, None]
    return image.clamp(0, 1) * 2 - 1


def _background(clips: Clips, x: Tensor, y: Tensor, pixel: float) -> Tensor:
    """A colour, the pattern, and a grain that only large pictures show: [B, 3, H, W] in [0, 1].

    At x [B, 1, W] and y [B, H, 1].
    """
    slant, pattern = clips.slant[:, None, None], clips.pattern[:, None, None]
    along, across = x * torch.cos(slant) + y * torch.sin(slant), y * torch.cos(slant) - x * torch.sin(slant)
    stripes = _wave(along, _PATTERN, pixel)
    dots = _wave(x, _PATTERN, pixel) * _wave(y, _PATTERN, pixel)
    relief = torch.where(pattern == 1, stripes, torch.where(pattern == 2, dots, torch.zeros_like(stripes)))
    grain = _wave(along, _GRAIN, pixel) * _wave(across, _GRAIN, pixel)
    return clips.background[..., None, None] + (0.07 * relief + 0.05 * grain)[:, None]


def _wave(position: Tensor, period: float, pixel: float) -> Tensor:
    """A sine averaged over a pixel: what is finer than pixels fades instead of aliasing."""
    share = pixel / period
    fade = math.sin(math.pi * share) / (math.pi * share) if share < 1 else 0.0
    return fade * torch.sin(position * (2 * math.pi / period))


def _distance(dx: Tensor, dy: Tensor, radius: Tensor, angle: Tensor, corners: Tensor, inner: Tensor) -> Tensor:
    """Signed distance to the outline, negative inside; near the outline only, which is where pixels are mixed.

    Shapes with corners are folded into one half of one corner's sector, where the outline is a straight line from the
    outer corner to the middle of the sector's edge or, in a star, to the notch.
    """
    length = torch.sqrt(dx * dx + dy * dy + 1e-12)
    disc = length - radius
    ring = torch.where(inner > 0, torch.maximum(disc, inner * radius - length), disc)
    sector = 2 * math.pi / corners.clamp(min=3)
    turned = torch.atan2(dx, -dy) - angle  # clockwise from straight up
    fold = (torch.remainder(turned + sector / 2, sector) - sector / 2).abs()
    px, py = length * torch.cos(fold), length * torch.sin(fold)
    notch = inner * radius
    ex, ey = notch * torch.cos(sector / 2) - radius, notch * torch.sin(sector / 2)
    outline = ((px - radius) * ey - py * ex) / torch.sqrt(ex * ex + ey * ey + 1e-12)
    return torch.where(corners > 0, outline, ring)
