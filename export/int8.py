"""`export build --precision int8`: engines of a float32 bundle, calibrated on its own videos, quantised and judged.

A float32 bundle makes a few videos. What its engines were given on the way, spread over the denoising steps of every
stage, says how large the numbers of every layer get, and how much each layer loses in int8: that decides what stays
high. An engine is then kept in int8 only where that pays and the video stays what it was.
"""

import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines import quantize
from engines.catalog import CATALOG, TOKENIZERS, networks_of, predictions
from engines.compile_ort import BACKEND, compile_int8
from engines.errors import SettingsError
from engines.manifest import EngineEntry, FileEntry, GraphEntry, Manifest
from engines.quantize import LayerPlan, Mode, main_graph, signal_to_noise
from engines.spec import INT8
from engines.store import Bundle, BundleWriter, file_entry
from export.build import check_size, of_checkpoint, settings_of_others
from export.demo.faithfulness import Faithfulness, Prompt, faithfulness
from export.demo.judge import read
from export.job import Job
from export.networks import Source
from export.replay import Take, make_videos
from runtime.config import SEED, Settings
from runtime.engine import Engine, EnginePool, open_runner
from runtime.ops import psnr
from runtime.pipeline import check_run
from runtime.runner import Array

# Plain scenes: any text-to-video model can be asked for them, and the demo checkpoint knows the words.
CALIBRATION_PROMPTS = (
    "a small red circle moving left over a blue background",
    "a large yellow star growing over a striped black background",
)
HELD_OUT_PROMPT = "a medium green triangle moving up over a white background"
_STEPS = {"base": 10, "interp": 6, "if2": 8, "sr1": 4, "sr2": 5}  # of the videos made here
_LEAST_EXECUTED = 4  # of sr2's steps, most of which little strength skips
_FEEDS = 12  # calls of each graph that are kept of a video, at most
_JUDGED = 3  # of the held-out video's
_ROUNDS = 3  # of timing
# What int8 engines and their verdicts depend on.
_CODE = ("engines/compile_ort.py", "engines/passes.py", "engines/quantize.py", "export/int8.py", "export/replay.py")
_CODE += tuple(f"export/demo/{name}.py" for name in ("captions", "faithfulness", "judge"))
_RUNTIME = ("noise", "ops", "runner_ort", "sampler", "schedulers", "tokenizer", "stages/*")
_CODE += tuple(f"runtime/{name}.py" for name in _RUNTIME)
_EQUAL = 99.0  # dB, of equal videos
_FIRST_JUDGED = 4  # videos; where they are less than these points above chance, the others are not made
_LEAST_HOPE = 5.0
JUDGE_PROMPTS = 16  # that faithfulness is judged by, where nothing else is asked for

LEAST_LAYER_SQNR = 25.0  # dB, of a layer's output: below, the layer keeps half or full precision
LEAST_PSNR = 30.0  # dB, of the held-out video with this engine in int8 to the one without
MOST_LOST = 2.0  # points of faithfulness, mean over the prompts, with this engine in int8
LEAST_ABOVE_CHANCE = 15.0  # points, of float32's faithfulness: videos of prompts that are not followed lose none
LEAST_SPEED = 1.05  # times float32's
MOST_BYTES = 0.75  # of float32's, where memory is the reason

Feeds = dict[str, Array]
# Of a layer: the largest magnitudes (read, written), and the dB that int8, and int8 weights alone, leave of its output.
Measured = tuple[tuple[float, float], float, float]


@dataclass
class _Reservoir:
    """Some calls out of however many there will be, each as likely: algorithm R of Vitter (1985).

    At random, because calls repeat: at equal distances, those of sr1's windows would be the same steps of each.
    """

    feeds: list[Feeds] = field(default_factory=list)
    seen: int = 0
    random: Random = field(default_factory=lambda: Random(SEED))

    def add(self, feeds: Mapping[str, Array]) -> None:
        self.seen += 1
        place = len(self.feeds) if self.seen <= _FEEDS else self.random.randrange(self.seen)
        if place < _FEEDS:
            self.feeds[place : place + 1] = [{name: self._copied(name, array) for name, array in feeds.items()}]

    def _copied(self, name: str, array: Array) -> Array:
        """One copy of what is the same in every call: the context of published interp is 185 MB."""
        known = self.feeds[0][name] if self.feeds else None
        return array.copy() if known is None or not np.array_equal(known, array) else known


