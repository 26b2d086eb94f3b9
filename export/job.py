"""One engine to build: what by and for, what it is made from and will need, and how it is made."""

import contextlib
import gc
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from engines import compile_ort, compile_trt, tensorrt
from engines.catalog import CATALOG, TEXT_ENCODERS, TOKENIZERS
from engines.compile_trt import DetachedModel, Report
from engines.errors import SettingsError
from engines.gpu import NO_BF16, TURING, find_gpus
from engines.manifest import EngineEntry, GraphEntry
from engines.memory import GIB, peak_memory
from engines.quantize import LayerPlan, main_graph, quantize
from engines.spec import INT8, PRECISIONS, WEIGHT_BYTES, GraphSpec
from engines.store import file_entry
from export import networks
from export.networks import Graph, LoadedNetwork, Source
from export.parity import BF16_TOLERANCE, SEED, DetachedRunner, check_parity, example_sizes, in_float32, package_sizes
from export.to_inductor import compile_inductor
from export.to_onnx import trace
from runtime.config import stage_sizes
from runtime.engine import INDUCTOR, open_runner, why_not_half
from runtime.kernels import ABI
from runtime.runner import Runner
from runtime.runner_inductor import target, torch_version, why_idle

ORT_PACKAGES = ("onnxruntime", "onnxruntime-gpu")  # either brings ONNX Runtime
_LIBRARIES = 1.5 * GIB  # bytes that a process holds before it has loaded a weight


def tuned_for(size: tuple[int, int]) -> dict[str, str]:
    """What a video's size is to every network, as its engine's `source` says it: nothing to text encoders."""
    sizes = stage_sizes(size)
    return {name: str(None if name in TOKENIZERS else sizes[network.stage]) for name, network in CATALOG.items()}


@dataclass(frozen=True)
class Backend:
    """What engines are compiled by and for: "onnxruntime", "tensorrt-rtx", "tensorrt" or "inductor".

    `targets` are TensorRT's cards, or the one machine that inductor compiles for; `attention` (see
    `compile_trt.prepare`) is TensorRT's, `autotune` inductor's on a GPU.
    """

    name: str = compile_ort.BACKEND
    targets: tuple[str, ...] = ()
    attention: str = "fused"
    autotune: bool = True

    @classmethod
    def choose(
        cls, name: str, precision: str, targets: Sequence[str] = (), attention: str = "fused", autotune: bool = True
    ) -> "Backend":
        """Checked settings; "auto" for what runs best here. Raises SettingsError, EngineError if it is not usable."""
        if precision not in PRECISIONS:
            raise SettingsError(f"precision {precision!r}; allowed: {', '.join(PRECISIONS)}.")
        if name == "auto":
            name, why = tensorrt.choose_backend()
            print(f"engine: {name} ({why})", file=sys.stderr)
        if name in tensorrt.FLAVOURS:
            tensorrt.load(name)
            return cls(name, tensorrt.check_targets(name, targets, precision), attention)
        if name == INDUCTOR:
            if targets:
                raise SettingsError(f"--target {','.join(targets)}: inductor compiles for this machine; leave it out.")
            here, gpus = target(), find_gpus()
            if gpus and (reason := why_idle(gpus[0])):
                print(f"warning: {reason}. Building for the CPU, {here}", file=sys.stderr)
            if here == TURING and precision == "bf16":
                raise SettingsError(NO_BF16)
            # On a CPU nothing is timed. On Turing, Triton's kernels, the candidates, leave matrix units alone (3.7.1).
            return cls(name, (here,), autotune=here.startswith("cpu") or (autotune and here != TURING))
        if name != compile_ort.BACKEND:
            allowed = ("auto", compile_ort.BACKEND, *tensorrt.FLAVOURS, INDUCTOR)
            raise SettingsError(f"engine {name!r}; allowed: {', '.join(allowed)}.")
        if targets:
            raise SettingsError(f"--target {','.join(targets)} is for tensorrt-rtx; onnxruntime has no targets.")
        if precision == "bf16":
            raise SettingsError(
                "ONNX Runtime has few kernels for bf16: use --precision fp16, or --engine tensorrt-rtx."
            )
        from runtime.runner_ort import check_card  # ONNX Runtime: other backends do without

        check_card()
        if precision == "fp16" and (reason := why_not_half()):
            raise SettingsError(f"{reason}: use --precision fp32.")
        return cls(name)

    @classmethod
    def of(cls, entry: EngineEntry) -> "Backend":
        """What an engine was built by, as `Job.made_from` wrote it down."""
        source = entry.source
        return cls(entry.backend, entry.targets, source.get("attention", "fused"), "autotune" not in source)

    @property
    def version(self) -> str:
        if self.name == INDUCTOR:
            return torch_version()
        packages = ORT_PACKAGES if self.name == compile_ort.BACKEND else (self.name,)
        return next(filter(None, map(tensorrt.installed_version, packages)), "")


