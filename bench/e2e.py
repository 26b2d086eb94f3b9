"""A whole video through the runtime against the reference as its users run it, stage by stage in the same run.

The runtime really makes the video, or, with fewer steps than a reference video has, as many as asked for. Of a baseline
every network is timed on a few calls and counted as often as the reference calls it: that fits a run of minutes.
Results say which is which.
"""

import contextlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench import baseline
from bench.baseline import Measured, Place, Source
from bench.latency import StageResult, loop_lengths, run_latency
from bench.plots import Bars
from bench.report import NOTHING, Table, number, share
from bench.timing import summarize
from bench.work import STAGE_OF, Calls, Setup, matrix_rate, reference_calls, step_counts
from engines.catalog import CATALOG, UNETS, predictions
from engines.errors import EngineError, SettingsError
from engines.store import Bundle
from export import networks
from export.checkpoint import file_hash
from export.configs import SCHEDULERS
from export.modules.vae import downscaling
from export.random_checkpoint import CONFIGS
from runtime.config import Settings
from runtime.engine import Engine

REFERENCE_STEPS = {stage: getattr(Settings(), stage).num_inference_steps for stage in UNETS}


@dataclass(frozen=True)
class Work:
    """A network's part in a reference video: `flop` of one of its `calls`."""

    calls: Calls
    flop: int

    @property
    def total(self) -> int:
        return self.calls.count * self.flop


@dataclass(frozen=True)
class StageTime:
    """Seconds that one contender takes for a stage of the reference video.

    `full` says that a whole video's stage ran; else `seconds` is calls measured, times calls needed. `call` is the
    median of a reference call of the stage's UNet, guidance and scheduler included; None in the text stage.
    """

    seconds: float
    full: bool
    call: float | None
    spread: tuple[float, float] | None = None  # 10th and 90th percentile of `call`


@dataclass
class Contender:
    """A way to make the video: a bundle through the runtime, or a baseline."""

    name: str
    stages: dict[str, StageTime | None] = field(default_factory=dict)  # None: it failed, `details` say why
    details: dict[str, Any] = field(default_factory=dict)

    def total(self, stages: Iterable[str]) -> float | None:
        times = [self.stages.get(stage) for stage in stages]
        return None if None in times else sum(time.seconds for time in times if time)


def sources(size: str, checkpoint: Path | None, precision: str, stages: Sequence[str]) -> dict[str, Source]:
    """Configs of all networks; of those of `stages`, where there is a checkpoint, the weights that a bundle of
    `precision` is made of."""
    found = {n: Source(n, CONFIGS[size][net.path]) for n, net in CATALOG.items()}
    for name in (n for n in CATALOG if checkpoint and STAGE_OF[n] in stages):
        source = networks.Source.find(CATALOG[name], checkpoint, precision)
        found[name] = Source(name, source.config, tuple(source.weights))
    return found


def count_work(
    found: Mapping[str, Source], settings: Settings, lengths: Mapping[str, int], stages: Sequence[str]
) -> dict[str, Work]:
    """By network of `stages`; `lengths` are the steps of each stage's denoising loop in a reference video."""
    vae = found["vae_encoder"].config
    calls = reference_calls(settings, lengths, vae["latent_channels"], downscaling(vae))
    wanted = {name: call for name, call in calls.items() if call.stage in stages}
    return {name: Work(call, baseline.network_flop(found[name], call)) for name, call in wanted.items()}


def from_latency(result: StageResult, length: int, work: Mapping[str, Work]) -> StageTime:
    """What a stage of the reference video takes, whose denoising loops are `length` steps long."""
    run = result.runs[0]
    if not run.loop:
        return StageTime(run.wall, True, None)
    loops = len(run.step_ends) // run.loop
    times, timed = [s.engine + s.outside for s in run.steps()], run.loop - 1
    # Medians, as of a baseline's calls: a first step is slower. One of each loop: gaps may not part evenly.
    by_loop = [times[i : i + timed] for i in range(0, len(times), timed)] if timed else []
    medians = [statistics.median(of_loop) for of_loop in by_loop]
    # A loop of a single step has nothing else.
    step = statistics.fmean(medians) if medians else (run.wall - run.set_up() - run.finish()) / len(run.step_ends)
    steps = summarize([t * step / median for of_loop, median in zip(by_loop, medians, strict=True) for t in of_loop])
    full = run.loop == length
    seconds = run.wall if full else run.set_up() + loops * length * step + run.finish()
    per_step = work[result.stage].calls.count / (loops * length)  # reference calls: 7 gaps go through one step
    return StageTime(seconds, full, step / per_step, (steps.p10 / per_step, steps.p90 / per_step) if steps else None)


