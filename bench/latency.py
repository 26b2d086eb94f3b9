"""Latency of the cascade: every stage on its own, in engines and outside them, from set-up to the finished clip.

Stages run on what the stage before made. One that runs without its predecessor gets seeded random arrays of the same
shapes: of all the work only that of dynamic thresholding depends on the values.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bench.plots import Bars
from bench.report import NOTHING, Table, median, number, share, spread
from bench.timing import Summary, measure, summarize
from bench.work import ENGINES, STAGES
from engines.memory import GIB, peak_memory
from engines.store import Bundle
from runtime.config import DIFFUSION_STAGES, NEGATIVE_PROMPT, SR1_SCALE, Settings, stage_sizes
from runtime.engine import Engine, EnginePool
from runtime.ops import clip_to_frames
from runtime.pipeline import check_run
from runtime.sampler import guidance_scales
from runtime.stages.base import run_base
from runtime.stages.diffusion import Progress, PromptEmbeds, stage_schedule
from runtime.stages.interp import run_interp
from runtime.stages.sr1 import run_if2, run_sr1
from runtime.stages.sr2 import run_sr2
from runtime.stages.text import MAX_TOKENS, run_clip_text, run_text

PROMPT = "A burning lamborghini driving on rainbow."  # padded to 77 tokens as any other: its words cost nothing


@dataclass(frozen=True)
class EngineCall:
    """`start` is when the runtime turned to the engine, `seconds` what the backend itself took."""

    graph: str
    start: float
    seconds: float


@dataclass(frozen=True)
class Step:
    """Seconds of one denoising step. `kind` says if it was guided and of the whole network: kinds differ in work."""

    kind: str
    engine: float
    outside: float


@dataclass(frozen=True)
class StageRun:
    """One run of a stage, by the clock: its engine calls and the ends of its denoising steps.

    A stage has one or several denoising loops, alike in length and in which steps are `guided` (none, as in text:
    empty).
    """

    start: float
    end: float
    calls: Sequence[EngineCall]
    step_ends: Sequence[float]
    guided: Sequence[bool]

    @property
    def loop(self) -> int:
        """Steps of a loop."""
        return len(self.guided)

    @property
    def wall(self) -> float:
        return self.end - self.start

    @property
    def engine_seconds(self) -> float:
        return sum(call.seconds for call in self.calls)

    def _step_calls(self) -> list[EngineCall]:
        return [call for call in self.calls if call.graph in ("step", "shallow")]

    def set_up(self) -> float:
        """Before every loop's first engine call of a step: text context, noise, resizing, VAE encoder."""
        if not self.loop:
            return 0.0
        loop_starts = [self.start, *self.step_ends[self.loop - 1 : -1 : self.loop]]
        first_calls = self._step_calls()[:: self.loop]
        return sum(call.start - start for call, start in zip(first_calls, loop_starts, strict=True))

    def finish(self) -> float:
        """After the last step: VAE decoder, joining of windows."""
        return self.end - self.step_ends[-1] if self.loop else 0.0

    def steps(self) -> list[Step]:
        """Every step from the end of the one before; so without the first of each loop, whose start shows nowhere."""
        steps = []
        for i, (call, kind) in enumerate(zip(self._step_calls(), self.kinds(), strict=True)):
            if i % self.loop:
                outside = self.step_ends[i] - self.step_ends[i - 1] - call.seconds
                steps.append(Step(kind, call.seconds, outside))
        return steps

    def kinds(self) -> list[str]:
        """Of every step, the first of each loop too."""
        guided = ["guided" if self.guided[i % self.loop] else "unguided" for i in range(len(self.step_ends))]
        shallow = [", shallow" if call.graph == "shallow" else "" for call in self._step_calls()]
        return [a + b for a, b in zip(guided, shallow, strict=True)]


@dataclass(frozen=True)
class StageResult:
    stage: str
    runs: Sequence[StageRun]
    load_seconds: float
    peak_memory: int  # bytes, of the process up to here

    @property
    def wall(self) -> Summary | None:
        return summarize([run.wall for run in self.runs])

    @property
    def kinds(self) -> Counter[str]:
        """How many steps of each kind a run has."""
        return Counter(self.runs[0].kinds())

    def steps(self, kind: str) -> tuple[Summary | None, Summary | None]:
        """Seconds in engine and outside of all runs' steps of this kind."""
        steps = [step for run in self.runs for step in run.steps() if step.kind == kind]
        return summarize([step.engine for step in steps]), summarize([step.outside for step in steps])