@dataclass(frozen=True)
class Job:
    """One engine to build. `layers` are to be quantised in its main graph (`export.int8`); TensorRT only."""

    source: Source
    precision: str
    size: tuple[int, int]
    backend: Backend = Backend()
    keep_variance: bool = False
    keep_onnx: bool = False
    layers: Mapping[str, LayerPlan] | None = None

    @property
    def name(self) -> str:
        return self.source.network.name

    @property
    def weight_bytes(self) -> int:
        return self.source.parameters * WEIGHT_BYTES[self.precision]

    @property
    def disk(self) -> float:
        """Bytes that its files will take, about."""
        kernels = 0 if self.backend.name == compile_ort.BACKEND else 64 * 2**20  # what plans hold beside the weights
        copies = 2 if self.keep_onnx or self.backend.name == INDUCTOR else 1  # inductor's library, then its package
        return self.weight_bytes * copies * 1.02 + kernels

    @property
    def memory(self) -> float:
        """Bytes that its process will need, libraries included; pages of the checkpoint that can be dropped are not."""
        # Module, graph, file, session; builder and plan; of inductor an estimate: module, constants, library, package.
        copies = {compile_ort.BACKEND: 4, INDUCTOR: 4}.get(self.backend.name, 2)
        if self.backend.name == compile_ort.BACKEND and self.name in TEXT_ENCODERS:
            copies = 1  # the module's, of a checkpoint in another precision: the session reads the file
        return _LIBRARIES + copies * self.weight_bytes

    @property
    def seconds(self) -> float:
        """About how long it will take, in seconds of two idle cores: tracing goes by layers, compilation by both."""
        layers = self.source.tensors
        if self.backend.name == INDUCTOR:  # its compiler's time goes by layers too
            return 5 + 0.3 * layers
        compilation = 0.0 if self.backend.name == compile_ort.BACKEND else 0.03 * layers + 4 * self.weight_bytes / GIB
        return 2 + 0.08 * layers + compilation

    def made_from(self) -> dict[str, str]:
        """Everything the engine depends on. When one of these changes, it is stale."""
        made_from = {
            **self.source.fingerprint(),
            "learned_variance": str(self.source.learned_variance),
            "precision": self.precision,
            "size": tuned_for(self.size)[self.name],
            "exporter": _exporter_hash(self.backend.name),
            "backend": self.backend.name,
        }
        if self.backend.name != INDUCTOR:
            # Less what says for which devices a wheel is: +cpu, +cu130.
            made_from |= {name: version(name).partition("+")[0] for name in ("torch", "onnxscript", "onnx-ir")}
        if self.backend.name != compile_ort.BACKEND:  # ONNX Runtime reads what its older versions were given
            made_from |= {"backend version": self.backend.version, "targets": " ".join(self.backend.targets)}
        if self.backend.name in tensorrt.FLAVOURS:
            made_from["attention"] = self.backend.attention
        if self.backend.name == INDUCTOR:
            made_from["kernels"] = str(ABI)
        if not self.backend.autotune:
            made_from["autotune"] = "no"
        if self.layers:
            layers = json.dumps({name: asdict(plan) for name, plan in self.layers.items()})
            made_from |= {"precision": INT8, "layers": hashlib.sha256(layers.encode()).hexdigest()}
        return made_from


def build_engine(job: Job, folder: Path, report: Report = lambda _: None) -> EngineEntry:
    """Load, trace, compare and compile one network into `folder`; file paths in the entry are relative to it."""
    made_from = job.made_from()  # before anything is read: what changes from now on makes the engine stale
    build = {compile_ort.BACKEND: _build_for_ort, INDUCTOR: _build_packages}.get(job.backend.name, _build_plans)
    seconds = {"export_s": 0.0, "parity_s": 0.0, "compile_s": 0.0}
    properties, graphs = build(job, folder, report, seconds)
    cost = {"parameters": job.source.parameters, **seconds, "peak_bytes": peak_memory()}
    return EngineEntry(
        job.name,
        job.backend.name,
        job.backend.version,
        INT8 if job.layers else job.precision,
        job.backend.targets,
        made_from,
        properties,
        graphs,
        cost,
    )


Seconds = dict[str, float]
Built = tuple[dict[str, Any], dict[str, GraphEntry]]  # properties, graphs


