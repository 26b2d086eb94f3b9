"""INT8: which layers of a graph can take it, how exact each is, and the graph rewritten with explicit Q/DQ nodes.

Symmetric, so that one graph serves TensorRT and ONNX Runtime: weights by output channel, activations by tensor
(Wu et al. 2020, arXiv 2004.09602). A layer is a convolution or a product with constant weights; it is quantised as a
whole ("int8": what it reads, its weights, and what a convolution writes), in its weights alone ("weights": half the
memory of half precision, the arithmetic as before), or not ("float").
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from engines.catalog import UNETS
from engines.passes import constant

Mode = Literal["int8", "weights", "float"]
_LEVELS = 127  # on either side of 0: -128 is left out, as symmetric scales have it
_LEAST_WEIGHTS = 256  # below, a layer's scales weigh as much as what they save


@dataclass(frozen=True)
class LayerPlan:
    """How a layer is quantised. `reads` and `writes` are the largest magnitudes that calibration saw."""

    mode: Mode
    reads: float = 0.0
    writes: float = 0.0


def main_graph(engine: str) -> str:
    """The graph that does an engine's work: of a UNet the step, of others their only one."""
    if engine in UNETS:
        return "step"
    return "decode" if engine == "vae_decoder" else "encode"


def layers(graph: ir.Graph) -> dict[str, ir.Node]:
    """Layers that can be quantised, by node name, in the graph's order.

    Left out: the first and the last convolution, vectors (time embeddings and what they become in every block), and
    weights too small to matter.
    """
    found = {str(node.name): node for node in graph if node.op_type in ("Conv", "MatMul") and _fits(node)}
    convolutions = [str(node.name) for node in graph if node.op_type == "Conv"]
    for name in {*convolutions[:1], *convolutions[-1:]}:
        found.pop(name, None)
    return found


def _fits(node: ir.Node) -> bool:
    x, weight = node.inputs[:2]
    assert x is not None and weight is not None
    if weight.const_value is None or weight.const_value.size < _LEAST_WEIGHTS or x.shape is None:
        return False
    return len(x.shape) > 2 and x.const_value is None


def observe(model: ir.Model) -> ir.Model:
    """A copy whose output is the largest magnitudes that each layer reads and writes, [2 * layers], in reverse."""
    model = model.clone()
    tape = ir.tape.Tape(model.graph)
    largest = [
        tape.op("ReduceMax", [tape.op("Abs", [value])], {"keepdims": 0})
        for node in layers(model.graph).values()
        for value in (node.inputs[0], node.outputs[0])
    ]
    return _with_output(model, tape, largest)


def compare(model: ir.Model, ranges: Mapping[str, tuple[float, float]]) -> ir.Model:
    """A copy in which every layer also runs quantised on what it reads in full precision.

    Its output is, by layer, the energy of what it writes, of int8's error and of the error of int8 weights alone,
    [3 * layers], in reverse. `ranges` are (reads, writes) by layer.
    """
    model = model.clone()
    tape = ir.tape.Tape(model.graph)
    energies = []
    for name, node in layers(model.graph).items():
        x, y = node.inputs[0], node.outputs[0]
        energies.append(_energy(tape, y))
        weight = _dequantized(tape, node)
        for quantized in (_int8(tape, node, x, weight, LayerPlan("int8", *ranges[name])), _call(tape, node, x, weight)):
            energies.append(_energy(tape, tape.op("Sub", [quantized, y])))
    return _with_output(model, tape, energies)


def quantize(model: ir.Model, plans: Mapping[str, LayerPlan]) -> None:
    """Rewrite a model in place as `plans` say, by layer. Raises KeyError for a layer that the graph does not have."""
    graph = model.graph
    known = layers(graph)
    for name, plan in plans.items():
        node = known[name]
        if plan.mode == "float":
            continue
        tape = ir.tape.Tape(graph)
        weight = _dequantized(tape, node)
        y = (
            _int8(tape, node, node.inputs[0], weight, plan)
            if plan.mode == "int8"
            else _call(tape, node, node.inputs[0], weight)
        )
        old = node.inputs[1]
        assert old is not None
        ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [y])
        if not old.uses():
            del graph.initializers[str(old.name)]