def run_bundle(
    bundle: Bundle,
    setup: Setup,
    lengths: Mapping[str, int],
    work: Mapping[str, Work],
    contender: Contender,
    on_stage: Callable[[str], None],
) -> None:
    """Fills in `contender`; `on_stage` is called after every stage."""
    loading = contender.details.setdefault("load_s", {})

    def measured(result: StageResult) -> None:
        contender.stages[result.stage] = from_latency(result, lengths[result.stage], work)
        loading[result.stage] = round(result.load_seconds, 3)
        on_stage(result.stage)

    run_latency(bundle, setup.settings, setup.stages, setup.seed, warmup=0, repeats=1, on_stage=measured)


def run_baselines(
    found: Mapping[str, Source],
    schedulers: Mapping[str, Mapping[str, Any]],
    work: Mapping[str, Work],
    stages: Sequence[str],
    kinds: Sequence[str],
    place: Place,
    repeats: int,
    on_network: Callable[[str, Any], None],
    on_stage: Callable[[str, list[Contender]], None],
    is_time_left: Callable[[], bool],
) -> list[Contender]:
    """One network in memory at a time; `on_stage` is called with what there is after every stage."""
    contenders = {kind: Contender(kind) for kind in kinds}
    for stage in stages:
        measured: dict[str, dict[str, Measured]] = {}
        for name in (n for n, w in work.items() if w.calls.stage == stage):
            measured[name] = baseline.measure_network(
                found[name],
                schedulers.get(name),
                work[name].calls,
                place,
                kinds,
                repeats,
                on_network,
                is_time_left,
            )
        for kind, contender in contenders.items():
            results = {name: by_kind[kind] for name, by_kind in measured.items()}
            contender.stages[stage] = _stage_time(stage, results, work)
            for name, result in results.items():
                if result.failure:
                    contender.details.setdefault("failures", {})[name] = result.failure
                elif name in UNETS and result.first:
                    contender.details.setdefault("first_call_s", {})[name] = round(result.first, 3)
        on_stage(stage, list(contenders.values()))
    return list(contenders.values())


def _stage_time(stage: str, measured: Mapping[str, Measured], work: Mapping[str, Work]) -> StageTime | None:
    seconds = 0.0
    for name, result in measured.items():
        if result.call is None:
            return None
        seconds += result.call.median * work[name].calls.count
    unet = measured[stage].call if stage in measured else None
    return StageTime(seconds, False, unet.median if unet else None, (unet.p10, unet.p90) if unet else None)


def difference_of(bundle: Bundle, source: Source, unet: Any, place: Place) -> float | None:
    """Largest difference between engine and baseline over the largest value; None if they have other weights."""
    import torch

    name = source.network
    if name not in UNETS or not source.files:
        return None
    entry = bundle.engine(name)
    if entry.source.get("weights") != file_hash(source.files):
        return None
    engine = Engine(bundle, entry)
    try:
        profile = engine.specs["step"].profile
        # Not the least: norms over one pixel or two at the coarsest level magnify every rounding.
        height, width = (axis.nearest(4 * axis.min) for axis in (profile["height"], profile["width"]))
        channels = engine.specs["step"].inputs[0].axes[1]
        random = np.random.default_rng(0)
        sample = random.standard_normal((2, channels, 1 if name == "if2" else 3, height, width), np.float32)
        text = random.standard_normal((2, 7, entry.properties["text_dim"]), np.float32)
        timestep = np.array([900, 100], np.float32)
        level = {"noise_level": np.full(2, 150, np.float32)} if entry.properties["noise_level"] else {}
        context = engine.run("context", prompt_embeds=text, **level)
        outputs = engine.run("step", predictions(engine.specs["step"]), sample=sample, timestep=timestep, **context)
        ours = np.concatenate([*outputs.values()], axis=1)
    finally:
        engine.close()
    arrays = [torch.from_numpy(array).to(place.device) for array in (sample, timestep, text, *level.values())]
    arrays[0], arrays[2] = arrays[0].to(place.torch_dtype), arrays[2].to(place.torch_dtype)
    theirs = unet(*arrays).float().cpu().numpy()[:, : ours.shape[1]]
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def loops(setup: Setup) -> dict[str, int]:
    """Steps of each stage's loop in a reference video."""
    full = setup.settings.with_steps(REFERENCE_STEPS)
    known = loop_lengths(setup.bundles[0], full, setup.stages) if setup.bundles else {}
    return {**step_counts(full), "text": 0, **known}


