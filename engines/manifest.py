"""The manifest of a bundle: one JSON file that says what every engine is, where it came from and how exact it is."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import PureWindowsPath
from typing import Any

from engines.errors import BundleError
from engines.spec import Axis, Binding, GraphSpec

FORMAT = 3
_AGAIN = "Build the bundle again, in a new folder: `python -m export build --out NEW`."


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle, relative to its root, with forward slashes."""

    path: str
    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        path = PureWindowsPath(self.path)  # which knows all that leads out of a folder
        if path.anchor or ".." in path.parts:
            raise ValueError(f"{self.path} lies outside of the bundle")


@dataclass(frozen=True)
class GraphEntry:
    """A compiled graph: its contract, its plan (the file a runner opens) with what lies beside it, its measured error.

    `graph_sha256` is of the ONNX graph without its weights (inductor: of the package). `parity` has one row per size
    tried: the sizes, the largest and mean absolute difference from the torch module, the largest reference value, and
    the tolerance; of int8 graphs, which are compared with the float32 one, neither sizes nor tolerance.
    """

    spec: GraphSpec
    plan: FileEntry
    weights: FileEntry | None
    graph_sha256: str
    parity: list[dict[str, float]]


@dataclass(frozen=True)
class EngineEntry:
    """One compiled network. `source` is everything it was made from: it is stale when any of it changes.

    `targets` are the GPUs a plan was compiled for (TensorRT), or the one kind of machine (inductor: sm90,
    cpu-x86-64-v3). `cost` is what the build took: seconds of export (loading, tracing), parity and compilation, peak
    memory of its process in bytes.
    """

    name: str
    backend: str
    backend_version: str
    precision: str
    targets: tuple[str, ...]
    source: dict[str, str]
    properties: dict[str, Any]
    graphs: dict[str, GraphEntry]
    cost: dict[str, float] = field(default_factory=dict)
    seal: str = ""  # `sealed` writes it: tells an entry that was edited since

    def sealed(self) -> "EngineEntry":
        content = json.dumps(asdict(replace(self, seal="")), sort_keys=True)
        return replace(self, seal=hashlib.sha256(content.encode()).hexdigest())

    @property
    def edited(self) -> str | None:
        return None if self.sealed().seal == self.seal else "its part of the manifest has been changed"

    @property
    def needs_gpu(self) -> bool:
        return any(target.startswith("sm") for target in self.targets)

    def files(self) -> list[FileEntry]:
        return [file for graph in self.graphs.values() for file in (graph.plan, graph.weights) if file]


@dataclass(frozen=True)
class Manifest:
    """`schedulers` holds each stage's published scheduler configs, `defaults` the settings of the reference run."""

    versions: dict[str, str] = field(default_factory=dict)
    size: tuple[int, int] = (576, 320)  # (width, height) of the finished video that profiles are tuned for
    defaults: dict[str, Any] = field(default_factory=dict)
    schedulers: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokenizers: dict[str, FileEntry] = field(default_factory=dict)
    engines: dict[str, EngineEntry] = field(default_factory=dict)

    def to_json(self) -> str:
        # allow_nan: published scheduler configs hold -Infinity, which Python's and most JSON readers take.
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Manifest":
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise BundleError(f"{where}: manifest format {data['format']}, this version reads {FORMAT}. {_AGAIN}")
            width, height = data["size"]
            return cls(
                versions=data["versions"],
                size=(width, height),
                defaults=dict(data["defaults"]),
                schedulers={name: dict(config) for name, config in data["schedulers"].items()},
                tokenizers={name: FileEntry(**file) for name, file in data["tokenizers"].items()},
                engines={name: _engine(name, engine) for name, engine in data["engines"].items()},
            )
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise BundleError(
                f"{where} is not a bundle's manifest ({type(error).__name__}: {error}). {_AGAIN}"
            ) from None


def _engine(name: str, data: dict[str, Any]) -> EngineEntry:
    if data["name"] != name:
        raise ValueError(f"the engine {name} is called {data['name']!r}")
    return EngineEntry(
        **{
            **data,
            "source": dict(data["source"]),
            "targets": tuple(data["targets"]),
            "graphs": {name: _graph(graph) for name, graph in data["graphs"].items()},
        }
    )


def _graph(data: dict[str, Any]) -> GraphEntry:
    spec = data["spec"]
    return GraphEntry(
        spec=GraphSpec(
            name=spec["name"],
            inputs=tuple(_binding(b) for b in spec["inputs"]),
            outputs=tuple(_binding(b) for b in spec["outputs"]),
            profile={axis: Axis(**limits) for axis, limits in spec["profile"].items()},
        ),
        plan=FileEntry(**data["plan"]),
        weights=FileEntry(**data["weights"]) if data["weights"] else None,
        graph_sha256=data["graph_sha256"],
        parity=data["parity"],
    )


def _binding(data: dict[str, Any]) -> Binding:
    return Binding(data["name"], data["dtype"], tuple(data["axes"]))