def _few_over_time(feeds: list[Feeds]) -> list[Feeds]:
    """Those that are judged: at equal distances in the order of their timesteps, where they have any."""
    feeds = sorted(feeds, key=lambda row: float(row["timestep"][0]) if "timestep" in row else 0.0)
    return [feeds[index] for index in sorted({round(i) for i in np.linspace(0, len(feeds) - 1, _JUDGED)})]


def _few_steps(settings: Settings) -> Settings:
    """Settings of the videos made here, of a bundle's own: few steps, several of sr2's run whatever its strength.

    Spaced as the preset `fast` has them: by the published schedule sr1's first step divides by an alpha of 5e-5, and of
    so few steps any rounding of it would be seen.
    """
    sr2 = max(_STEPS["sr2"], math.ceil(_LEAST_EXECUTED / settings.strength))
    fast = settings.with_preset("fast")
    spacing = {name: getattr(fast, name).spacing for name in _STEPS}
    return settings.with_steps({**_STEPS, "sr2": sr2}).with_spacing(spacing)


class _Recording(EnginePool):
    """Notes what engines are given."""

    def __init__(self, bundle: Bundle):
        super().__init__(bundle, keep_loaded=True)
        self.calls: dict[tuple[str, str], _Reservoir] = {}

    def open(self, name: str) -> Engine:
        engine = super().open(name)
        engine.on_feeds = lambda graph, feeds: self.calls.setdefault((name, graph), _Reservoir()).add(feeds)
        return engine


class _Swapped(EnginePool):
    """Engines of a bundle, some of them swapped for candidates."""

    def __init__(self, bundle: Bundle, candidates: Mapping[str, Bundle]):
        super().__init__(bundle, keep_loaded=True)
        self._candidates = candidates

    def open(self, name: str) -> Engine:
        bundle = self._candidates.get(name, self.bundle)
        return Engine(bundle, bundle.engine(name))


@dataclass(frozen=True)
class Verdict:
    """What became of an engine, kept in the manifest (`properties["int8"]`).

    `speed` is in float32's, `sqnr_db` of the main graph's output on steps of the held-out video, `psnr_db` of that
    video with this engine alone in int8; `points` is the change in faithfulness, likewise, in percentage points, from
    float32's `before`, which is `chance` for videos of other prompts (shares); None where it was not measured. `layers`
    has for each layer of the main graph its mode, its ranges, and the dB that int8, and int8 weights alone, leave of
    its output.
    """

    kept: bool
    why: str
    speed: float
    sqnr_db: float
    psnr_db: float
    points: float | None
    bytes: int
    float_bytes: int
    layers: dict[str, dict[str, Any]]
    before: float | None = None
    chance: float | None = None

    def with_psnr(self, decibels: float) -> "Verdict":
        """The verdict after the held-out video."""
        verdict = replace(self, psnr_db=min(decibels, _EQUAL))
        if decibels >= LEAST_PSNR:
            return verdict
        return replace(verdict, kept=False, why=f"changes the video: {decibels:.1f} dB")

    def with_faithfulness(self, points: float | None, before: Faithfulness | None) -> "Verdict":
        """And after the judge, with float32's faithfulness; None: nothing was asked, or nothing can be lost."""
        verdict, known = replace(self, points=points), ""
        if before:
            verdict = replace(verdict, before=before.score, chance=before.chance_score)
            known = f": float32's is {before.score:.0%}, by chance {before.chance_score:.0%}"
        if points is None:
            return replace(verdict, why=f"{self.why}; faithfulness not measured{known}")
        change = f"faithfulness {points:+.1f} points"
        if points >= -MOST_LOST:
            return replace(verdict, why=f"{self.why}; {change}")
        return replace(verdict, kept=False, why=f"follows prompts less: {change}")


