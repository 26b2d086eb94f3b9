"""Faithfulness: the share of right answers to questions about a video's pixels, of prompts that training never shows.

Asked are colour, shape and motion of every thing that the prompt names, and the background.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from engines.errors import SettingsError
from export.demo.captions import Scene, Thing, evaluation_scenes, training_scenes
from export.demo.judge import Reading, answers
from runtime.config import SEED

PROMPTS_FILE = Path(__file__).parent / "quality_prompts.json"
ASKED = ("colour", "shape", "direction", "background")  # what faithfulness is made of; "direction" names the motion
KEYS = (*ASKED, "motion", "count")  # what is counted


@dataclass(frozen=True)
class Prompt:
    prompt: str
    seed: int
    scene: Scene


def make_prompts(count: int = 48, seed: int = SEED) -> str:
    """The text of quality_prompts.json. It was committed before training and is not to be made anew."""
    rows = [
        {"prompt": caption, "seed": seed + index, "scene": asdict(scene)}
        for index, (scene, caption) in enumerate(evaluation_scenes(count, seed))
    ]
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def load_prompts(count: int | None = None) -> list[Prompt]:
    """The first `count` of the list, or all. Raises SettingsError for a count out of range."""
    rows = json.loads(PROMPTS_FILE.read_text(encoding="utf-8"))
    if count is not None and not 2 <= count <= len(rows):
        raise SettingsError(f"--prompts {count}; allowed: 2 to {len(rows)} (the control needs two).")
    prompts = []
    for row in rows[:count]:
        scene = row["scene"]
        things = tuple(Thing(**thing) for thing in scene["things"])
        prompts.append(Prompt(row["prompt"], row["seed"], Scene(things, scene["background"], scene["pattern"])))
    return prompts


def training_prompts(count: int | None = None) -> list[Prompt]:
    """`count` prompts, 48 by default, of combinations that training shows; half of them have two things.

    To choose weights and settings by: what was chosen by the held-out list, that list cannot judge. Raises
    SettingsError for a count out of range.
    """
    count = 48 if count is None else count
    if count < 2:
        raise SettingsError(f"--prompts {count}; allowed: 2 or more (the control needs two).")
    scenes = enumerate(training_scenes(count, SEED))
    return [Prompt(caption, SEED + index, scene) for index, (scene, caption) in scenes]


@dataclass(frozen=True)
class Faithfulness:
    """Right answers and questions, of each attribute and as a whole; `scores` has one share for each video.

    `things` is how many each video was asked for, `of_things` counts the videos of so many apart.
    """

    of_things: dict[int, dict[str, tuple[int, int]]]  # number of things -> attribute -> right, asked
    scores: list[float]
    things: list[int]
    chance: dict[str, float]  # share of right answers to other prompts' questions

    @property
    def right(self) -> dict[str, int]:
        return {key: sum(counts[key][0] for counts in self.of_things.values()) for key in KEYS}

    @property
    def asked(self) -> dict[str, int]:
        return {key: sum(counts[key][1] for counts in self.of_things.values()) for key in KEYS}

    @property
    def score(self) -> float:
        return float(np.mean(self.scores))

    @property
    def chance_score(self) -> float:
        return self.chance["faithfulness"]


def faithfulness(scenes: Sequence[Scene], readings: Sequence[Reading]) -> Faithfulness:
    own = [answers(scene, reading) for scene, reading in zip(scenes, readings, strict=True)]
    others = [answers(scene, reading) for i, reading in enumerate(readings) for j, scene in enumerate(scenes) if i != j]
    things = [len(scene.things) for scene in scenes]
    of_things = {
        count: _counts([a for a, there in zip(own, things, strict=True) if there == count])
        for count in sorted(set(things))
    }
    chance = {key: float(np.mean([x for a in others for x in a[key]])) for key in KEYS}
    chance["faithfulness"] = float(np.mean([score(a) for a in others]))
    return Faithfulness(of_things, [score(a) for a in own], things, chance)


def _counts(answered: Sequence[dict[str, list[bool]]]) -> dict[str, tuple[int, int]]:
    """Of each attribute how many answers are right, and how many there are."""
    return {key: (sum(sum(a[key]) for a in answered), sum(len(a[key]) for a in answered)) for key in KEYS}


def score(answered: dict[str, list[bool]]) -> float:
    """Share of right answers (`judge.answers`) of those asked."""
    return float(np.mean([x for key in ASKED for x in answered[key]]))