class Cascade:
    """The stages as calls; `arrays` hands what one makes to the next."""

    def __init__(self, engines: EnginePool, settings: Settings, seed: int, arrays: dict[str, Any]):
        self.engines, self.settings, self.seed, self.arrays = engines, settings, seed, arrays

    def prepare(self, stage: str) -> None:
        """Make up what no earlier stage made: clips uniform in [-1, 1], normal text embeddings."""
        needs = {
            "text": (),
            "base": ("t5_text",),
            "interp": ("t5_text", "keyframes"),
            "if2": ("t5_text", "clip"),
            "sr1": ("t5_text", "clip", "first_frame"),
            "sr2": ("clip_text", "large_clip"),
        }[stage]
        random = np.random.default_rng(self.seed)
        for name in needs:
            if name in self.arrays:
                continue
            if name.endswith("_text"):
                width = self.engines.bundle.engine(stage).properties["text_dim"]
                shape = (2, 1, MAX_TOKENS, width)
                self.arrays[name] = PromptEmbeds(*random.standard_normal(shape, np.float32))
            else:
                self.arrays[name] = random.uniform(-1, 1, self._shape(name)).astype(np.float32)

    def _shape(self, name: str) -> tuple[int, ...]:
        width, height = stage_sizes(self.settings.size)["base"]
        large = (height * SR1_SCALE, width * SR1_SCALE)
        return {
            "keyframes": (1, 3, self.settings.keyframes, height, width),
            "clip": (1, 3, self.settings.num_frames, height, width),
            "first_frame": (1, 3, 1, *large),
            "large_clip": (1, 3, self.settings.num_frames, *large),
        }[name]

    def run(self, stage: str, progress: Progress) -> None:
        engines, arrays, settings, seed = self.engines, self.arrays, self.settings, self.seed
        if stage == "text":
            arrays["t5_text"] = run_text(engines, PROMPT)
            arrays["clip_text"] = run_clip_text(engines, PROMPT, NEGATIVE_PROMPT)
        elif stage == "base":
            arrays["keyframes"] = run_base(engines, arrays["t5_text"], settings, seed, progress=progress)
        elif stage == "interp":
            arrays["clip"] = run_interp(engines, arrays["t5_text"], arrays["keyframes"], settings, seed, progress)
        elif stage == "if2":
            arrays["first_frame"] = run_if2(
                engines, arrays["t5_text"], arrays["clip"][:, :, :1], settings, seed, progress
            )
        elif stage == "sr1":
            arrays["large_clip"] = run_sr1(
                engines, arrays["t5_text"], arrays["clip"], arrays["first_frame"], settings, seed, progress
            )
        else:
            frames = clip_to_frames(arrays["large_clip"])
            run_sr2(engines, arrays["clip_text"], frames, settings, seed, progress)


def loop_lengths(bundle: Bundle, settings: Settings, stages: Iterable[str]) -> dict[str, int]:
    """Steps of one denoising loop of each stage. Raises Show1Error now for what would stop a later stage."""
    lengths = {}
    for stage in stages:
        for engine in ENGINES[stage]:
            bundle.engine(engine)
        if stage == "text":
            lengths[stage] = 0
            continue
        strength = settings.strength if stage == "sr2" else 1.0
        lengths[stage] = len(stage_schedule(bundle, stage, getattr(settings, stage), strength))
    return lengths


def _guided(settings: Settings, stage: str, length: int) -> list[bool]:
    """Which steps of one of the stage's loops are guided."""
    if not length:
        return []
    chosen = getattr(settings, stage)
    return [bool(scale > 1) for scale in guidance_scales(length, chosen.guidance_scale, chosen.guided)]


def run_latency(
    bundle: Bundle,
    settings: Settings,
    stages: Sequence[str],
    seed: int,
    warmup: int,
    repeats: int,
    on_stage: Callable[[StageResult], None],
) -> list[StageResult]:
    """Measure `stages` in the cascade's order. A stage's engines are loaded before its first run and dropped after."""
    lengths = loop_lengths(bundle, settings, stages)
    if set(stages) == set(STAGES):
        check_run(bundle, settings)
    results = []
    arrays: dict[str, Any] = {}
    for stage in lengths:
        # Loaded once and kept over all runs of the stage, so that loading is not part of any.
        with EnginePool(bundle, keep_loaded=True) as engines:
            cascade = Cascade(engines, settings, seed, arrays)
            cascade.prepare(stage)
            guided = _guided(settings, stage, lengths[stage])
            result = _measure_stage(cascade, stage, guided, warmup, repeats)
        results.append(result)
        on_stage(result)
    return results


def _measure_stage(cascade: Cascade, stage: str, guided: Sequence[bool], warmup: int, repeats: int) -> StageResult:
    calls: list[EngineCall] = []
    start = time.perf_counter()
    for name in ENGINES[stage]:
        with cascade.engines.use(name) as engine:
            _record_calls(engine, calls)
    load_seconds = time.perf_counter() - start

    def run() -> tuple[list[EngineCall], list[float]]:
        calls.clear()
        step_ends: list[float] = []
        cascade.run(stage, lambda *_: step_ends.append(time.perf_counter()))
        return list(calls), step_ends

    runs = [StageRun(timed.start, timed.end, *timed.result, guided) for timed in measure(run, warmup, repeats)]
    return StageResult(stage, runs, load_seconds, peak_memory())


def _record_calls(engine: Engine, calls: list[EngineCall]) -> None:
    """Let every later run of one of the engine's graphs add itself to `calls`."""
    engine.on_call = lambda graph, start, seconds: calls.append(EngineCall(graph, start, seconds))


