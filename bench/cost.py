"""What presets cost: FLOP of a video by the published networks, counted from steps, guidance and reuse (`work`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.plots import Bars
from bench.report import Table, number
from bench.work import STAGES, published_flop, step_counts
from runtime.config import ALL_STEPS, DIFFUSION_STAGES, Settings

_PETA = 1e15


@dataclass(frozen=True)
class Cost:
    """The work of a video with `settings`, by stage; of `counted` stages alone where not all are run."""

    settings: Settings
    counted: Sequence[str] = STAGES

    @property
    def stages(self) -> dict[str, int]:
        flop = published_flop(self.settings)
        return {stage: flop[stage] for stage in self.counted}

    @property
    def total(self) -> int:
        return sum(self.stages.values())

    @property
    def pflop(self) -> float:
        return self.total / _PETA


def describe_stage(settings: Settings, name: str) -> str:
    """Steps that run, how they are spaced where that is not the scheduler's, which are guided and whole if not all."""
    stage = getattr(settings, name)
    words = [str(step_counts(settings)[name])]
    if stage.spacing:
        words.append(stage.spacing)
    if stage.guidance_scale <= 1:
        words.append("unguided")
    elif stage.guided != ALL_STEPS:
        words.append("guided {:g}-{:g}".format(*stage.guided))
    if stage.cache_interval > 1:
        words.append(f"whole every {stage.cache_interval}")
    return ", ".join(words)


def work_table(costs: Mapping[str, Cost]) -> Table:
    """PFLOP by preset and stage; others are compared with the first preset."""
    reference = next(iter(costs.values())).total
    rows = []
    for preset, cost in costs.items():
        stages = [number(flop / _PETA) for flop in cost.stages.values()]
        rows.append([preset, *stages, number(cost.pflop), number(reference / cost.total)])
    return Table("PFLOP of a video at published sizes", ["preset", *STAGES, "all", "times cheaper"], rows)


def steps_table(settings: Mapping[str, Settings], stages: Sequence[str] = DIFFUSION_STAGES) -> Table:
    rows = [[preset, *(describe_stage(chosen, stage) for stage in stages)] for preset, chosen in settings.items()]
    return Table("Steps", ["preset", *stages], rows)


def plot(costs: Mapping[str, Cost]) -> Bars:
    series = {preset: [flop / _PETA for flop in cost.stages.values()] for preset, cost in costs.items()}
    return Bars("Work of a video at published sizes, by stage", "PFLOP", STAGES, series)


def to_json(costs: Mapping[str, Cost]) -> dict[str, Any]:
    return {
        "presets": {
            preset: {"flop": cost.total, "stages": cost.stages, "settings": cost.settings.to_dict()}
            for preset, cost in costs.items()
        }
    }
