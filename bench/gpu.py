"""Everything that an NVIDIA card can show, in parts that fit a time: checks first, then measurements.

A part that fails or does not fit says so in the result and the next one runs; the result is written after every part.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import ROOT
from bench.report import NOTHING, Plot, Report, Table, median, number
from bench.timing import Summary, summarize
from engines import tensorrt
from engines.errors import EngineError, Show1Error
from engines.manifest import EngineEntry, GraphEntry
from engines.store import Bundle
from runtime.config import Settings
from runtime.runner import Array, Runner, open_runner

PARTS = ("rates", "kernels", "engines", "graphs", "e2e", "memory")
GRAPH_SWITCH = "use_cuda_graph"  # what a runner that can do both lets itself be told
Parts = tuple[Mapping[str, Any], Sequence[Table], Mapping[str, Plot]]


@dataclass(frozen=True)
class Part:
    """`minutes` is how long it may need: with less left it is not begun."""

    name: str
    minutes: float
    run: Callable[[], Parts]


@dataclass
class Plan:
    """What `python -m bench gpu` was asked for. Without bundles, e2e measures the baselines alone."""

    parts: Sequence[str]
    minutes: float
    size: str
    bundles: Sequence[Bundle]
    checkpoint: Path | None
    settings: Settings = field(default_factory=Settings)


def run_parts(parts: Sequence[Part], minutes: float, report: Report) -> None:
    """Run what fits into `minutes`; the report is saved after every part and printed at the end."""
    end = time.monotonic() + 60 * minutes
    numbers: dict[str, Any] = {}
    tables: list[Table] = []
    plots: dict[str, Plot] = {}
    for part in parts:
        left = (end - time.monotonic()) / 60
        if left < part.minutes:
            numbers[part.name] = {"left_out": f"{left:.1f} minutes left, may need {part.minutes:g}"}
        else:
            print(f"{part.name} ...", file=sys.stderr, flush=True)
            start = time.monotonic()
            try:
                result, new_tables, new_plots = part.run()
                numbers[part.name] = {**result, "seconds": round(time.monotonic() - start, 1)}
                tables += new_tables
                plots |= new_plots
            except Show1Error as error:
                numbers[part.name] = {"error": str(error)}
                print(f"{part.name}: {error}", file=sys.stderr, flush=True)
        report.save(numbers, [*tables, _summary(numbers)], plots)
    report.finish(numbers, [*tables, _summary(numbers)], plots)


def _summary(numbers: Mapping[str, Mapping[str, Any]]) -> Table:
    def state(part: Mapping[str, Any]) -> str:
        return f"failed: {part['error']}" if "error" in part else part.get("left_out") or f"done in {part['seconds']} s"

    return Table("Parts", ["part", ""], [[name, state(part)] for name, part in numbers.items()])


def make_parts(plan: Plan) -> list[Part]:
    parts = [
        Part("rates", 0.2, rates),
        Part("kernels", 3, kernels),
        Part("engines", 3, engines),
        Part("graphs", 1, graphs),
        Part("e2e", 3, lambda: e2e(plan)),
        Part("memory", 1, lambda: memory(plan)),
    ]
    return [part for part in parts if part.name in plan.parts]


def rates() -> Parts:
    """What the card gives today: matrix products and a large copy."""
    from bench.work import matrix_rate

    found = {f"{dtype}_flop_per_s": round(matrix_rate("cuda", dtype)) for dtype in ("float16", "bfloat16")}
    rows = [[name.partition("_")[0], number(rate / 1e12)] for name, rate in found.items()]
    return found, [Table("Matrix rate", ["type", "TFLOP/s"], rows)], {}


def kernels() -> Parts:
    from bench import kernels

    return kernels.run_kernels(kernels.torch_with_gpu(), "native", warmup=10, repeats=50)


# ---- Engines against ONNX Runtime on the CPU


@dataclass(frozen=True)
class Check:
    """One graph of one engine: largest difference from the CPU's result over the latter's largest value."""

    graph: str
    backend: str
    difference: float
    tolerance: float
    call: Summary | None

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance  # NaN fails


def engines() -> Parts:
    """Golden-size engines of every backend that works here against ONNX Runtime on the CPU in float32."""
    from export.parity import TOLERANCE

    checkpoint = ROOT / "build" / "random-golden"
    if not checkpoint.is_dir():
        _export("random-checkpoint", "--size", "golden", "--out", str(checkpoint))
    reference = Bundle.open(_golden_bundle(checkpoint, "onnxruntime", "fp32"))
    checks: list[Check] = []
    failed: dict[str, str] = {}
    for backend in backends():
        try:
            bundle = Bundle.open(_golden_bundle(checkpoint, backend, "fp16"))
            checks += compare_bundles(bundle, reference, TOLERANCE["fp16"])
        except Show1Error as error:
            failed[backend] = str(error)
    rows = [
        [f"{c.backend} {c.graph}", f"{c.difference:.1e}", f"{c.tolerance:.1e}", _yes(c.passed), median(c.call, 1e3)]
        for c in checks
    ]
    rows += [[backend, NOTHING, NOTHING, reason, NOTHING] for backend, reason in failed.items()]
    numbers = {"checks": [{**vars(c), "call": vars(c.call) if c.call else None} for c in checks], "not_run": failed}
    headers = ["graph", "difference", "allowed", "passed", "ms"]
    return numbers, [Table("Golden engines in fp16 against ONNX Runtime on the CPU", headers, rows)], {}


def _yes(passed: bool) -> str:
    return "yes" if passed else "NO"


def backends() -> list[str]:
    """That may run on the card here; building says why one does not."""
    import importlib.util

    found = []
    if importlib.util.find_spec("runtime.runner_inductor"):
        found.append("inductor")
    try:
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            found.append("onnxruntime")
    except ImportError:
        pass
    return [*found, *(flavour for flavour in tensorrt.FLAVOURS if tensorrt.installed_version(flavour))]


def _golden_bundle(checkpoint: Path, backend: str, precision: str) -> Path:
    out = ROOT / "build" / f"gpu-{backend}-{precision}"
    options = ("--engine", backend, "--precision", precision, "--out", str(out))
    _export("build", "--checkpoint", str(checkpoint), *options)
    return out


def _export(*options: str) -> None:
    """In a process of its own, which takes its memory on the card along."""
    done = subprocess.run([sys.executable, "-m", "export", *options], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise EngineError(done.stderr.strip().rpartition("\n")[2] or f"`python -m export {options[0]}` failed.")


def compare_bundles(bundle: Bundle, reference: Bundle, tolerance: float) -> list[Check]:
    """Every graph of `bundle` on seeded inputs against the same graph of `reference` on ONNX Runtime's CPU."""
    checks = []
    for name, entry in bundle.manifest.engines.items():
        expected = reference.engine(name)
        context: dict[str, Array] = {}
        for graph in ("encode", "decode", "context", "step"):
            if graph not in entry.graphs:
                continue
            feeds = {**_inputs(expected, graph), **context}
            with _cpu_runner(reference, expected.graphs[graph]) as session:
                wanted = session(feeds)
            context = wanted if graph == "context" else {}
            checks.append(_check(bundle, entry, graph, feeds, wanted, tolerance))
    return checks


