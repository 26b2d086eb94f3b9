"""`export build`: from checkpoint folders to a bundle of engines, rebuilding only what changed."""

import contextlib
import gc
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import accumulate
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from tqdm import tqdm

from engines import compile_ort, compile_trt, tensorrt
from engines.catalog import TEXT_ENCODERS, TOKENIZERS, Network, networks_of
from engines.compile_trt import DetachedModel, Report
from engines.errors import BundleError, CheckpointError, SettingsError
from engines.gpu import NO_BF16, TURING, find_gpus
from engines.limits import available_memory, processors
from engines.manifest import EngineEntry, GraphEntry
from engines.memory import peak_memory
from engines.quantize import LayerPlan, main_graph, quantize
from engines.spec import INT8, PRECISIONS, WEIGHT_BYTES, GraphSpec
from engines.store import Bundle, BundleWriter, file_entry
from export import kernels, networks
from export.checkpoint import find_folder, read_config
from export.networks import Graph, LoadedNetwork, Source
from export.parity import BF16_TOLERANCE, SEED, DetachedRunner, check_parity, example_sizes, in_float32, package_sizes
from export.to_inductor import compile_inductor
from export.to_onnx import trace
from export.tokenizers import convert_clip, convert_t5
from runtime.config import Settings, stage_sizes
from runtime.kernels import ABI
from runtime.runner import INDUCTOR, Runner, open_runner, why_not_half
from runtime.runner_inductor import target, torch_version, why_idle

_ORT_PACKAGES = ("onnxruntime", "onnxruntime-gpu")  # either brings ONNX Runtime
_PACKAGES = ("show1-rt", "torch", "onnx", "onnxscript", *_ORT_PACKAGES, "tokenizers")
_GIB = 2**30
_ON_CARD = 12 * _GIB  # of a GPU, for an engine that inductor builds: T5's weights alone are 9 in half precision


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
        packages = _ORT_PACKAGES if self.name == compile_ort.BACKEND else (self.name,)
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
        return 1.5 * _GIB + copies * self.weight_bytes

    @property
    def seconds(self) -> float:
        """About how long it will take, in seconds of two idle cores: tracing goes by layers, compilation by both."""
        layers = self.source.tensors
        if self.backend.name == INDUCTOR:  # its compiler's time goes by layers too
            return 5 + 0.3 * layers
        compilation = 0.0 if self.backend.name == compile_ort.BACKEND else 0.03 * layers + 4 * self.weight_bytes / _GIB
        return 2 + 0.08 * layers + compilation

    def made_from(self) -> dict[str, str]:
        """Everything the engine depends on. When one of these changes, it is stale."""
        tuned_for = None if self.name in TOKENIZERS else stage_sizes(self.size)[self.source.network.stage]
        made_from = {
            **self.source.fingerprint(),
            "learned_variance": str(self.source.learned_variance),
            "precision": self.precision,
            "size": str(tuned_for),
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


_messages: Any = None  # a worker's queue to the process that shows progress


def _start_worker(messages: Any, threads: int) -> None:
    global _messages
    _messages = messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it ends its workers
    torch.set_num_threads(threads)
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        # Else every engine has as many processes for generated code as there are processors. Twice its share, for most
        # of a build is torch's own Python, in one process.
        torch._inductor.config.compile_threads = 2 * threads
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Also where that was killed and could end nobody: jobs would go on for minutes, on the card too."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _report(name: str, message: str) -> None:
    if _messages is not None:
        _messages.put((name, message))


def _run_job(job: Job, folder: Path) -> tuple[EngineEntry, float]:
    start = time.perf_counter()
    try:
        folder.mkdir()
        entry = build_engine(job, folder, partial(_report, job.name))
    except OSError as error:
        raise BundleError(
            f"{job.name}: cannot be written ({error.strerror or error}). Nothing of it was kept; finished engines "
            "were. Make room or choose another --out, then run this again."
        ) from None
    return entry, time.perf_counter() - start


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


def why_stale(bundle: Bundle, job: Job) -> str | None:
    """The reason to build an engine, or None when the bundle's is current and its files are sound."""
    if reason := bundle.why_stale(job.name, job.made_from()):
        return reason
    graphs = bundle.engine(job.name).graphs.values()
    if job.keep_onnx and not all((bundle.path(g.plan).parent / f"{g.spec.name}.onnx").is_file() for g in graphs):
        return "its ONNX files were not kept"
    return None


def build(
    checkpoint: Path,
    out: Path,
    stages: Iterable[str] = ("all",),
    precision: str = "fp32",
    size: tuple[int, int] = (576, 320),
    force: bool = False,
    jobs: int | None = None,
    backend: Backend | None = None,
    keep_onnx: bool = False,
    layers: Mapping[str, Mapping[str, LayerPlan]] | None = None,
) -> Bundle:
    """Build the engines of `stages` into the bundle `out`; those named in `layers` with these layers in int8.

    Raises Show1Error subclasses: CheckpointError for unusable files, ParityError for a graph that computes something
    else, EngineError for one that does not compile, BundleError when `out` cannot take the result. Engines finished
    before an error or an interruption stay.
    """
    backend = backend or Backend.choose(compile_ort.BACKEND, precision)
    stage_sizes(size)
    wanted = networks_of(stages)
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}: no such folder. Give --checkpoint, or run `python -m export download`.")
    # Everything that can be wrong with the checkpoint's layout is found before the first minute is spent.
    sources = [Source.find(network, checkpoint, precision) for network in wanted]
    schedulers = networks.schedulers(sources)
    tokenizers = _tokenizers(checkpoint, wanted)
    defaults = recommended_settings(checkpoint, size)
    all_jobs = [
        Job(source, precision, size, backend, keep_onnx=keep_onnx, layers=(layers or {}).get(source.network.name))
        for source in sources
    ]

    with Bundle.writer(out) as bundle:
        if size != bundle.manifest.size and (others := set(bundle.manifest.engines) - {job.name for job in all_jobs}):
            asked, was = ("{}x{}".format(*pair) for pair in (size, bundle.manifest.size))
            raise SettingsError(
                f"--size {asked}: {out} is for {was}, and {', '.join(sorted(others))} would stay so. "
                f"Give --size {was}, or --stage all."
            )
        pending, foreign = [], set()
        for job in all_jobs:
            reason = "--force" if force else why_stale(bundle, job)
            print(f"{job.name}: {reason or 'up to date'}", file=sys.stderr)
            if reason:
                pending.append(job)
                may_be = force or "config" in reason or "weights" in reason  # to tell, all weights are read again
                if may_be and not _of_checkpoint(bundle, job.source.network, checkpoint):
                    foreign.add(job.name)
        _check_disk(bundle.root, pending)
        if backend.name == INDUCTOR:  # what its engines run with
            kernels.prepare_inductor("cpu" if backend.targets[0].startswith("cpu") else "cuda")
        bundle.announce(
            foreign,
            tokenizers,
            versions={name: found for name in _PACKAGES if (found := tensorrt.installed_version(name))},
            size=size,
            defaults=defaults.to_dict(),
            schedulers={**bundle.manifest.schedulers, **schedulers},
        )
        if not pending:
            bundle.adopt()
        if backend.name == INDUCTOR and backend.targets[0].startswith("sm"):
            # Where kernels are chosen by timing, one engine at a time has the GPU.
            jobs = 1 if backend.autotune else jobs or max(1, int(find_gpus()[0].memory / _ON_CARD + 0.05))
        elif pending and backend.name == compile_ort.BACKEND:
            from runtime.runner_ort import tries_cuda  # ONNX Runtime: other backends do without

            if tries_cuda():
                jobs = jobs or 1  # engines are compared on the GPU, which might not hold two
        _build_all(bundle, pending, jobs)
        return Bundle(bundle.root, bundle.manifest)


