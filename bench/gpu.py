"""Everything that an NVIDIA card can show, in parts that fit a time: checks first, then measurements.

A part that fails or does not fit says so in the result and the next one runs. The result is written again and again:
an interrupted run keeps what it has.
"""

import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.exporter import random_checkpoint, random_folder, run_export
from bench.machine import ROOT, describe_bundle
from bench.report import NOTHING, Content, Report, Table, median, number
from bench.timing import Clock, Summary, TimeIsUp, measure, summarize
from bench.work import Setup
from engines import tensorrt
from engines.catalog import CATALOG
from engines.errors import BundleError, EngineError
from engines.gpu import find_gpus, why_no_onnxruntime
from engines.limits import processors
from engines.manifest import EngineEntry
from engines.store import Bundle
from runtime.engine import INDUCTOR, Engine, EnginePool
from runtime.noise import NoiseStream
from runtime.runner import Array, LoopStart, first_line
from runtime.sampler import denoise, guidance_scales, whole_steps
from runtime.schedulers import make_schedule
from runtime.stages.diffusion import PromptEmbeds, prompted, scheduler_of

_NOT_HERE = "not installed for this GPU, not made for it, or the second flavour of TensorRT"
PARTS = ("rates", "kernels", "engines", "e2e", "memory")


@dataclass(frozen=True)
class Part:
    """`run(clock, save)` measures; it may save what it has before it returns the whole."""

    name: str
    run: Callable[[Clock, Callable[[Content], None]], Content]


@dataclass(frozen=True)
class Plan:
    """What `python -m bench gpu` was asked for."""

    parts: Sequence[str]
    setup: Setup
    built: list[Bundle] = field(default_factory=list)  # by the engines' part of this run

    def videos_by(self) -> list[Bundle]:
        """The bundles that make videos: as asked for, else of golden size those that the engines' part has built, in
        this run or, where it is left out, before."""
        if self.setup.bundles or self.setup.size != "golden":
            return list(self.setup.bundles)
        if "engines" in self.parts:
            return self.built
        before = (_whole_bundle(_golden_folder(backend, "fp16")) for backend in backends())
        return [bundle for bundle in before if bundle]


def run_parts(parts: Sequence[Part], clock: Clock, report: Report) -> list[str]:
    """One after the other, as long as there is time; prints and writes the report. What was wrong or not done."""
    done: dict[str, Content] = {}
    state: dict[str, str] = {}

    def content() -> Content:
        rows = [[name, what] for name, what in state.items()]
        nothing: Content = ({}, (), {})
        numbers = {name: {**done.get(name, nothing)[0], "state": what} for name, what in state.items()}
        tables = [table for _, tables, _ in done.values() for table in tables]
        plots = {f"{part}-{name}": plot for part, (_, _, plots) in done.items() for name, plot in plots.items()}
        return numbers, [Table("Parts", ["part", ""], rows), *tables], plots

    def save(name: str, new: Content) -> None:
        done[name] = new
        report.save(*content())

    for part in parts:
        state[part.name] = "begun"
        start = time.monotonic()
        try:
            clock.check()
            print(f"{part.name} ...", file=sys.stderr, flush=True)
            report.save(*content())  # a crash of the process shows where it was
            done[part.name] = part.run(clock, lambda new, name=part.name: save(name, new))
            wrong = _wrong(done[part.name][0])
            state[part.name] = f"done in {number(time.monotonic() - start)} s"
            state[part.name] += f"; WRONG: {', '.join(wrong)}" if wrong else ""
        except Exception as error:  # of whatever library
            state[part.name] = f"not done: {first_line(error)}"
            print(f"{part.name}: {error}", file=sys.stderr, flush=True)
        report.save(*content())
        if lost := _empty_card():
            if state[part.name].startswith("done"):
                state[part.name] += f"; WRONG: {lost}"
            state |= {later.name: f"not done: {lost}" for later in parts if later.name not in state}
            break
    report.finish(*content())
    return [f"{name} {what}" for name, what in state.items() if not what.startswith("done") or "WRONG" in what]