class _Judge:
    """Asks videos of held-out prompts what these ask for (`export.demo.faithfulness`)."""

    def __init__(self, floats: Bundle, prompts: Sequence[Prompt], settings: Settings):
        self.floats, self.prompts, self.settings = floats, prompts, settings
        self.before: Faithfulness | None = None  # float32's, once it is known

    def points(self, engines: EnginePool, first: str) -> float | None:
        """The change in faithfulness by these engines, float32's but for `first`, in percentage points.

        None without prompts, and where float32's videos follow them little better than by chance.
        """
        if not self.prompts:
            return None
        takes = self._takes
        if not self._above_chance >= LEAST_ABOVE_CHANCE:  # nor where it is no number
            return None
        assert self.before is not None
        change = self._faithfulness(make_videos(engines, takes, first)).score - self.before.score
        return round(100 * change, 6)  # sums of shares are not exact, and two points are to be two

    @cached_property
    def _takes(self) -> list[Take]:
        """Float32's videos, made when the first engine comes so far; only a few where these know nothing of prompts."""
        _say("judging by {} prompts at {}x{}".format(len(self.prompts), *self.settings.size))
        takes: list[Take] = []
        for prompts in (self.prompts[:_FIRST_JUDGED], self.prompts[_FIRST_JUDGED:]):
            if prompts and (not takes or self._above_chance >= _LEAST_HOPE):
                more = [Take(prompt.prompt, prompt.seed, self.settings) for prompt in prompts]
                takes += make_videos(EnginePool(self.floats, keep_loaded=True), more)
                self.before = self._faithfulness(takes)
        assert self.before is not None
        known = f"float32's faithfulness is {self.before.score:.0%}, by chance {self.before.chance_score:.0%}"
        _say(known if len(takes) == len(self.prompts) else f"{known}, of the first {len(takes)}: not measured")
        return takes

    @property
    def _above_chance(self) -> float:
        """Points of float32's faithfulness."""
        assert self.before is not None
        return 100 * (self.before.score - self.before.chance_score)

    def _faithfulness(self, takes: Sequence[Take]) -> Faithfulness:
        asked = self.prompts[: len(takes)]
        return faithfulness([prompt.scene for prompt in asked], [read(take.frames) for take in takes])


def build_int8(
    floats: Bundle,
    out: Path,
    prompts: Sequence[Prompt],
    stages: Iterable[str] = ("all",),
    force: bool = False,
    settings: Settings | None = None,
    for_memory: bool = False,
    checkpoint: Path | None = None,
) -> Bundle:
    """Quantise the engines of `stages` of a float32 ONNX Runtime bundle into the bundle `out`.

    Engines that int8 does not serve are taken over as they are. `prompts` are those that faithfulness is judged by,
    two at least; without any it is not measured. `settings` are those of the videos made for it, by default the
    bundle's with few steps. `for_memory`: layers that do not bear int8 get int8 weights, and so do all layers of an
    engine that changes the video otherwise; engines that are not faster here are judged as well, for `plans_of`.
    `checkpoint`, where it is known, tells engines of the same weights in another precision from another checkpoint's.
    Raises SettingsError for a bundle of other engines or in the place of `out` and for impossible settings, BundleError
    where one is missing or `out` cannot take the result.
    """
    if out.resolve() == floats.root.resolve():
        raise SettingsError(f"{out} is the float32 bundle that int8 is calibrated with. Choose another --out.")
    for network in networks_of(["all"]):
        entry = floats.engine(network.name)
        if entry.backend != BACKEND or entry.precision != "fp32":
            raise SettingsError(
                f"{floats.root}: {entry.name} is {entry.backend} {entry.precision}; calibration needs onnxruntime fp32."
            )
    wanted = [network.name for network in networks_of(stages)]
    settings = settings or _few_steps(Settings.from_dict(floats.manifest.defaults))
    check_run(floats, settings)
    calibration = _fingerprint(floats, settings, prompts, for_memory)
    with Bundle.writer(out) as bundle:
        pending = []
        for name in wanted:
            source = {**floats.engine(name).source, "precision": INT8, "calibration": calibration}
            reason = "--force" if force else bundle.why_stale(name, source)
            print(f"{name}: {reason or 'up to date'}", file=sys.stderr)
            if reason:
                pending.append((name, source))
        manifest, engines = floats.manifest, bundle.manifest.engines
        check_size(bundle, manifest.size, wanted)
        schedulers = {name: it for name, it in manifest.schedulers.items() if name.partition(".")[0] in wanted}
        replaced = {name: engines[name].source["weights"] for name, _ in pending if name in engines}
        others = [name for name, weights in replaced.items() if weights != floats.engine(name).source["weights"]]
        bundle.announce(
            {name for name in others if not (checkpoint and of_checkpoint(bundle, CATALOG[name], checkpoint))},
            {name: floats.tokenizer(name).read_text(encoding="utf-8") for name in TOKENIZERS if name in wanted},
            versions=manifest.versions,
            size=manifest.size,
            defaults={**manifest.defaults, **settings_of_others(bundle, wanted)},
            schedulers={**bundle.manifest.schedulers, **schedulers},
        )
        if pending:
            _build(floats, bundle, pending, settings, _Judge(floats, prompts, settings), for_memory)
        else:
            bundle.adopt()
        return Bundle(bundle.root, bundle.manifest)