def _of_checkpoint(bundle: Bundle, network: Network, checkpoint: Path) -> bool:
    """Whether a bundle's engine was made from these weights, in whatever precision they are there."""
    entry = bundle.manifest.engines.get(network.name)
    return entry is None or any(
        Source.find(network, checkpoint, precision).made(entry.source) for precision in ("fp32", "fp16")
    )


def recommended_settings(checkpoint: Path, size: tuple[int, int]) -> Settings:
    """The reference's settings, with guidance and strength as the checkpoint's optional settings.json recommends."""
    settings = Settings(size=size)
    path = checkpoint / "settings.json"
    if not path.is_file():
        return settings
    try:
        recommended = read_config(path)
        strength = recommended.get("strength", settings.strength)
        return replace(settings, strength=strength).with_guidance(recommended.get("guidance", {}))
    except (SettingsError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _tokenizers(checkpoint: Path, wanted: Iterable[Network]) -> dict[str, str]:
    convert = {"t5": convert_t5, "clip": convert_clip}
    names = {network.name for network in wanted}
    return {
        name: convert[name](find_folder(checkpoint, folders, "tokenizer"))
        for name, folders in TOKENIZERS.items()
        if name in names
    }


def _check_disk(root: Path, pending: list[Job]) -> None:
    need = sum(job.disk for job in pending)
    free = shutil.disk_usage(root).free
    if need > _GIB:
        print(f"needs {need / _GIB:.1f} GiB of disk, {free / _GIB:.1f} GiB are free", file=sys.stderr)
    if need > free:
        raise BundleError(
            f"{root}: {need / _GIB:.1f} GiB needed, {free / _GIB:.1f} GiB free. Make room or choose another --out."
        )


def _build_all(bundle: BundleWriter, pending: list[Job], most: int | None) -> None:
    """Build engines side by side: at most `most`, and never more than processors and memory allow.

    The longest go first. Large engines have a process each, which takes its memory along when it ends.
    """
    if not pending:
        return
    waiting = sorted(pending, key=lambda job: -job.seconds)
    available = available_memory()
    most = min(most or processors(), len(pending))
    for job in waiting:
        if job.memory > available:
            print(
                f"warning: {job.name} needs about {job.memory / _GIB:.0f} GiB of memory, {available / _GIB:.0f} GiB "
                "are available: close other programs if it fails",
                file=sys.stderr,
            )
    large = max(job.weight_bytes for job in pending) > _GIB
    context = get_context("spawn")
    messages = context.Queue()
    fitting_at_once = sum(total <= available for total in accumulate(sorted(job.memory for job in waiting)))
    threads = max(1, processors() // min(most, max(1, fitting_at_once)))
    running: dict[Future[tuple[EngineEntry, float]], Job] = {}
    with (
        bundle.scratch() as scratch,
        ProcessPoolExecutor(
            most,
            mp_context=context,
            initializer=_start_worker,
            initargs=(messages, threads),
            max_tasks_per_child=1 if large else None,
        ) as pool,
        _Progress(waiting, messages) as progress,
    ):
        try:
            while waiting or running:
                while fitting := _next(waiting, running.values(), most, available):
                    waiting.remove(fitting)
                    progress.start(fitting)
                    running[pool.submit(_run_job, fitting, scratch / fitting.name)] = fitting
                # Not for longer: on Windows Ctrl-C waits for it.
                for future in sorted(wait(running, timeout=1, return_when=FIRST_COMPLETED).done, key=_failed):
                    running.pop(future)
                    entry, seconds = future.result()
                    bundle.install(scratch / entry.name, entry)
                    progress.finish(entry, seconds)
        except BrokenProcessPool:
            raise BundleError(
                "a build process was killed, most likely for want of memory. Finished engines are kept; run this again "
                "when more memory is free, with --jobs 1 to build one engine at a time."
            ) from None
        except BaseException:
            workers = list((pool._processes or {}).values())  # before `shutdown`, which forgets them
            pool.shutdown(wait=False, cancel_futures=True)
            for process in workers:
                process.terminate()
            for process in workers:  # gone before what they write to is, and the bundle's lock
                process.join()
            raise


def _failed(future: Future[Any]) -> bool:
    return future.exception() is not None


def _next(waiting: list[Job], running: Iterable[Job], most: int, available: float) -> Job | None:
    """The first job that fits beside those running; the first of all when none are."""
    running = list(running)
    if not running:
        return waiting[0] if waiting else None
    if len(running) >= most:
        return None
    left = available - sum(job.memory for job in running)
    return next((job for job in waiting if job.memory <= left), None)


class _Progress:
    """One bar in seconds of work. What workers report names the phase; within a job the bar goes by the clock.

    TensorRT's builder does count steps, but spends nine tenths of its time in one of them.
    """

    def __init__(self, jobs: Iterable[Job], messages: Any):
        self._messages = messages
        self._seconds = {job.name: job.seconds for job in jobs}
        self._started: dict[str, float] = {}
        self._done = 0.0
        self._state: dict[str, str] = {}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._bar = tqdm(total=math.ceil(sum(self._seconds.values())), desc="building", bar_format=_BAR, disable=None)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self, job: Job) -> None:
        with self._lock:
            self._started[job.name] = time.perf_counter()

    def finish(self, entry: EngineEntry, seconds: float) -> None:
        with self._lock:
            del self._started[entry.name]
            self._state.pop(entry.name, None)
            self._done += self._seconds[entry.name]
        error = max(row["max_error"] for graph in entry.graphs.values() for row in graph.parity)
        self._bar.write(f"{entry.name}: built in {seconds:.0f} s, differs from torch by {error:.1e}", file=sys.stderr)
        self._show()

    def _show(self) -> None:
        now = time.perf_counter()
        with self._lock:
            running = sum(min(now - at, 0.95 * self._seconds[name]) for name, at in self._started.items())
            state = ", ".join(f"{name} {what}" for name, what in self._state.items())
        self._bar.set_description_str(state or "building", refresh=False)
        if not self._bar.disable:
            self._bar.n = max(self._bar.n, self._done + running)
            self._bar.refresh()

    def _run(self) -> None:
        while not self._stop.wait(1):
            while not self._messages.empty():
                name, message = self._messages.get()
                with self._lock:
                    if name in self._started:
                        self._state[name] = message
            self._show()

    def __enter__(self) -> "_Progress":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._bar.close()


_BAR = "{percentage:3.0f}%|{bar:30}| {elapsed}, {remaining} left | {desc}"