def _wrong(numbers: Mapping[str, Any]) -> list[str]:
    """What of a part's result is no success: checks, and what failed to be built or run."""
    wrong = [check["what"] for check in numbers.get("checks", ()) if not check["passed"]]
    failed = [name for name, contender in numbers.get("contenders", {}).items() if contender.get("failures")]
    return [*wrong, *numbers.get("failed", ()), *failed]


def _empty_card() -> str | None:
    """Give back what a part has left on the card; why there is nothing more to be had of it in this process, if so."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:  # after an access outside of its memory, for instance
        return f"the card is lost to this process ({first_line(error)}); ask for the --parts after it by themselves"
    return None


def make_parts(plan: Plan) -> list[Part]:
    parts = (
        Part("rates", rates),
        Part("kernels", kernels),
        Part("engines", lambda clock, save: engines(clock, save, plan.built)),
        Part("e2e", lambda clock, save: e2e(plan, clock, save)),
        Part("memory", lambda clock, save: memory(plan)),
    )
    return [part for part in parts if part.name in plan.parts]


def rates(clock: Clock, save: Any) -> Content:
    """What the card gives today in matrix products."""
    from bench.work import matrix_rate

    found = {dtype: matrix_rate("cuda", dtype) for dtype in ("float16", "bfloat16")}
    rows = [[dtype, number(rate / 1e12)] for dtype, rate in found.items()]
    return {"matrix_rate_flop_per_s": found}, [Table("Matrix rate", ["type", "TFLOP/s"], rows)], {}


def kernels(clock: Clock, save: Callable[[Content], None]) -> Content:
    from bench import kernels

    def saved(sofar: Content) -> None:
        save(sofar)
        clock.check()  # a row takes seconds, most of them torch.compile's

    return kernels.run_kernels(kernels.torch_with_gpu(), "native", warmup=10, repeats=50, save=saved)


# ---- Engines against ONNX Runtime on the CPU


@dataclass(frozen=True)
class Check:
    """Two ways to one result: their largest difference over the result's largest value."""

    what: str
    difference: float
    tolerance: float
    seconds: Summary | None
    other_seconds: Summary | None

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance  # NaN fails


def engines(clock: Clock, save: Callable[[Content], None], built: list[Bundle]) -> Content:
    """Engines of golden size, of every backend that works here (of TensorRT one flavour): their graphs, and loops on
    the device. Adds what was built, in fp16, to `built`."""
    from export.parity import TOLERANCE

    checkpoint = random_checkpoint("golden", clock)
    reference = _golden_bundle(clock, checkpoint, "onnxruntime", "fp32")
    checks: list[Check] = []
    found = backends()
    missing = {name: _NOT_HERE for name in ("onnxruntime", *tensorrt.FLAVOURS) if name not in found}
    for backend in found:
        try:
            bundle = _golden_bundle(clock, checkpoint, backend, "fp16")
            built.append(bundle)
            checks += compare_bundles(bundle, reference, TOLERANCE["fp16"])
            checks += filter(None, (compare_loops(bundle, stage, TOLERANCE["fp16"]) for stage in ("base", "sr2")))
        except TimeIsUp:
            raise
        except Exception as error:  # of whatever library
            missing[backend] = first_line(error)
        save(_engines_content(checks, missing))
    return _engines_content(checks, missing)


def _engines_content(checks: Sequence[Check], missing: Mapping[str, str]) -> Content:
    def row(check: Check) -> list[str]:
        passed = "yes" if check.passed else "NO"
        times = [median(check.seconds, 1e3), median(check.other_seconds, 1e3)]
        return [check.what, f"{check.difference:.1e}", f"{check.tolerance:.1e}", passed, *times]

    rows = [row(check) for check in checks]
    rows += [[backend, NOTHING, NOTHING, f"not run: {why}", NOTHING, NOTHING] for backend, why in missing.items()]
    headers = ["what", "difference", "allowed", "passed", "ms", "other ms"]
    title = "Golden engines in fp16: graphs against ONNX Runtime on the CPU in fp32, loops on the device against none"
    numbers = {"checks": [{**asdict(check), "passed": check.passed} for check in checks], "not_run": dict(missing)}
    numbers["failed"] = [backend for backend, why in missing.items() if why != _NOT_HERE]
    return numbers, [Table(title, headers, rows)], {}