def check_calibration(
    floats: Bundle, stages: Iterable[str], checkpoint: Path | None, size: tuple[int, int] | None, traced: bool = False
) -> None:
    """Raises SettingsError where a float32 bundle was made from other weights than `checkpoint` has for `stages`, or
    for another `size`; None asks for nothing. Reads all those weights.

    `traced`: nor may it be another version's, since its layers are to be found in graphs traced now, by name.
    """
    if size and size != floats.manifest.size:
        asked, was = ("{}x{}".format(*pair) for pair in (size, floats.manifest.size))
        raise SettingsError(
            f"--size {asked}: {floats.root} was built for {was}. Leave --size out, or --calibration, to build float32 "
            "engines of this size first."
        )
    if checkpoint is None:
        return
    for network in networks_of(stages):
        source, was = Source.find(network, checkpoint, "fp32"), floats.engine(network.name).source
        now = Job(source, "fp32", floats.manifest.size).made_from() if traced else source.fingerprint()
        changed = sorted(key for key in now if was.get(key) != now[key])
        if {"config", "weights"} & set(changed):
            raise SettingsError(
                f"{floats.root}: its {network.name} was not made from {checkpoint / source.where}. Give the "
                "--checkpoint that it was made from, or leave --calibration out, to build float32 engines of this one "
                "first."
            )
        if changed:
            raise SettingsError(
                f"{floats.root}: its {network.name} was built by another version (changed: {', '.join(changed)}), and "
                "its layers may have other names. Build it again, or leave --calibration out, to build float32 engines "
                "first."
            )


def _build(
    floats: Bundle,
    bundle: BundleWriter,
    pending: list[tuple[str, dict[str, str]]],
    settings: Settings,
    judge: _Judge,
    for_memory: bool,
) -> None:
    started = time.perf_counter()
    calls: dict[tuple[str, str], list[Feeds]] = {}
    for prompt in CALIBRATION_PROMPTS:
        _say(f"calibrating on {prompt!r}")
        pool = _Recording(floats)
        make_videos(pool, [Take(prompt, SEED, settings)])
        for key, kept in pool.calls.items():
            calls.setdefault(key, []).extend(kept.feeds)
    _say(f"comparing on {HELD_OUT_PROMPT!r}")
    pool = _Recording(floats)
    (reference,) = make_videos(pool, [Take(HELD_OUT_PROMPT, SEED, settings)])
    each = (time.perf_counter() - started) / len(pending)
    for name, source in pending:
        started = time.perf_counter()
        with bundle.scratch() as scratch:
            folder = scratch / name
            entry, graph = floats.engine(name), main_graph(name)
            held_out = _few_over_time(pool.calls[name, graph].feeds)
            model = ir.load(floats.path(entry.graphs[graph].plan))
            measured = measure_layers(model, calls[name, graph], scratch, name)
            tries = _modes(name, for_memory)
            for modes in tries:
                candidate, verdict = _quantized(floats, entry, measured, modes, held_out, folder)
                engines = _Swapped(floats, {name: Bundle(folder, Manifest(engines={name: candidate}))})
                (video,) = make_videos(engines, [reference], name)
                verdict = verdict.with_psnr(psnr(reference.frames, video.frames))
                if verdict.psnr_db >= LEAST_PSNR and (verdict.kept or for_memory):
                    verdict = verdict.with_faithfulness(judge.points(engines, name), judge.before)
                if _harmless(asdict(verdict)) or modes is tries[-1]:
                    break
                _say(f"{name}: {verdict.why}; now with int8 weights alone")
                shutil.rmtree(folder)
            if not verdict.kept:
                shutil.rmtree(folder)
                candidate = _copy(floats, entry, folder)
            seconds = each + time.perf_counter() - started
            candidate = replace(
                candidate,
                source=source,
                properties={**entry.properties, INT8: asdict(verdict)},
                cost={**entry.cost, "int8_s": seconds},
            )
            bundle.install(folder, candidate)
        _say(f"{name}: {'int8' if verdict.kept else 'stays float32'}, {verdict.why}")