def total_wall(results: Sequence[StageResult]) -> list[float]:
    """One time per repeat: its runs of all stages, one after the other."""
    return [sum(run.wall for run in runs) for runs in zip(*(result.runs for result in results), strict=True)]


def stage_table(results: Sequence[StageResult]) -> Table:
    def row(name: str, walls: Sequence[float], runs: Sequence[StageRun], parts: list[str], memory: int) -> list[str]:
        wall = summarize(walls)
        in_engines = share(sum(run.engine_seconds for run in runs), sum(walls))
        return [name, median(wall), spread(wall), *parts[:2], in_engines, *parts[2:], number(memory / GIB)]

    rows = []
    for result in results:
        runs, calls = result.runs, str(len(result.runs[0].calls))
        parts = [median(summarize([run.set_up() for run in runs])), median(summarize([run.finish() for run in runs]))]
        parts = parts if runs[0].loop else [NOTHING, NOTHING]
        walls = [run.wall for run in runs]
        rows.append(row(result.stage, walls, runs, [*parts, calls, number(result.load_seconds)], result.peak_memory))
    all_runs = [run for result in results for run in result.runs]
    calls = str(sum(len(result.runs[0].calls) for result in results))
    load = number(sum(result.load_seconds for result in results))
    name = "end to end" if len(results) == len(STAGES) else "these stages"
    peak = max(result.peak_memory for result in results)
    rows.append(row(name, total_wall(results), all_runs, [NOTHING, NOTHING, calls, load], peak))
    headers = ["stage", "wall s", "p10-p90", "set-up s", "finish s", "in engines", "calls", "load s", "peak GiB"]
    return Table("Stages: median of the runs", headers, rows)


def step_table(results: Sequence[StageResult]) -> Table:
    rows = []
    for result in results:
        for kind, count in result.kinds.items():
            engine, outside = result.steps(kind)
            rows.append(
                [
                    f"{result.stage}, {kind}" if len(result.kinds) > 1 else result.stage,
                    str(count),
                    str(engine.n if engine else 0),
                    median(engine, 1e3),
                    spread(engine, 1e3),
                    median(outside, 1e3),
                    spread(outside, 1e3),
                    share(outside.median, engine.median + outside.median) if engine and outside else NOTHING,
                ]
            )
    headers = ["stage", "steps", "n", "engine ms", "p10-p90", "outside ms", "p10-p90", "outside"]
    return Table("Denoising steps: median of n", headers, rows)


def tables(results: Sequence[StageResult]) -> list[Table]:
    denoising = [result for result in results if result.runs[0].loop]
    return [stage_table(results), *([step_table(denoising)] if denoising else [])]


def plot(results: Sequence[StageResult]) -> Bars:
    inside = [sum(run.engine_seconds for run in result.runs) / len(result.runs) for result in results]
    wall = [sum(run.wall for run in result.runs) / len(result.runs) for result in results]
    series = {"in engines": inside, "outside": [whole - part for whole, part in zip(wall, inside, strict=True)]}
    return Bars("Seconds by stage, mean of the runs", "s", [result.stage for result in results], series)


def describe_run(
    settings: Settings, stages: Sequence[str], preset: str, seed: int, warmup: int, repeats: int
) -> dict[str, Any]:
    """What was asked for, as JSON's types."""
    sizes = stage_sizes(settings.size)
    return {
        "stages": list(stages),
        "preset": preset,
        **settings.to_dict(),
        "sizes": {stage: "{}x{}".format(*sizes[stage]) for stage in DIFFUSION_STAGES},
        "frames": settings.num_frames,
        "seed": seed,
        "warmup": warmup,
        "repeats": repeats,
    }


def to_json(results: Sequence[StageResult]) -> dict[str, Any]:
    """Seconds and bytes: every run of a stage, of its steps the summary."""
    return {
        "stages": {
            result.stage: {
                "wall_s": _rounded(run.wall for run in result.runs),
                "set_up_s": _rounded(run.set_up() for run in result.runs),
                "finish_s": _rounded(run.finish() for run in result.runs),
                "engine_s": _rounded(run.engine_seconds for run in result.runs),
                "engine_calls": Counter(call.graph for call in result.runs[0].calls),
                "steps": len(result.runs[0].step_ends),
                "steps_by_kind": {
                    kind: {"steps": count, "engine_s": _summary(engine), "outside_s": _summary(outside)}
                    for kind, count, (engine, outside) in ((k, n, result.steps(k)) for k, n in result.kinds.items())
                },
                "load_s": round(result.load_seconds, 7),
                "peak_memory_bytes": result.peak_memory,
            }
            for result in results
        },
        "total_wall_s": _rounded(total_wall(results)),
    }


def _rounded(seconds: Iterable[float]) -> list[float]:
    return [round(value, 7) for value in seconds]


def _summary(summary: Summary | None) -> dict[str, float] | None:
    return {name: round(value, 7) for name, value in asdict(summary).items()} if summary else None