def backends() -> list[str]:
    """That may run on the card here, the slowest to build last; building says why one does not."""
    found, gpus = [], find_gpus()
    try:
        import onnxruntime

        listed = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        found += ["onnxruntime"] if listed and gpus and not why_no_onnxruntime(gpus[0]) else []
    except ImportError:
        pass
    if gpus:  # a plan for another card would be found out after minutes, when it is opened
        flavours = [flavour for flavour in tensorrt.FLAVOURS if not tensorrt.why_not_here(flavour, gpus[0])]
        found += flavours[:1]  # Polygraphy serves one of them in a process
    return found + ([INDUCTOR] if tensorrt.installed_version("torch") else [])


def _golden_folder(backend: str, precision: str) -> Path:
    return ROOT / "build" / f"gpu-{backend}-{precision}"


def _whole_bundle(folder: Path) -> Bundle | None:
    """None where there is none, nor one that can be used, which is said."""
    if not folder.exists():
        return None
    try:
        bundle = Bundle.open(folder)
        if missing := CATALOG.keys() - bundle.manifest.engines.keys():
            raise BundleError(f"{folder}: without {', '.join(sorted(missing))}; its build did not end.")
    except BundleError as error:
        print(f"left out: {error}", file=sys.stderr, flush=True)
        return None
    return bundle


def _golden_bundle(clock: Clock, checkpoint: Path, backend: str, precision: str) -> Bundle:
    out = _golden_folder(backend, precision)
    options = ["--engine", backend, "--precision", precision]
    if backend == INDUCTOR:  # timing candidates takes too long here; networks this small fit on any card together
        options += ["--no-autotune", "--jobs", str(processors())]
    # The reference is compared with torch as it is built: on the CPU, too.
    hidden = {"CUDA_VISIBLE_DEVICES": "-1"} if precision == "fp32" else {}
    run_export("build", "--checkpoint", checkpoint, *options, "--out", out, clock=clock, **hidden)
    return Bundle.open(out)


def compare_bundles(bundle: Bundle, reference: Bundle, tolerance: float) -> list[Check]:
    """Every graph of `bundle` on seeded inputs against the same graph of `reference` on ONNX Runtime's CPU."""
    checks = []
    with EnginePool(bundle) as pool:
        for name, entry in bundle.manifest.engines.items():
            expected = reference.engine(name)
            context: dict[str, Array] = {}
            with pool.use(name) as engine:
                for graph in sorted(entry.graphs):  # a context before its step, which takes its results
                    feeds = {**_inputs(expected, graph), **context}
                    wanted, cpu = _on_cpu(reference, expected, graph, feeds)
                    given, seconds = _on_backend(engine, graph, feeds)
                    what = f"{entry.backend} {name}/{graph}"
                    checks.append(Check(what, _difference(given, wanted), tolerance, seconds, cpu))
                    if graph == "context":  # of all graphs after it: shallow comes before step
                        context = wanted
    return checks


def _difference(given: Mapping[str, Array], wanted: Mapping[str, Array]) -> float:
    """The largest over the largest value; NaN where either is."""
    pairs = [(given[name], wanted[name]) for name in given]
    return float(np.max([np.abs(a - b).max() / max(np.abs(b).max(), 1e-6) for a, b in pairs]))


def _inputs(entry: EngineEntry, graph: str) -> dict[str, Array]:
    """Seeded inputs of a small size: two texts of 7 tokens, three frames."""
    spec = entry.graphs[graph].spec
    wanted = {"batch": 2, "tokens": 7, "frames": 3}
    sizes = {name: axis.nearest(wanted.get(name, 2 * axis.min)) for name, axis in spec.profile.items()}
    random = np.random.default_rng(0)
    made: dict[str, Array] = {}
    for binding in spec.inputs:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in binding.axes]
        if binding.dtype == "int64":
            made[binding.name] = np.ones(shape, np.int64)
        elif binding.name in ("timestep", "noise_level"):
            made[binding.name] = np.linspace(20, 900, shape[0], dtype=np.float32)
        else:
            made[binding.name] = random.standard_normal(shape, np.float32)
    return made