def _check(
    bundle: Bundle,
    entry: EngineEntry,
    graph: str,
    feeds: Mapping[str, Array],
    wanted: Mapping[str, Array],
    tolerance: float,
) -> Check:
    compiled = entry.graphs[graph]
    runner = open_runner(entry.backend, bundle.path(compiled.plan))
    try:
        typed = {b.name: np.asarray(feeds[b.name], b.dtype) for b in compiled.spec.inputs}
        given = runner.infer(typed)
        pairs = [(given[name].astype(np.float32), wanted[name]) for name in given]
        difference = max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6)) for a, b in pairs)
        return Check(f"{entry.name}/{graph}", entry.backend, difference, tolerance, _time(lambda: runner.infer(typed)))
    finally:
        runner.close()


def _time(call: Callable[[], Any], repeats: int = 5) -> Summary | None:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return summarize(times)


def _inputs(entry: EngineEntry, graph: str) -> dict[str, Array]:
    """Seeded inputs of two clips of three frames; context outputs are the caller's."""
    spec = entry.graphs[graph].spec
    profile = spec.profiles["default"]
    sizes = {name: {"batch": 2, "tokens": 7, "frames": 3}.get(name, 2 * axis.min) for name, axis in profile.items()}
    sizes = {name: min(max(size, profile[name].min), profile[name].max) for name, size in sizes.items()}
    random = np.random.default_rng(0)
    made: dict[str, Array] = {}
    for binding in spec.inputs:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in binding.axes]
        if binding.dtype == "int64":
            made[binding.name] = np.ones(shape, np.int64)
        elif binding.name in ("timestep", "noise_level"):
            made[binding.name] = np.linspace(20, 900, shape[0], dtype=np.float32)
        else:
            made[binding.name] = random.standard_normal(shape, np.float32).astype(binding.dtype)
    return made


class _cpu_runner:
    """A graph on ONNX Runtime's CPU, whatever other providers are there: `with _cpu_runner(...) as run: run(feeds)`."""

    def __init__(self, bundle: Bundle, graph: GraphEntry):
        from runtime.runner_ort import ort

        self._session = ort.InferenceSession(str(bundle.path(graph.plan)), providers=["CPUExecutionProvider"])
        self._spec = graph.spec

    def __enter__(self) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
        names = [output.name for output in self._spec.outputs]

        def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
            typed = {b.name: np.asarray(feeds[b.name], b.dtype) for b in self._spec.inputs}
            return dict(zip(names, self._session.run(names, typed), strict=True))

        return run

    def __exit__(self, *_: object) -> None:
        del self._session


