"""ONNX Runtime's compiler: the graph itself, with the operators that its kernels do best, and its weights beside it."""

from pathlib import Path

import numpy as np
import onnx_ir as ir

BACKEND = "onnxruntime"
OPSET = 23


def compile_ort(model: ir.Model, plan: Path, weights: Path) -> None:
    """Write `plan` (ONNX) and `weights` beside it, ready for an ONNX Runtime session on any of its providers."""
    fuse_spatial_attention(model.graph)
    split_group_norm(model.graph)
    ir.save(model, plan, external_data=weights.name)


def fuse_spatial_attention(graph: ir.Graph) -> None:
    """Attention over pixels becomes ONNX Runtime's MultiHeadAttention, whose kernels never hold the S x L weights.

    The ONNX operator's CPU kernel does: 61 GB for 58 frames of 80 x 144 latents. Attention over frames is left alone:
    it is 2 to 3.5 times faster there (a tiled kernel has nothing to gain on rows of 5 to 8 tokens). The same sum in
    another order.
    """
    for node in graph:
        if node.op_type == "Attention" and "temporal" not in (node.name or ""):
            heads = node.attributes["q_num_heads"]
            node.domain, node.op_type = "com.microsoft", "MultiHeadAttention"
            node.attributes.clear()
            node.attributes.add(ir.AttrInt64("num_heads", heads.as_int()))
            graph.opset_imports["com.microsoft"] = 1


def split_group_norm(graph: ir.Graph) -> None:
    """Group normalisation becomes instance normalisation of the groups, then scale and bias of the channels.

    ONNX Runtime's CPU has no kernel for GroupNormalization and inlines it to nine passes over memory; these are five,
    1.5 to 2.8 times faster. The same sums in another order.
    """
    for node in list(graph):
        if node.op_type != "GroupNormalization":
            continue
        x, scale, bias = node.inputs
        assert x is not None and scale is not None and bias is not None and x.shape is not None
        groups = node.attributes["num_groups"].as_int()
        epsilon = node.attributes["epsilon"].as_float()
        dtype = (scale.dtype or ir.DataType.FLOAT).numpy()
        tape = ir.tape.Tape(graph)
        by_group = tape.initializer(ir.tensor(np.array([0, groups, -1]), name=f"{node.outputs[0].name}_groups"))
        per_channel = tape.initializer(
            ir.tensor(np.array([-1] + [1] * (len(x.shape) - 2)), name=f"{node.outputs[0].name}_channels")
        )
        ones = tape.initializer(ir.tensor(np.ones(groups, dtype), name=f"{node.outputs[0].name}_ones"))
        zeros = tape.initializer(ir.tensor(np.zeros(groups, dtype), name=f"{node.outputs[0].name}_zeros"))
        y = tape.op("Reshape", [x, by_group])
        y = tape.op("InstanceNormalization", [y, ones, zeros], {"epsilon": epsilon})
        y = tape.op("Reshape", [y, tape.op("Shape", [x])])
        y = tape.op("Mul", [y, tape.op("Reshape", [scale, per_channel])])
        y = tape.op("Add", [y, tape.op("Reshape", [bias, per_channel])])
        ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [y])