def _int8(tape: ir.tape.Tape, node: ir.Node, x: ir.Value | None, weight: ir.Value, plan: LayerPlan) -> ir.Value:
    y = _call(tape, node, _through_int8(tape, x, plan.reads, f"{node.name}_reads"), weight)
    # ONNX Runtime's integer convolution writes integers; its integer product, and TensorRT, need not.
    return _through_int8(tape, y, plan.writes, f"{node.name}_writes") if node.op_type == "Conv" else y


def _call(tape: ir.tape.Tape, node: ir.Node, x: ir.Value | None, weight: ir.Value) -> ir.Value:
    """The layer's operator on other inputs."""
    new = tape.op(node.op_type, [x, weight, *node.inputs[2:]], {a.name: a for a in node.attributes.values()})
    new.type, new.shape = node.outputs[0].type, node.outputs[0].shape
    return new


def _through_int8(tape: ir.tape.Tape, x: ir.Value | None, largest: float, name: str) -> ir.Value:
    assert x is not None
    dtype = (x.dtype or ir.DataType.FLOAT).numpy()
    scale = np.array(max(largest / _LEVELS, _least_scale(dtype)), dtype)
    constants = [constant(tape, f"{name}_scale", scale), constant(tape, f"{name}_zero", np.array(0, np.int8))]
    y = tape.op("DequantizeLinear", [tape.op("QuantizeLinear", [x, *constants]), *constants])
    y.type, y.shape = x.type, x.shape
    return y


def _dequantized(tape: ir.tape.Tape, node: ir.Node) -> ir.Value:
    """The layer's weights from int8, with a scale for every output channel."""
    value = node.inputs[1]
    assert value is not None and value.const_value is not None
    weight = value.const_value.numpy()
    axis = 0 if node.op_type == "Conv" else weight.ndim - 1
    integers, scale = quantize_weight(weight, axis)
    name = str(node.name)
    constants = [
        constant(tape, f"{name}_int8", integers),
        constant(tape, f"{name}_scale", scale),
        constant(tape, f"{name}_zero", np.zeros(scale.shape, np.int8)),
    ]
    return tape.op("DequantizeLinear", constants, {"axis": axis})


def quantize_weight(weight: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 by channel of `axis`: integers of the weight's shape, and a scale of its type per channel."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    largest = np.abs(weight.astype(np.float32)).max(axis=others, keepdims=True)
    scale = np.maximum(largest / _LEVELS, _least_scale(weight.dtype)).astype(weight.dtype)
    integers = np.clip(np.rint(weight.astype(np.float32) / scale.astype(np.float32)), -_LEVELS, _LEVELS)
    return integers.astype(np.int8, order="C"), scale.reshape(-1)


def _least_scale(dtype: np.dtype) -> float:
    """Of what is zero, or nearly. float16's smallest normal number would take levels from weights below 0.008."""
    limits = np.finfo(dtype)
    return float(limits.smallest_subnormal if dtype == np.float16 else limits.tiny)


def _energy(tape: ir.tape.Tape, x: ir.Value) -> ir.Value:
    return tape.op("ReduceSumSquare", [x], {"keepdims": 0})


def _with_output(model: ir.Model, tape: ir.tape.Tape, scalars: list[ir.Value]) -> ir.Model:
    """The model with one output: the scalars side by side, float32, in reverse.

    For ONNX Runtime runs what the last input needs first. That of the last scalar is all of the graph, and every
    activation would wait in memory for its own: of published sr2 150 GB, by reckoning.
    """
    axes = constant(tape, "scalar_axes", np.array([0]))
    rows = [tape.op("Unsqueeze", [scalar, axes]) for scalar in reversed(scalars)]
    result = tape.op("Concat", rows, {"axis": 0})
    result.name, result.type = "scalars", ir.TensorType(ir.DataType.FLOAT)
    model.graph.extend(tape.nodes)
    model.graph.outputs[:] = [result]
    return model


def signal_to_noise(signal: float, noise: float) -> float:
    """Decibels; infinite without noise."""
    return float("inf") if noise == 0 else 10 * float(np.log10(max(signal, 1e-30) / noise))