def _quantized(
    floats: Bundle,
    entry: EngineEntry,
    measured: Mapping[str, Measured],
    modes: Sequence[Mode],
    held_out: list[Feeds],
    folder: Path,
) -> tuple[EngineEntry, Verdict]:
    """A candidate in `folder`, and whether it may be kept as far as speed and memory go."""
    name = main_graph(entry.name)
    plan = floats.path(entry.graphs[name].plan)
    by_memory = entry.name in TOKENIZERS  # text encoders run once for a video
    plans = {layer: choose(row, modes) for layer, row in measured.items()}
    others = _copy(floats, entry, folder, without=name)
    model = ir.load(plan)
    quantize.quantize(model, plans)
    written, weights = folder / f"{name}.onnx", folder / f"{name}.weights"
    compile_int8(model, written, weights)
    sqnr, speed, rows = _compare(entry.name, plan, written, held_out, predictions(entry.graphs[name].spec))
    file = file_entry(written)
    graph = GraphEntry(entry.graphs[name].spec, file, file_entry(weights), file.sha256, rows)
    candidate = replace(others, precision=INT8, graphs={**others.graphs, name: graph})
    size, was = (sum(file.bytes for file in e.files()) for e in (candidate, entry))
    if by_memory:
        kept, why = size <= MOST_BYTES * was, f"{size / was:.0%} of the bytes"
    else:
        kept, why = speed >= LEAST_SPEED, f"{speed:.2f} times float32's speed"
    if all(plan.mode == "float" for plan in plans.values()):
        kept, why = False, "no layer bears int8"
    layers = {
        layer: {"mode": plans[layer].mode, "reads": r, "writes": w, "int8_db": int8, "weights_db": weights}
        for layer, ((r, w), int8, weights) in measured.items()
    }
    return candidate, Verdict(kept, why, speed, sqnr, 0.0, None, size, was, layers)


def _modes(engine: str, for_memory: bool) -> tuple[tuple[Mode, ...], ...]:
    """What layers of an engine may be, the best first; and again, where that changes the video.

    Where memory is the reason, weights alone are worth it too. Guidance multiplies what activations lose in int8, which
    differs between its two halves.
    """
    if engine in TOKENIZERS:
        return (("weights",),)  # activations that do not bear int8
    return (("int8", "weights"), ("weights",)) if for_memory else (("int8",),)


def choose(measured: Measured, modes: Sequence[Mode]) -> LayerPlan:
    """A layer's plan: the first of `modes` that leaves enough of its output, else float."""
    ranges, int8, weights = measured
    decibels = {"int8": int8, "weights": weights}
    mode: Mode = next((mode for mode in modes if decibels[mode] >= LEAST_LAYER_SQNR), "float")
    return LayerPlan(mode, *ranges) if mode == "int8" else LayerPlan(mode)


def plans_of(bundle: Bundle) -> dict[str, dict[str, LayerPlan]]:
    """Engine -> layers as they were judged, of a bundle that `build_int8` made `for_memory`: whatever was fast on this
    machine, all engines that leave the video and its faithfulness as they were.
    """
    verdicts = {name: entry.properties.get(INT8) for name, entry in bundle.manifest.engines.items()}
    return {
        name: {
            layer: LayerPlan(row["mode"], *((row["reads"], row["writes"]) if row["mode"] == "int8" else ()))
            for layer, row in verdict["layers"].items()
        }
        for name, verdict in verdicts.items()
        if verdict and _harmless(verdict) and any(row["mode"] != "float" for row in verdict["layers"].values())
    }


def _harmless(verdict: Mapping[str, Any]) -> bool:
    """Whether an engine leaves the video and its faithfulness as they were."""
    return verdict["psnr_db"] >= LEAST_PSNR and (verdict.get("points") or 0.0) >= -MOST_LOST


