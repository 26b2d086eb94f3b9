"""Loaded engines on any backend, and the pool that decides which are in memory."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from engines import tensorrt
from engines.catalog import DEEP, TEXT_ENCODERS
from engines.errors import BundleError, EngineError
from engines.limits import is_arm
from engines.manifest import EngineEntry
from engines.memory import is_short_of_memory, return_memory
from engines.spec import GraphSpec
from engines.store import Bundle
from runtime.runner import Array, Loop, LoopRunner, LoopStart, Runner

INDUCTOR = "inductor"


def open_runner(backend: str, plan: Path, precision: str, name: str = "") -> Runner:
    """Load a plan of its engine's `precision`; `name` is the network's, if it is one."""
    if backend == "onnxruntime":
        from runtime.runner_ort import OrtRunner  # a backend's library is imported when it is used

        return OrtRunner(plan, precision, once=name in TEXT_ENCODERS)
    if backend in tensorrt.FLAVOURS:
        from runtime.runner_trt import TrtRunner

        return TrtRunner(plan, backend)
    if backend == INDUCTOR:
        from runtime.runner_inductor import InductorRunner

        return InductorRunner(plan)
    raise EngineError(f"{plan}: made for the backend {backend!r}, which this version does not run.")


def why_unusable(bundle: Bundle, entry: EngineEntry) -> str | None:
    """Why an engine cannot run on this machine, told before it is opened and with what mends it; None if it can."""
    if entry.backend in tensorrt.FLAVOURS:
        return tensorrt.why_unusable(bundle, entry)
    if entry.backend == INDUCTOR:
        from runtime.runner_inductor import why_unusable

        return why_unusable(bundle, entry)
    if entry.precision == "fp16" and (reason := why_not_half()):
        return f"{reason}: {bundle.rebuild_command(entry.name, precision='fp32')}"
    return None


def why_not_half() -> str | None:
    """Why ONNX Runtime should not compute in half precision on this machine's processor, or None.

    On x86-64 it has next to no kernels for it, and computes in float32. Those for ARM (1.32) sum in half precision, and
    of some layouts there are none.
    """
    if not is_arm():
        return None
    from runtime.runner_ort import tries_cuda

    return None if tries_cuda() else "on ARM processors ONNX Runtime is inexact in half precision"


class Engine:
    """A loaded engine: its graphs by name, float32 arrays in and out (but `deep`, as the network has it).

    `on_call(graph, start, seconds)`, if set, is told of every run of a graph: when the runtime turned to it, and what
    the backend took. A step of a loop on the device counts as a run of its network. `on_feeds(graph, feeds)` sees what
    `run` gives a graph, in the bindings' types, before it runs; copy what is to be kept.
    """

    def __init__(self, bundle: Bundle, entry: EngineEntry):
        self.name, self.properties = entry.name, entry.properties
        self.specs: dict[str, GraphSpec] = {name: graph.spec for name, graph in entry.graphs.items()}
        self.on_call: Callable[[str, float, float], None] | None = None
        self.on_feeds: Callable[[str, Mapping[str, Array]], None] | None = None
        self._bundle, self._entry = bundle, entry
        self._runners: dict[str, Runner] = {}
        if reason := why_unusable(bundle, entry):
            raise BundleError(f"{entry.name}: {reason}.")
        try:
            for name in entry.graphs:
                if name != "shallow":  # few runs need it
                    self._runner(name)
        except BaseException:
            self.close()
            raise

    def _runner(self, name: str) -> Runner:
        """A graph's, opened at its first use."""
        if name not in self._runners:
            graph = self._entry.graphs[name]
            files = [file for file in (graph.plan, graph.weights) if file]
            plan, *_ = map(self._bundle.path, files)
            try:
                self._runners[name] = open_runner(self._entry.backend, plan, self._entry.precision, self._entry.name)
            except BundleError as error:
                for file in files:
                    self._bundle.path(file)  # says so where the bundle was built again meanwhile
                if not any(map(self._bundle.damage, files)):
                    raise EngineError(
                        f"{error} Its files are as they were built; `show1-rt doctor` says what this machine can run."
                    ) from None
                again = self._bundle.rebuild_command(self._entry.name, force="")
                raise BundleError(f"{error} Build it again: {again}.") from None
            return_memory()  # of what was widened and ordered anew on the way
        return self._runners[name]

    def run(self, graph: str, wanted: Sequence[str] | None = None, /, **feeds: Array) -> dict[str, Array]:
        """Run one graph; its outputs, all or `wanted`. Raises ProfileError for shapes that it was not built for."""
        turned = time.perf_counter()
        spec = self.specs[graph]
        spec.check(self.name, {name: array.shape for name, array in feeds.items()})
        typed = {b.name: np.asarray(feeds[b.name], dtype=b.dtype) for b in spec.inputs}
        if self.on_feeds is not None:
            self.on_feeds(graph, typed)
        runner = self._runner(graph)
        with self._timed(graph, turned):
            outputs = _in_parts(runner, spec, typed, wanted)
        # What goes back into the network, and is as large as all of its finest level, stays as it is.
        return {n: array if n == DEEP else array.astype(np.float32, copy=False) for n, array in outputs.items()}

    def start_loop(self, start: LoopStart, context: Mapping[str, Array]) -> Loop | None:
        """A denoising loop on the backend's device, or None where the sampler has to run it.

        `context` has the step's inputs besides sample and timestep, of which a loop without a guided step takes the
        prompt's, the last. Raises ProfileError as `run` does.
        """
        runner, spec = self._runners["step"], self.specs["step"]
        learned = any(binding.name == "variance_frac" for binding in spec.outputs)
        if not isinstance(runner, LoopRunner) or (start.schedule.config.learned_variance and not learned):
            return None  # without the variance, the sampler says what is wrong
        x, condition = start.x, start.condition
        network_batch = len(x) * (2 if start.guidance.max() > 1 else 1)
        context = {name: array[-network_batch:] for name, array in context.items()}
        channels = x.shape[1] + (0 if condition is None else condition.shape[1])
        shapes = {name: array.shape for name, array in context.items()}
        shapes |= {"sample": (network_batch, channels, *x.shape[2:]), "timestep": (network_batch,)}
        spec.check(self.name, shapes)
        dtypes = {binding.name: binding.dtype for binding in spec.inputs}
        typed = {name: np.asarray(array, dtype=dtypes[name]) for name, array in context.items()}
        shallow = None if start.whole.all() else self._runner("shallow")
        with self._explained():
            loop = runner.start_loop(shallow, start, typed, dtypes["sample"])
        return _TimedLoop(self, loop, start.whole)

    @contextlib.contextmanager
    def _timed(self, graph: str, turned: float | None = None) -> Iterator[None]:
        """Tell `on_call` of what is done inside as a run of `graph`."""
        start = time.perf_counter()
        with self._explained():
            yield
        if self.on_call is not None:
            self.on_call(graph, start if turned is None else turned, time.perf_counter() - start)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """What it means that memory was short."""
        try:
            yield
        except EngineError as error:
            if not is_short_of_memory(error):
                raise
            less = "" if self.name in TEXT_ENCODERS else " ask for a smaller --size or fewer --keyframes, or"
            raise EngineError(f"{self.name}: too little memory ({error});{less} close what else uses it.") from None

    def close(self) -> None:
        while self._runners:
            # The first opened first: a step's CUDA graphs go before the shallow package whose kernels they hold.
            runner = self._runners.pop(next(iter(self._runners)))
            with contextlib.suppress(Exception):  # the failure before it is the one to tell
                runner.close()
        return_memory()


