"""Does the compiled graph compute what the torch module computes? Asked of every graph before it is installed."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from engines.compile_trt import DetachedModel
from engines.errors import ParityError
from engines.spec import GraphSpec
from export.networks import Graph
from runtime.runner import Runner
from runtime.runner_ort import OrtRunner, ort, session_options  # telemetry turned off

SEED = 20230927  # arXiv 2309.15818's day
# Relative to the largest value of the reference, which computes in float32 from the engine's weights. float32:
# summation order. float16: a few units of its last place, through hundreds of layers. bfloat16: see `in_float32`.
TOLERANCE = {"fp32": 1e-4, "fp16": 3e-2, "bf16": 1e-4}
BF16_TOLERANCE = 2e-1  # of what computes in bfloat16: its last place is 8 times as large as float16's
_SMALL = 4 * 2**20  # bytes


def example_sizes(spec: GraphSpec) -> dict[str, int]:
    """Sizes to trace with: none is 1, and no two are equal, lest tracing takes one axis for another."""
    return _sizes(spec, {"batch": 2, "frames": 3, "tokens": 7}, (4, 6))


def parity_sizes(spec: GraphSpec) -> list[dict[str, int]]:
    """Sizes to compare at: two batch sizes and two frame counts, none of them traced, and the smallest width.

    A batch of 1 is a classic trap, and so are a single frame, which some networks always get, and a single pixel at a
    UNet's coarsest level.
    """
    return [
        _sizes(spec, {"batch": 1, "frames": _few_frames(spec), "tokens": 5}, (3, 1)),
        _sizes(spec, {"batch": 3, "frames": 4, "tokens": 9}, (2, 3)),
    ]


def package_sizes(spec: GraphSpec) -> list[dict[str, int]]:
    """Sizes to compare a package of inductor at: batches of 1, 2 and 14 by two frame counts, as far as they fit.

    torch 2.13 has compiled dynamic shapes to packages that were wrong at batch 1 alone, without a word.
    """
    by_frame = "batch" not in spec.profile  # the autoencoder: its frames are its batch
    few = _few_frames(spec)
    sizes = [
        # A single pixel at the coarsest level once: normalisation of so few values magnifies every rounding.
        _sizes(
            spec,
            {"batch": b, "frames": b if by_frame else f, "tokens": tokens},
            (3, 1) if (b, f) == (1, few) else (2, 3),
        )
        for b in (1, 2, 14)
        for f, tokens in ((few, 5), (5, 9))
    ]
    return [row for number, row in enumerate(sizes) if row not in sizes[:number]]


def _few_frames(spec: GraphSpec) -> int:
    """One where the runtime gives one frame at a time."""
    frames = spec.profile.get("frames")
    return 1 if frames and frames.opt == 1 else 2


def _sizes(spec: GraphSpec, wanted: Mapping[str, int], pixels: tuple[int, int]) -> dict[str, int]:
    profile = spec.profile
    units = zip(("height", "width"), pixels, strict=True)
    wanted = {**wanted, **{axis: count * profile[axis].min for axis, count in units if axis in profile}}
    return {axis: profile[axis].nearest(size) for axis, size in wanted.items() if axis in profile}


def check_parity(
    graph: Graph,
    engine: str,
    runner: Runner,
    precision: str,
    sizes_to_try: Sequence[dict[str, int]] | None = None,
    tolerance: float | None = None,
) -> list[dict[str, float]]:
    """Compare on seeded inputs; returns a row per size. Raises ParityError with the numbers when one is off.

    By default at `parity_sizes`, with the precision's TOLERANCE.
    """
    tolerance = TOLERANCE[precision] if tolerance is None else tolerance
    rows = []
    for sizes in parity_sizes(graph.spec) if sizes_to_try is None else sizes_to_try:
        inputs = graph.example(sizes, torch.Generator().manual_seed(SEED))
        with torch.no_grad(), _computing_in_float32(graph.module):
            outputs = graph.module(*(t.float() if t.is_floating_point() else t for t in inputs))
        references = [t.numpy() for t in (outputs if isinstance(outputs, tuple) else (outputs,))]
        actual = runner.infer({b.name: t.numpy() for b, t in zip(graph.spec.inputs, inputs, strict=True)})
        errors = [
            np.abs(actual[b.name].astype(np.float32) - reference)
            for b, reference in zip(graph.spec.outputs, references, strict=True)
        ]
        largest = [float(np.abs(reference).max()) for reference in references]
        allowed = [tolerance * max(value, 1.0) for value in largest]
        # The row is of the output that comes nearest to what is allowed, or beyond; NaN is beyond.
        shares = [np.nan_to_num(error.max() / most, nan=np.inf) for error, most in zip(errors, allowed, strict=True)]
        worst = int(np.argmax(shares))
        row = {
            **sizes,
            "max_error": float(errors[worst].max()),
            "mean_error": float(errors[worst].mean()),
            "max_value": largest[worst],
            "tolerance": allowed[worst],
        }
        if not row["max_error"] <= row["tolerance"]:  # NaN fails too
            raise ParityError(
                f"{engine}/{graph.spec.name}: the compiled graph differs from its torch module by "
                f"{row['max_error']:.3g} (tolerance {row['tolerance']:.3g}) at {sizes}. It was not installed."
            )
        rows.append(row)
    return rows


@contextlib.contextmanager
def _computing_in_float32(module: nn.Module) -> Iterator[None]:
    """Half-precision weights are converted while their layer runs: no CPU is quick in float16, and converting them all
    takes twice their memory. Small ones are converted at once; modules read their type, and T5 its table, from outside.
    """
    originals: list[tuple[nn.Module, str, nn.Parameter]] = []

    def convert(layer: nn.Module, names: list[str]) -> None:
        for name in names:
            half = layer._parameters[name]
            assert half is not None
            originals.append((layer, name, half))
            layer._parameters[name] = nn.Parameter(half.float(), requires_grad=False)

    def restore(kept: int = 0) -> None:
        while len(originals) > kept:
            layer, name, half = originals.pop()
            layer._parameters[name] = half

    def convert_while_running(layer: nn.Module, names: list[str]) -> list[RemovableHandle]:
        return [
            layer.register_forward_pre_hook(lambda *_: convert(layer, names)),
            layer.register_forward_hook(lambda *_: restore(len(originals) - len(names))),
        ]

    hooks: list[RemovableHandle] = []
    for layer in module.modules():
        half = {n: p for n, p in layer.named_parameters(recurse=False) if p.dtype != torch.float32}
        large = [name for name, parameter in half.items() if parameter.nbytes > _SMALL]
        convert(layer, [name for name in half if name not in large])
        if large:
            hooks += convert_while_running(layer, large)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        restore()


class DetachedRunner(OrtRunner):
    """A model that is on its way to another compiler, on ONNX Runtime's CPU: as it is, no operator replaced or folded.

    Weights are read where they are, and converted one operator at a time where the CPU lacks a kernel for their type:
    T5-XXL needs no second copy.
    """

    def __init__(self, model: DetachedModel):
        options = session_options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_cpu_mem_arena = False
        self._weights = [
            ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, ir.tensor(array).dtype)
            for array in model.weights.values()
        ]
        options.add_external_initializers(list(model.weights), self._weights)
        self._session = ort.InferenceSession(model.graph, options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]


def in_float32(model: DetachedModel) -> DetachedModel:
    """A bfloat16 graph that computes in float32, for ONNX Runtime's CPU, which has no bfloat16: same weights and nodes.

    What it cannot show is the rounding of bfloat16 itself.
    """
    graph = ir.from_proto(onnx.load_from_string(model.graph))
    for node in graph.graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.BFLOAT16:
            node.attributes.add(ir.AttrInt64("to", ir.DataType.FLOAT))
        for value in node.outputs:
            if value.dtype == ir.DataType.BFLOAT16:
                value.dtype = ir.DataType.FLOAT
    for value in list(graph.graph.initializers.values()):
        if value.dtype == ir.DataType.BFLOAT16:
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
            for use in list(value.uses()):
                if use.node is not cast:
                    use.node.replace_input_with(use.idx, cast.outputs[0])
            graph.graph.insert_before(graph.graph[0], cast)
    return DetachedModel(ir.to_proto(graph).SerializeToString(), model.weights)