def measure_layers(model: ir.Model, feeds: list[Feeds], scratch: Path, engine: str = "") -> dict[str, Measured]:
    """By layer, on calls of the full-precision graph: every layer reads what it reads there."""
    names = list(quantize.layers(model.graph))
    if not names:
        return {}
    largest = np.max(_scalars(quantize.observe(model), feeds, scratch / "observe.onnx", engine), axis=0)
    ranges = {name: (float(r), float(w)) for name, (r, w) in zip(names, largest.reshape(-1, 2), strict=True)}
    energies = np.sum(_scalars(quantize.compare(model, ranges), feeds, scratch / "compare.onnx", engine), axis=0)
    return {
        name: (ranges[name], signal_to_noise(signal, int8), signal_to_noise(signal, weights))
        for name, (signal, int8, weights) in zip(names, energies.reshape(-1, 3).tolist(), strict=True)
    }


def _scalars(model: ir.Model, feeds: list[Feeds], path: Path, engine: str) -> NDArray[np.float64]:
    """[feeds, N] of a model of `quantize.observe` or `compare`, by layer. Its files go with it: T5's have 24 GB."""
    weights = path.with_name(f"{path.name}.weights")
    ir.save(model, path, external_data=weights.name)
    runner = open_runner(BACKEND, path, "fp32", engine)
    try:
        return np.stack([runner.infer(row)["scalars"][::-1] for row in feeds]).astype(np.float64)
    finally:
        runner.close()
        for file in (path, weights):
            file.unlink(missing_ok=True)


def _compare(
    engine: str, float_plan: Path, plan: Path, feeds: list[Feeds], wanted: Sequence[str]
) -> tuple[float, float, list[dict[str, Any]]]:
    """SQNR of the outputs `wanted` in dB, speed in float32's (the faster of interleaved runs), a row per feed."""
    runners = [open_runner(BACKEND, path, p, engine) for path, p in ((float_plan, "fp32"), (plan, INT8))]
    try:
        rows, signal, noise = [], 0.0, 0.0
        for row in feeds:
            reference, actual = (runner.infer(row, wanted) for runner in runners)
            errors = [np.abs(actual[key] - reference[key]).astype(np.float64) for key in reference]
            signal += sum(float(np.square(value, dtype=np.float64).sum()) for value in reference.values())
            noise += sum(float(np.square(error).sum()) for error in errors)
            rows.append(
                {
                    "max_error": max(float(error.max()) for error in errors),
                    "mean_error": max(float(error.mean()) for error in errors),
                    "max_value": max(float(np.abs(value).max()) for value in reference.values()),
                }
            )
        rounds = [
            [_timed(lambda run=runner.infer: run(feeds[0], wanted)) for runner in runners] for _ in range(_ROUNDS)
        ]
        seconds = np.min(rounds, axis=0)
    finally:
        for runner in runners:
            runner.close()
    return signal_to_noise(signal, noise), float(seconds[0] / seconds[1]), rows


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _copy(floats: Bundle, entry: EngineEntry, folder: Path, without: str | None = None) -> EngineEntry:
    """An engine's graphs, all or less one, in a new `folder`, and its entry with paths relative to that."""
    folder.mkdir()

    def copied(file: FileEntry) -> FileEntry:
        path = floats.path(file)
        shutil.copyfile(path, folder / path.name)  # no link: onnx refuses weights that have another name, too
        return replace(file, path=path.name)

    graphs = {
        name: replace(graph, plan=copied(graph.plan), weights=copied(graph.weights) if graph.weights else None)
        for name, graph in entry.graphs.items()
        if name != without
    }
    return replace(entry, graphs=graphs)


def _fingerprint(floats: Bundle, settings: Settings, prompts: Sequence[Prompt], for_memory: bool) -> str:
    """Everything that the decisions depend on, but the machine's speed."""
    code = [path.read_bytes() for name in _CODE for path in sorted(Path(__file__).parents[1].glob(name))]
    manifest = floats.manifest
    engines = {name: (e.source, [file.sha256 for file in e.files()]) for name, e in manifest.engines.items()}
    tokenizers = {name: file.sha256 for name, file in manifest.tokenizers.items()}
    made_by = [engines, tokenizers, manifest.schedulers, settings.to_dict()]
    given = json.dumps([made_by, [asdict(prompt) for prompt in prompts], for_memory])
    return hashlib.sha256(b"".join(part.replace(b"\r\n", b"\n") for part in (*code, given.encode()))).hexdigest()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