def run_e2e(
    setup: Setup, said: Callable[[str, "Result"], None], is_time_left: Callable[[], bool] = lambda: True
) -> "Result":
    """Measure; `said(what, result so far)` after every part, which may end it. Raises SettingsError for a bundle of
    other networks, and where there is neither bundle nor baseline."""
    if not setup.bundles and not setup.kinds:
        raise SettingsError("nothing to measure: give a --bundle, or a --baseline.")
    precisions = [entry.precision for bundle in setup.bundles for entry in bundle.manifest.engines.values()]
    found = sources(setup.size, setup.checkpoint, precisions[0] if precisions else "fp16", setup.stages)
    for bundle in setup.bundles:
        _check_networks(bundle, found, setup.stages)
    lengths, place = loops(setup), Place.here()
    work = count_work(found, setup.settings, lengths, setup.stages)
    rate = matrix_rate(place.device, place.dtype)
    contenders: list[Contender] = []
    differences: dict[str, float] = {}

    def result(baselines: Sequence[Contender] = ()) -> Result:
        width, height = setup.settings.size
        video = f"{setup.settings.num_frames} frames, {width} x {height}"
        return Result(setup.stages, work, [*contenders, *baselines], rate, differences, video)

    for bundle in setup.bundles:
        backends = "+".join(sorted({entry.backend for entry in bundle.manifest.engines.values()}))
        same = sum(contender.name.partition(" ")[0] == backends for contender in contenders)
        name = f"{backends} {same + 1}" if same else backends
        contenders.append(Contender(name))
        try:
            run_bundle(
                bundle,
                setup,
                lengths,
                work,
                contenders[-1],
                lambda stage, name=name: said(f"{name}: {stage}", result()),
            )
        except EngineError as error:  # as where the card is too small: the others go on
            contenders[-1].details["failures"] = {"engines": str(error)}
            said(f"{name}: {error}", result())
    schedulers = setup.bundles[0].manifest.schedulers if setup.bundles else SCHEDULERS

    def compare(name: str, unet: Any) -> None:
        if setup.bundles and "failures" not in contenders[0].details:
            with contextlib.suppress(EngineError):  # beside the baseline's network there may be no room for it
                difference = difference_of(setup.bundles[0], found[name], unet, place)
                if difference is not None:
                    differences[name] = difference

    baselines: list[Contender] = []
    if setup.kinds:
        baselines = run_baselines(
            found,
            schedulers,
            work,
            setup.stages,
            setup.kinds,
            place,
            setup.repeats,
            compare,
            lambda stage, sofar: said(f"baselines: {stage}", result(sofar)),
            is_time_left,
        )
    return result(baselines)


def _check_networks(bundle: Bundle, found: Mapping[str, Source], stages: Sequence[str]) -> None:
    for stage in stages:
        if stage in UNETS:
            config = found[stage].config
            want = config.get("encoder_hid_dim") or config["cross_attention_dim"]
            have = bundle.engine(stage).properties["text_dim"]
            if have != want:
                raise SettingsError(
                    f"{bundle.root}: {stage} reads text of {have} channels, the networks to compare with {want}. "
                    "Give --size or --checkpoint of the networks that the bundle was made from."
                )