@contextlib.contextmanager
def _timed(seconds: Seconds, kind: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[kind] += time.perf_counter() - start


def _load(job: Job, report: Report, seconds: Seconds) -> LoadedNetwork:
    report("loading")
    with _timed(seconds, "export_s"):
        return networks.load(job.source, job.precision, job.size, job.keep_variance)


def _trace(graph: Graph, report: Report, seconds: Seconds) -> ir.Model:
    report(f"tracing {graph.spec.name}")
    with _timed(seconds, "export_s"):
        example = graph.example(example_sizes(graph.spec), torch.Generator().manual_seed(SEED))
        return trace(graph.module, graph.spec, example)


def _compare(
    job: Job,
    graph: Graph,
    runner: Runner,
    report: Report,
    seconds: Seconds,
    sizes: list[dict[str, int]] | None = None,
    tolerance: float | None = None,
) -> list[dict[str, float]]:
    """`check_parity`; closes `runner`."""
    report(f"comparing {graph.spec.name}")
    try:
        with _timed(seconds, "parity_s"):
            return check_parity(graph, job.name, runner, job.precision, sizes, tolerance)
    finally:
        runner.close()


def _build_packages(job: Job, folder: Path, report: Report, seconds: Seconds) -> Built:
    """What inductor makes is compared itself, on the device that it is for."""
    loaded, entries = _load(job, report, seconds), {}
    (target,) = job.backend.targets
    for graph in loaded.graphs:
        name, package = graph.spec.name, folder / f"{graph.spec.name}.pt2"
        report(f"compiling {name}")
        with _timed(seconds, "compile_s"):
            compile_inductor(graph, package, target, job.backend.autotune)
        runner = open_runner(INDUCTOR, package, job.precision, job.name)
        tolerance = BF16_TOLERANCE if job.precision == "bf16" else None
        parity = _compare(job, graph, runner, report, seconds, package_sizes(graph.spec), tolerance)
        file = file_entry(package)
        entries[name] = GraphEntry(graph.spec, file, None, file.sha256, parity)
    return {**loaded.properties, "kernels": ABI}, entries


def _build_for_ort(job: Job, folder: Path, report: Report, seconds: Seconds) -> Built:
    """The files that ONNX Runtime will open are compared."""
    loaded, entries = _load(job, report, seconds), {}
    for graph in loaded.graphs:
        plan, weights = _onnx_files(folder, graph.spec)
        model = _trace(graph, report, seconds)
        with _timed(seconds, "compile_s"):
            compile_ort.compile_ort(model, plan, weights)
        runner = open_runner(job.backend.name, plan, job.precision, job.name)
        parity = _compare(job, graph, runner, report, seconds)
        file, beside = file_entry(plan), file_entry(weights) if weights.exists() else None
        entries[graph.spec.name] = GraphEntry(graph.spec, file, beside, file.sha256, parity)
    return loaded.properties, entries


def _build_plans(job: Job, folder: Path, report: Report, seconds: Seconds) -> Built:
    """Plans of TensorRT need a card to run: what is compared is the graph that the builder is given."""
    loaded = _load(job, report, seconds)  # here, where it is let go before compilation
    specs, properties = [graph.spec.narrowed() for graph in loaded.graphs], loaded.properties
    models: dict[str, DetachedModel] = {}
    parity = {}
    for graph in loaded.graphs:
        name, (plan, weights) = graph.spec.name, _onnx_files(folder, graph.spec)
        model = _trace(graph, report, seconds)
        if job.layers and name == main_graph(job.name):
            quantized = model.clone()
            quantize(quantized, job.layers)
            models[name] = _detached(job, quantized, plan, weights)
            compared = _detached(job, model)  # inputs at random are not calibrated for
        else:
            models[name] = compared = _detached(job, model, plan, weights)
        runner = DetachedRunner(in_float32(compared) if job.precision == "bf16" else compared)
        parity[name] = _compare(job, graph, runner, report, seconds)

    del loaded, graph, model, compared, runner  # what the module holds beside the weights' pages
    gc.collect()
    entries = {}
    for spec in specs:
        detached, plan = models.pop(spec.name), folder / f"{spec.name}.plan"
        with _timed(seconds, "compile_s"):
            compile_trt.compile_trt(
                job.backend.name,
                detached,
                spec,
                plan,
                job.backend.targets,
                lambda phase, name=spec.name: report(f"compiling {name}: {phase}"),
            )
        entries[spec.name] = GraphEntry(spec, file_entry(plan), None, detached.sha256, parity[spec.name])
    return properties, entries


def _detached(job: Job, model: ir.Model, plan: Path | None = None, weights: Path | None = None) -> DetachedModel:
    """A traced model made ready for TensorRT; written to `plan` first where ONNX files are kept."""
    compile_trt.prepare(model, job.precision, job.backend.attention)
    if job.keep_onnx and plan and weights:
        ir.save(model, plan, external_data=weights.name)
    return compile_trt.detach_weights(model)


def _onnx_files(folder: Path, spec: GraphSpec) -> tuple[Path, Path]:
    return folder / f"{spec.name}.onnx", folder / f"{spec.name}.weights"


def _exporter_hash(backend: str) -> str:
    """The code that decides what is in an engine."""
    here = Path(__file__).parent
    files = [*sorted((here / "modules").glob("*.py"))]
    files += [here / name for name in ("checkpoint.py", "to_onnx.py", "networks.py")]
    compilers = {compile_ort.BACKEND: ("passes.py", "spec.py", "compile_ort.py"), INDUCTOR: ("spec.py",)}
    compiler = compilers.get(backend, ("passes.py", "spec.py", "compile_trt.py", "quantize.py"))
    files += [here.parent / "engines" / name for name in ("catalog.py", *compiler)]
    if backend == INDUCTOR:
        files += [here / "to_inductor.py", here.parent / "runtime" / "runner_inductor.py"]
    return hashlib.sha256(b"".join(path.read_bytes().replace(b"\r\n", b"\n") for path in files)).hexdigest()