def _on_cpu(
    bundle: Bundle, entry: EngineEntry, graph: str, feeds: Mapping[str, Array]
) -> tuple[dict[str, Array], Summary | None]:
    """Whatever other providers are there."""
    from runtime.runner_ort import ort, session_options

    compiled = entry.graphs[graph]
    plan = str(bundle.path(compiled.plan))
    session = ort.InferenceSession(plan, session_options(), providers=["CPUExecutionProvider"])
    names = [binding.name for binding in compiled.spec.outputs]
    typed = {b.name: np.asarray(feeds[b.name], b.dtype) for b in compiled.spec.inputs}
    return _timed(lambda: dict(zip(names, session.run(names, typed), strict=True)))


def _on_backend(engine: Engine, graph: str, feeds: Mapping[str, Array]) -> tuple[dict[str, Array], Summary | None]:
    return _timed(lambda: {name: array.copy() for name, array in engine.run(graph, **feeds).items()})


def _timed(call: Callable[[], Any], repeats: int = 5) -> tuple[Any, Summary | None]:
    timed = measure(call, 1, repeats)
    return timed[-1].result, summarize([one.seconds for one in timed])


def compare_loops(bundle: Bundle, stage: str, tolerance: float, steps: int = 8) -> Check | None:
    """A denoising loop on the device, one CUDA graph per kind of step, against the sampler's own over single calls.

    Every second step is shallow. None where the backend offers no such loop. base and sr2: stages without a condition.
    """
    spec = bundle.engine(stage).graphs["step"].spec
    profile = spec.profile
    channels = spec.outputs[0].axes[1]
    assert isinstance(channels, int)
    schedule = make_schedule(scheduler_of(bundle, stage), steps)
    noise = NoiseStream(0)
    x = noise.normal((1, channels, 3, 2 * profile["height"].min, 2 * profile["width"].min))
    text = np.random.default_rng(0).standard_normal((2, 1, 77, bundle.engine(stage).properties["text_dim"]), np.float32)
    with EnginePool(bundle) as pool, pool.use(stage) as engine:
        unet = prompted(engine, PromptEmbeds(*text), guidance_scale=4)
        guidance = guidance_scales(steps, 4)
        if unet.start_loop(LoopStart(x, schedule, guidance, whole_steps(guidance, 2), None)) is None:
            return None
        run = partial(denoise, x=x, schedule=schedule, guidance_scale=4, cache_interval=2)
        ways = (unet, lambda *arguments, **keywords: unet(*arguments, **keywords))  # a function has no loop of its own
        (given, seconds), (wanted, other) = (
            _timed(lambda way=way: run(way, noise=NoiseStream(0)).copy()) for way in ways
        )
    difference = _difference({"x": given}, {"x": wanted})
    what = f"{bundle.engine(stage).backend} {stage}: loop of {steps} steps"
    return Check(what, difference, tolerance, seconds, other)


# ---- Whole videos


def e2e(plan: Plan, clock: Clock, save: Callable[[Content], None]) -> Content:
    from bench import e2e

    golden = random_folder("golden")  # if a part has made it: there is no time for it here
    checkpoint = plan.setup.checkpoint or (golden if plan.setup.size == "golden" and golden.is_dir() else None)
    setup = replace(plan.setup, bundles=plan.videos_by(), checkpoint=checkpoint)
    made_by = {"bundles": [describe_bundle(bundle) for bundle in setup.bundles]}

    def content(result: e2e.Result) -> Content:
        return {**made_by, **result.to_json()}, result.tables(), result.plots()

    def said(what: str, result: e2e.Result) -> None:
        print(what, file=sys.stderr, flush=True)
        save(content(result))
        clock.check()

    return content(e2e.run_e2e(setup, said, lambda: clock.left() > 0))


def memory(plan: Plan) -> Content:
    from bench import memory

    bundles = plan.videos_by()
    if not bundles:
        raise EngineError("there is no bundle to make a video with: give --bundle, or --parts engines,memory.")
    result = memory.run_memory(bundles[0], plan.setup.settings, plan.setup.seed)
    return {"bundle": describe_bundle(bundles[0]), **result.to_json()}, [result.table()], {"time": result.plot()}