@dataclass(frozen=True)
class Result:
    """Everything that was measured; `rate` is the matrix rate of this run, FLOP/s.

    `differences` are between the first bundle's engines and eager torch on the same weights, relative to the largest
    value of a prediction.
    """

    stages: Sequence[str]
    work: Mapping[str, Work]
    contenders: Sequence[Contender]
    rate: float
    differences: Mapping[str, float]
    video: str

    @property
    def flop(self) -> dict[str, int]:
        """By stage."""
        return {stage: sum(w.total for w in self.work.values() if w.calls.stage == stage) for stage in self.stages}

    def tables(self) -> list[Table]:
        return [self._video(), self._calls()]

    def _video(self) -> Table:
        """Seconds of a reference video, and how many times as long as the first contender the others take."""
        flop, first = self.flop, self.contenders[0]
        others = self.contenders[1:]
        headers = ["stage", "TFLOP", "floor s"]
        headers += [f"{c.name} s" for c in self.contenders] + [f"{c.name} / {first.name}" for c in others]
        headers += [f"{first.name} / floor"]
        rows = []
        for name, stages in (*((s, [s]) for s in self.stages), ("sum", list(self.stages))):
            total = sum(flop[s] for s in stages)
            floor = total / self.rate
            times = [c.total(stages) for c in self.contenders]
            ratios = [_ratio(time, times[0]) for time in times[1:]] + [_ratio(times[0], floor)]
            rows.append([name, number(total / 1e12), number(floor), *map(number, times), *ratios])
        full = [c.name for c in self.contenders if all((t := c.stages.get(s)) and t.full for s in self.stages)]
        how = f"{' and '.join(full)} ran in full, " if full else ""
        title = f"A reference video of {self.video}; {how}other seconds are of timed steps or calls, times their number"
        return Table(title, headers, rows)

    def _calls(self) -> Table:
        """One call of the reference, guidance and scheduler included: rates of useful work."""
        headers = ["network", "calls", "TFLOP"]
        compared = bool(self.differences)
        for contender in self.contenders:
            headers += [f"{contender.name} ms", "p10-p90", "TFLOP/s", "of matrix rate"]
        rows = []
        for stage in self.stages:
            if stage not in UNETS:
                continue
            work = self.work[stage]
            row = [stage, str(work.calls.count), number(work.flop / 1e12)]
            for contender in self.contenders:
                time = contender.stages.get(stage)
                if time is None or time.call is None:
                    row += [NOTHING] * 4
                    continue
                low_high = "-".join(number(1e3 * value) for value in time.spread) if time.spread else NOTHING
                rate = work.flop / time.call
                row += [number(1e3 * time.call), low_high, number(rate / 1e12), share(rate, self.rate)]
            if compared:
                difference = self.differences.get(stage)
                row.append(NOTHING if difference is None else f"{difference:.1e}")
            rows.append(row)
        headers += ["difference"] if compared else []
        return Table(f"One reference call; matrix rate {number(self.rate / 1e12)} TFLOP/s", headers, rows)

    def plots(self) -> dict[str, Any]:
        series = {
            c.name: [(t.seconds if (t := c.stages.get(stage)) else None) for stage in self.stages]
            for c in self.contenders
        }
        return {"stages": Bars("Seconds of a reference video, by stage", "s", list(self.stages), series)}

    def to_json(self) -> dict[str, Any]:
        """Seconds and FLOP."""
        return {
            "matrix_rate_flop_per_s": round(self.rate),
            "work": {n: {**asdict(w.calls), "flop": w.flop} for n, w in self.work.items()},
            "flop": sum(self.flop.values()),
            "contenders": {
                c.name: {
                    "stages": {s: asdict(t) if t else None for s, t in c.stages.items()},
                    "total_s": c.total(self.stages),
                    **c.details,
                }
                for c in self.contenders
            },
            "largest_difference": dict(self.differences),
        }


def _ratio(part: float | None, whole: float | None) -> str:
    return NOTHING if part is None or not whole else number(part / whole)