def _in_parts(
    runner: Runner, spec: GraphSpec, feeds: Mapping[str, Array], wanted: Sequence[str] | None
) -> dict[str, Array]:
    """A UNet's batch of large samples, some at a time: they do not see each other, and their activations need not be in
    memory together."""
    if "sample" not in feeds:
        return runner.infer(feeds, wanted)
    batch, _, frames, height, width = feeds["sample"].shape
    most = getattr(runner, "positions_at_once", math.inf) / (frames * height * width)  # `//` makes a NaN of inf
    size = int(min(spec.samples_at_once(frames=frames, height=height, width=width), max(1, most)))
    if size >= batch:
        return runner.infer(feeds, wanted)
    parts = [
        runner.infer({name: array[i : i + size] for name, array in feeds.items()}, wanted)
        for i in range(0, batch, size)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class _TimedLoop:
    """Tells the engine's `on_call` of every step."""

    def __init__(self, engine: Engine, loop: Loop, whole: Array):
        self._engine, self._loop = engine, loop
        self._graphs = iter(np.where(whole, "step", "shallow").tolist())

    def step(self, noise: Array | None) -> None:
        with self._engine._timed(next(self._graphs)):
            self._loop.step(noise)
            if self._engine.on_call is not None:
                self._loop.sample()  # who asks what a step took wants its work counted, not its queueing

    def sample(self) -> Array:
        return self._loop.sample()


class EnginePool:
    """Loads engines when a stage asks for them and drops them after it, unless told to keep them."""

    def __init__(self, bundle: Bundle, keep_loaded: bool = False):
        self.bundle, self.keep_loaded = bundle, keep_loaded
        self._loaded: dict[str, Engine] = {}

    def open(self, name: str) -> Engine:
        """Load an engine; `use` calls this when it is not in memory."""
        return Engine(self.bundle, self.bundle.engine(name))

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[Engine]:
        if name in self._loaded:  # it is whose who loaded it
            yield self._loaded[name]
            return
        engine = self._loaded[name] = self.open(name)
        try:
            yield engine
        finally:
            if not self.keep_loaded:
                self._loaded.pop(name, None)  # `close` may have come from a callback
                engine.close()

    def close(self) -> None:
        for engine in self._loaded.values():
            engine.close()
        self._loaded.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
