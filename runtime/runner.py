"""Running engines: one interface over every backend, and the pool that decides which engines are in memory."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from engines import tensorrt
from engines.errors import BundleError
from engines.manifest import EngineEntry
from engines.spec import GraphSpec
from engines.store import Bundle

Array = NDArray[Any]


class Runner(Protocol):
    """One loaded plan. `infer` takes and gives arrays in the bindings' own types."""

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]: ...

    def close(self) -> None: ...


def open_runner(backend: str, plan: Path) -> Runner:
    if backend == "onnxruntime":
        from runtime.runner_ort import OrtRunner  # a backend's library is imported when it is used

        return OrtRunner(plan)
    if backend in tensorrt.FLAVOURS:
        from runtime.runner_trt import TrtRunner

        return TrtRunner(plan, backend)
    raise BundleError(f"{plan}: made for the backend {backend!r}, which this version does not run.")


class Engine:
    """A loaded engine: its graphs by name, float32 arrays in and out, the time spent in them."""

    def __init__(self, bundle: Bundle, entry: EngineEntry):
        self.name, self.properties = entry.name, entry.properties
        self.specs: dict[str, GraphSpec] = {name: graph.spec for name, graph in entry.graphs.items()}
        self.seconds = 0.0
        self.calls = 0
        self._runners: dict[str, Runner] = {}
        if entry.backend in tensorrt.FLAVOURS and (reason := tensorrt.why_unusable(bundle, entry)):
            raise BundleError(f"{entry.name}: {reason}.")
        try:
            for name, graph in entry.graphs.items():
                if graph.weights:
                    bundle.path(graph.weights)
                self._runners[name] = open_runner(entry.backend, bundle.path(graph.plan))
        except BaseException:
            self.close()
            raise

    def run(self, graph: str, **feeds: Array) -> dict[str, Array]:
        """Run one graph. Raises ProfileError for shapes that the engine was not built for."""
        spec = self.specs[graph]
        spec.check(self.name, {name: array.shape for name, array in feeds.items()})
        typed = {b.name: np.asarray(feeds[b.name], dtype=b.dtype) for b in spec.inputs}
        start = time.perf_counter()
        outputs = self._runners[graph].infer(typed)
        self.seconds += time.perf_counter() - start
        self.calls += 1
        return {name: array.astype(np.float32, copy=False) for name, array in outputs.items()}

    def close(self) -> None:
        for runner in self._runners.values():
            runner.close()
        self._runners.clear()


class EnginePool:
    """Loads engines when a stage asks for them and drops them after it, unless told to keep them."""

    def __init__(self, bundle: Bundle, keep_loaded: bool = False):
        self.bundle, self.keep_loaded = bundle, keep_loaded
        self.engine_seconds: dict[str, float] = {}
        self.engine_calls: dict[str, int] = {}
        self._loaded: dict[str, Engine] = {}

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[Engine]:
        engine = self._loaded.get(name) or Engine(self.bundle, self.bundle.engine(name))
        self._loaded[name] = engine
        seconds, calls = engine.seconds, engine.calls
        try:
            yield engine
        finally:
            self.engine_seconds[name] = self.engine_seconds.get(name, 0.0) + engine.seconds - seconds
            self.engine_calls[name] = self.engine_calls.get(name, 0) + engine.calls - calls
            if not self.keep_loaded:
                del self._loaded[name]
                engine.close()

    def close(self) -> None:
        for engine in self._loaded.values():
            engine.close()
        self._loaded.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
