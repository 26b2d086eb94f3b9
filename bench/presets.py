"""Presets side by side on one bundle: what they cost, how long they take, and what becomes of the videos.

Faithfulness is that of `export.demo.faithfulness`; its change is between videos of the same prompt and seed, the
distance too. Work is counted at published sizes (`bench.cost`), whatever the bundle's networks are; seconds are this
bundle's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.cost import Cost, steps_table
from bench.plots import Axis, Chart
from bench.quality import Task, bootstrap, clips_table, json_rows, middle, percent, percent_range, run_quality, sheets
from bench.report import NOTHING, Report, Table, median, number, spread
from bench.timing import Summary, summarize
from export.demo.faithfulness import Faithfulness, Prompt
from runtime.config import DIFFUSION_STAGES, Settings
from runtime.ops import Frames


@dataclass(frozen=True)
class PresetResult:
    """One preset over all prompts; `videos` are rows of `quality.run_quality`."""

    settings: Settings
    cost: Cost
    faithfulness: Faithfulness
    videos: Sequence[Mapping[str, Any]]

    @property
    def seconds(self) -> Summary | None:
        return summarize([video["seconds"] for video in self.videos])

    @property
    def psnr(self) -> list[float]:
        """To the first preset's videos, dB; none of the first itself."""
        return [video["psnr"] for video in self.videos if "psnr" in video]

    def change(self, first: "PresetResult") -> list[float]:
        """Of every video's share of right answers."""
        return list(np.subtract(self.faithfulness.scores, first.faithfulness.scores))


def run_presets(
    prompts: Sequence[Prompt],
    settings: Mapping[str, Settings],
    costs: Mapping[str, Cost],
    make: Callable[[Prompt, Settings], Frames],
    out: Path,
    made_by: Mapping[str, Any],
    on_clip: Callable[[str, int, str], None],
    on_preset: Callable[[Mapping[str, PresetResult]], None],
) -> dict[str, PresetResult]:
    """Every prompt by every preset of `settings`, clips and sheets in out/PRESET; `on_preset` sees what is done so far.

    Distances are to the first preset. `on_clip(preset, index, what was seen)`. An interrupted run continues.
    """
    results: dict[str, PresetResult] = {}
    first: Path | None = None
    for preset, chosen in settings.items():
        folder = out / preset
        folder.mkdir(parents=True, exist_ok=True)
        result = run_quality(
            prompts,
            lambda prompt, chosen=chosen: make(prompt, chosen),
            folder,
            first,
            lambda index, seen, preset=preset: on_clip(preset, index, seen),
            {**made_by, **chosen.to_dict()},
        )
        results[preset] = PresetResult(chosen, costs[preset], result["faithfulness"], result["videos"])
        first = first or folder
        on_preset(results)
    return results


def compare(task: Task, settings: Mapping[str, Settings], report: Report) -> None:
    """Presets by their `settings`, with the first of them; the report is written again after each."""
    authors = {preset: Settings().with_options(preset=preset, **task.options) for preset in settings}
    costs = {preset: Cost(chosen, task.judged.stages) for preset, chosen in authors.items()}
    stages = [stage for stage in DIFFUSION_STAGES if stage in task.judged.stages]

    def content(results: Mapping[str, PresetResult]) -> tuple[Any, ...]:
        clips = clips_table({preset: result.videos for preset, result in results.items()})
        tables = [table(results), steps_table({preset: settings[preset] for preset in results}, stages), clips]
        pictures = [picture for preset in results for picture in sheets(task.out / preset)]
        return to_json(results), tables, {"faithfulness": plot(results)}, pictures

    with task.maker() as make:
        results = run_presets(
            task.prompts,
            settings,
            costs,
            make,
            task.out,
            task.made_by(),
            lambda preset, index, seen: task.said(index, seen, f"{preset}, "),
            lambda sofar: report.save(*content(sofar)),
        )
    report.finish(*content(results))


def table(results: Mapping[str, PresetResult]) -> Table:
    name, first = next(iter(results.items()))
    rows = []
    for preset, result in results.items():
        change, psnr = (result.change(first), result.psnr) if result is not first else ([], [])
        rows.append(
            [
                preset,
                number(result.cost.pflop),
                number(first.cost.total / result.cost.total),
                median(result.seconds),
                spread(result.seconds),
                percent(result.faithfulness.score),
                percent_range(bootstrap(result.faithfulness.scores)),
                _points(float(np.mean(change))) if change else NOTHING,
                " to ".join(_points(bound) for bound in bootstrap(change)) if change else NOTHING,
                _decibel(middle(psnr)) if psnr else NOTHING,
                _decibel(min(psnr)) if psnr else NOTHING,
            ]
        )
    headers = ["preset", "PFLOP", "times cheaper", "s", "p10-p90", "faithfulness", "95 % interval"]
    headers += ["points", "95 % interval", "PSNR dB", "worst"]
    count = len(first.videos)
    title = f"{count} prompts by every preset; PFLOP at published sizes, points and PSNR against {name}"
    return Table(title, headers, rows)


def _points(share: float) -> str:
    """Percentage points, signed."""
    return f"{100 * share:+.1f}"


def _decibel(value: float) -> str:
    return "equal" if np.isinf(value) else number(value)


def plot(results: Mapping[str, PresetResult]) -> Chart:
    at = {preset: result.cost.pflop for preset, result in results.items()}
    bounds = {preset: bootstrap(result.faithfulness.scores) for preset, result in results.items()}
    return Chart(
        "Faithfulness over cost, 95 % intervals",
        Axis("PFLOP at published sizes"),
        Axis("right answers, %"),
        points={preset: [(at[preset], 100 * result.faithfulness.score)] for preset, result in results.items()},
        intervals={preset: [(at[preset], 100 * low, 100 * high)] for preset, (low, high) in bounds.items()},
    )


def to_json(results: Mapping[str, PresetResult]) -> dict[str, Any]:
    return {
        "presets": {
            preset: {
                "settings": result.settings.to_dict(),
                "flop": result.cost.total,
                "seconds": asdict(summary) if (summary := result.seconds) else None,
                "faithfulness": asdict(result.faithfulness),
                "videos": json_rows(result.videos),
            }
            for preset, result in results.items()
        }
    }