# ---- Graph against no graph


def graphs(device: str = "cuda", networks: Sequence[str] = ("base", "sr1", "sr2")) -> Parts:
    """Steps of our own torch modules at golden size, launched one by one and replayed as one CUDA graph."""
    import torch

    from bench.timing import measure_gpu
    from engines.catalog import CATALOG
    from export import networks as loading
    from export.random_checkpoint import random_checkpoint

    checkpoint = ROOT / "build" / "random-golden"
    if not checkpoint.is_dir():
        random_checkpoint(checkpoint)
    rows, numbers = [], {}
    for name in networks:
        source = loading.Source.find(CATALOG[name], checkpoint, "fp16")
        step = loading.load(source, "fp16" if device == "cuda" else "fp32", (576, 320)).graphs[1]
        profile = step.spec.profiles["default"]
        sizes = {axis: limits.opt for axis, limits in profile.items()}
        if device == "cpu":
            sizes |= {"frames": 2, "height": profile["height"].min, "width": profile["width"].min}
        inputs = [x.to(device) for x in step.example(sizes, torch.Generator().manual_seed(0))]
        module = step.module.to(device)
        with torch.no_grad():
            row = compare_graph(lambda module=module, inputs=inputs: module(*inputs), device, measure_gpu)
        numbers[name] = row
        rows.append([name, f"{row['difference']:.1e}", number(1e3 * row["plain_s"]), number(1e3 * row["graph_s"])])
        rows[-1].append(number(row["plain_s"] / row["graph_s"]))
        if not row["difference"] == 0:  # NaN fails too
            raise EngineError(f"{name}: a replayed graph differs by {row['difference']:.3g} from the same launches.")
    headers = ["step of", "difference", "launched ms", "graph ms", "launched / graph"]
    return numbers, [Table("Graph against no graph: torch modules, golden size", headers, rows)], {}


def compare_graph(
    call: Callable[[], Sequence[Any]], device: str, measure: Callable[..., list[float]]
) -> dict[str, float]:
    """Largest difference between plain launches and a replay, and the median seconds of both."""
    import torch

    plain = [output.clone() for output in call()]
    if device == "cuda":
        captured = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            call()  # allocations of a first call do not belong into a graph
        torch.cuda.synchronize()
        with torch.cuda.graph(captured):
            outputs = call()
        captured.replay()
        torch.cuda.synchronize()
    else:
        outputs = call()
    difference = max(float((a.float() - b.float()).abs().max()) for a, b in zip(plain, outputs, strict=True))
    times = {f"{kind}_s": summarize(measure(call, 3, 10, graph=kind == "graph")) for kind in ("plain", "graph")}
    return {"difference": difference, **{name: summary.median for name, summary in times.items() if summary}}


def compare_runner_graph(runner: Runner, feeds: Mapping[str, Array]) -> dict[str, float] | None:
    """The same of a backend's runner, if it lets itself be switched; else None."""
    if not hasattr(runner, GRAPH_SWITCH):
        return None
    results: dict[bool, tuple[dict[str, Array], Summary | None]] = {}
    before = getattr(runner, GRAPH_SWITCH)
    try:
        for switched in (False, True):
            setattr(runner, GRAPH_SWITCH, switched)
            outputs = {name: array.copy() for name, array in runner.infer(feeds).items()}
            results[switched] = (outputs, _time(lambda: runner.infer(feeds)))
    finally:
        setattr(runner, GRAPH_SWITCH, before)
    plain, graph = results[False], results[True]
    assert plain[1] and graph[1]
    difference = max(float(np.abs(plain[0][name] - graph[0][name]).max()) for name in plain[0])
    return {"difference": difference, "plain_s": plain[1].median, "graph_s": graph[1].median}


# ---- Whole videos


def e2e(plan: Plan) -> Parts:
    from bench import e2e

    kinds = [kind for kind in e2e.BASELINES if e2e.is_installed(kind)]
    setup = e2e.Setup(plan.size, plan.checkpoint, plan.bundles, plan.settings, e2e.STAGES, kinds, seed=345, repeats=3)
    result = e2e.run_e2e(setup, lambda what, _: print(what, file=sys.stderr, flush=True))
    return result.to_json(), result.tables(), result.plots()


def memory(plan: Plan) -> Parts:
    from bench import memory

    if not plan.bundles:
        raise EngineError("no bundle to make a video with: give --bundle.")
    result = memory.run_memory(plan.bundles[0], plan.settings, seed=345)
    return result.to_json(), [result.table()], {"memory": result.plot()}
