"""TensorRT's compiler, for both flavours: an ONNX graph and its weights become a plan.

Networks are strongly typed: precision is what the graph says. `tensorrt-rtx` needs no GPU for any of this.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, SupportsInt

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.errors import EngineError, SettingsError
from engines.passes import decompose_attention, head_size, is_temporal, pad_heads, store_as_loaded
from engines.spec import GraphSpec
from engines.tensorrt import load

ATTENTION = ("fused", "padded", "decomposed")
_FUSED_HEAD_SIZES = range(9, 257)  # of TensorRT-RTX 1.7's fused kernels, fp16 and bf16 only; found by building
_PADDED_MULTIPLE = 16  # what matrix units take at once along the channels of half-precision operands
_INLINE_BYTES = 1024  # smaller weights are part of the graph

Report = Callable[[str], None]  # told the name of every phase the builder enters


@dataclass(frozen=True)
class DetachedModel:
    """An ONNX model apart from its weights, which stay where they are: in the checkpoint's mapped files.

    So it needs neither disk nor memory of its own.
    """

    graph: bytes
    weights: dict[str, NDArray[Any]]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.graph).hexdigest()


def prepare(model: ir.Model, precision: str, attention: str) -> None:
    """Rewrite a traced model for TensorRT, in place.

    Attention over frames is "fused" (ONNX Attention, as traced), "padded" (the same, with heads of a multiple of 16
    channels) or "decomposed" (MatMul, Softmax, MatMul): which is fastest is for a card to tell. Attention that TensorRT
    has no kernel for is decomposed whatever is asked: float32, and heads of less than 9 or more than 256 channels.
    """
    if attention not in ATTENTION:
        raise SettingsError(f"attention {attention!r}; allowed: {', '.join(ATTENTION)}.")
    if attention == "padded":
        pad_heads(model.graph, _PADDED_MULTIPLE)

    def decomposed(node: ir.Node) -> bool:
        asked = attention == "decomposed" and is_temporal(node)
        return asked or precision == "fp32" or head_size(node) not in _FUSED_HEAD_SIZES

    decompose_attention(model.graph, decomposed)
    store_as_loaded(model.graph)


def detach_weights(model: ir.Model) -> DetachedModel:
    """Take the weights out of a model; what is left names them as external data."""
    weights: dict[str, NDArray[Any]] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= _INLINE_BYTES:
            weights[name] = np.ascontiguousarray(tensor.numpy())
            value.const_value = ir.ExternalTensor(
                "weights", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(weights[name].shape), name=name
            )
    return DetachedModel(ir.to_proto(model).SerializeToString(), weights)


def compile_trt(
    flavour: str, model: DetachedModel, spec: GraphSpec, plan: Path, targets: tuple[str, ...], report: Report
) -> None:
    """Build `plan` from a model that `prepare` has rewritten. Raises EngineError with TensorRT's words."""
    if TYPE_CHECKING:
        import tensorrt_rtx as trt
    else:
        trt = load(flavour)
    with open(plan, "wb") as file:
        logger, monitor, writer = _callbacks(flavour, report, file)
        builder = trt.Builder(logger)
        network = builder.create_network()  # strongly typed, as all are
        parser = trt.OnnxParser(network, logger)
        loaded = parser.load_model_proto(model.graph, "model.onnx") and all(
            parser.load_initializer(name, array.ctypes.data, array.nbytes) for name, array in model.weights.items()
        )
        if not (loaded and parser.parse_model_proto()):
            errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
            raise EngineError(f"{flavour} does not take the graph {spec.name}: {errors or logger.summary()}")

        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
        shapes = builder.create_optimization_profile()
        for binding in spec.inputs:
            limits = (
                trt.Dims(
                    [getattr(spec.profile[axis], limit) if isinstance(axis, str) else axis for axis in binding.axes]
                )
                for limit in ("min", "opt", "max")
            )
            shapes.set_shape(binding.name, *limits)
        if config.add_optimization_profile(shapes) < 0:
            raise EngineError(f"{flavour} does not take the profile of {spec.name}: {logger.summary()}")
        if flavour == "tensorrt-rtx":
            config.num_compute_capabilities = len(targets)
            for index, target in enumerate(targets):
                if not config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index):
                    raise EngineError(f"{flavour} does not build for {target}: {logger.summary()}")
        config.progress_monitor = monitor

        built = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.error:
        raise writer.error
    if not built:
        raise EngineError(f"{flavour} could not build {spec.name}: {logger.summary()}")


def _callbacks(flavour: str, report: Report, file: IO[bytes]) -> tuple[Any, Any, Any]:
    """Logger, progress monitor and stream writer: subclasses of the flavour that is loaded, hence made when it is."""
    if TYPE_CHECKING:
        import tensorrt_rtx as trt
    else:
        trt = load(flavour)

    class Logger(trt.ILogger):
        """Keeps errors for the exception that will tell them; TensorRT's warnings tell a user nothing to act on."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(msg)

        def summary(self) -> str:
            return self.errors[0] if self.errors else "it gave no reason"

    class Monitor(trt.IProgressMonitor):
        """Passes on the builder's phases."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: SupportsInt) -> None:
            report(phase_name)

        def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
            return True

        def phase_finish(self, phase_name: str) -> None:
            pass

    class Writer(trt.IStreamWriter):
        """The plan goes to disk as it is made; a full disk is kept for the caller."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:
                self.error = error
                return 0

    return Logger(), Monitor(), Writer()
