"""Graph passes: an ONNX graph rewritten for what a backend does best. Each computes the same, in another order."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir


def is_temporal(node: ir.Node) -> bool:
    """Attention nodes are named after their custom operator (`export.modules.ops`)."""
    return "temporal" in (node.name or "")


def head_size(node: ir.Node) -> int:
    """Channels per head of an Attention node."""
    q = node.inputs[0]
    assert q is not None and q.shape is not None and isinstance(q.shape[-1], int)
    return q.shape[-1] // node.attributes["q_num_heads"].as_int()


def fuse_spatial_attention(graph: ir.Graph) -> None:
    """Attention over pixels becomes ONNX Runtime's MultiHeadAttention, whose kernels never hold the S x L weights.

    The ONNX operator's CPU kernel does: 61 GB for 58 frames of 80 x 144 latents. Attention over frames is left alone:
    it is 2 to 3.5 times faster there (a tiled kernel has nothing to gain on rows of 5 to 8 tokens).
    """
    for node in graph:
        if node.op_type == "Attention" and not is_temporal(node):
            heads = node.attributes["q_num_heads"]
            node.domain, node.op_type = "com.microsoft", "MultiHeadAttention"
            node.attributes.clear()
            node.attributes.add(ir.AttrInt64("num_heads", heads.as_int()))
            graph.opset_imports["com.microsoft"] = 1


def split_group_norm(graph: ir.Graph) -> None:
    """Group normalisation becomes layer normalisation of the groups, then scale and bias of the channels.

    ONNX Runtime's CPU has no kernel for GroupNormalization and inlines it to nine passes over memory; these are five.
    InstanceNormalization fits as well (a norm is 1.5 to 2.8 times faster by it than inlined, a step up to 4 % faster
    than by this), but from opset 22 on ONNX Runtime (1.31) has no CUDA kernel for it, and every norm of a network on
    the card would be computed by the CPU.
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
        name = node.outputs[0].name
        by_group = constant(tape, f"{name}_groups", np.array([0, groups, -1]))
        per_channel = constant(tape, f"{name}_channels", np.array([-1] + [1] * (len(x.shape) - 2)))
        one = constant(tape, f"{name}_one", np.ones(1, dtype))
        y = tape.op("Reshape", [x, by_group])
        ones = tape.op("Expand", [one, tape.op("Shape", [y], {"start": 2})])
        y = tape.op("LayerNormalization", [y, ones], {"axis": -1, "epsilon": epsilon})
        y = tape.op("Reshape", [y, tape.op("Shape", [x])])
        y = tape.op("Mul", [y, tape.op("Reshape", [scale, per_channel])])
        y = tape.op("Add", [y, tape.op("Reshape", [bias, per_channel])])
        ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [y])


def unsigned_activations(graph: ir.Graph) -> None:
    """Activations that pass through int8 around 0 pass through uint8 around 128: the same numbers.

    ONNX Runtime's integer kernels on x86-64 take these; with both sides signed they are up to three times slower, and
    its own conversion (1.31) leaves graphs that it does not load.
    """
    for node in graph:
        if node.op_type != "QuantizeLinear":
            continue
        zero = node.inputs[2]
        assert zero is not None
        middle = ir.tensor(np.array(128, np.uint8), name=zero.name)
        zero.const_value, zero.type = middle, ir.TensorType(ir.DataType.UINT8)
        integers = node.outputs[0]
        if integers.type is not None:
            integers.type = ir.TensorType(ir.DataType.UINT8)


def decompose_attention(graph: ir.Graph, where: Callable[[ir.Node], bool]) -> None:
    """Attention nodes for which `where` holds become MatMul, Softmax (in float32) and MatMul."""
    for node in list(graph):
        if node.op_type != "Attention" or not where(node):
            continue
        q, k, v = node.inputs
        assert q is not None and k is not None and v is not None
        heads, dtype = node.attributes["q_num_heads"].as_int(), q.dtype or ir.DataType.FLOAT
        scale = node.attributes["scale"].as_float() if "scale" in node.attributes else head_size(node) ** -0.5
        tape = ir.tape.Tape(graph)
        name = node.outputs[0].name
        split = constant(tape, f"{name}_split", np.array([0, 0, heads, -1]))
        join = constant(tape, f"{name}_join", np.array([0, 0, -1]))
        factor = constant(tape, f"{name}_scale", np.array(scale, dtype.numpy()))
        q, k, v = (
            tape.op("Transpose", [tape.op("Reshape", [x, split])], {"perm": perm})  # [N, heads, S, d], k: [.., d, L]
            for x, perm in ((q, [0, 2, 1, 3]), (k, [0, 2, 3, 1]), (v, [0, 2, 1, 3]))
        )
        # Scaled before the product, which could leave the range of float16.
        scores = tape.op("MatMul", [tape.op("Mul", [q, factor]), k])
        weights = tape.op("Softmax", [tape.op("Cast", [scores], {"to": ir.DataType.FLOAT})], {"axis": -1})
        y = tape.op("MatMul", [tape.op("Cast", [weights], {"to": dtype}), v])
        y = tape.op("Reshape", [tape.op("Transpose", [y], {"perm": [0, 2, 1, 3]}), join])
        ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [y])


def pad_heads(graph: ir.Graph, multiple: int) -> None:
    """Attention over frames gets heads of a multiple of channels: zeros in the projections' weights. Exact.

    Zeros in q and k add nothing to their product, zeros in v make channels that zero rows of the output projection
    read. Show-1's heads of 10, 12, 15 and 20 channels are not what matrix units load.
    """
    for node in graph:
        if node.op_type != "Attention" or not is_temporal(node):
            continue
        size, heads = head_size(node), node.attributes["q_num_heads"].as_int()
        padding = -size % multiple
        if not padding:
            continue
        output = node.outputs[0]
        (reader,) = (use.node for use in output.uses())
        producers = [value.producer() for value in node.inputs if value is not None]
        if any(p is None or p.op_type != "MatMul" for p in (*producers, reader)):
            raise ValueError(f"{node.name}: not between projections")
        for producer in producers:
            assert producer is not None
            _pad_weight(graph, producer, heads, size, padding, axis=1)
            projected = producer.outputs[0]
            assert projected.shape is not None
            projected.shape = ir.Shape([*projected.shape[:-1], heads * (size + padding)])
        _pad_weight(graph, reader, heads, size, padding, axis=0)
        assert output.shape is not None
        output.shape = ir.Shape([*output.shape[:-1], heads * (size + padding)])
        node.attributes.add(ir.AttrFloat32("scale", size**-0.5))  # of the unpadded size


def _pad_weight(graph: ir.Graph, matmul: ir.Node, heads: int, size: int, padding: int, axis: int) -> None:
    """Zeros behind every head along an axis of a projection's weight [inputs, outputs]."""
    weight = matmul.inputs[1]
    if weight is None or weight.const_value is None:
        raise ValueError(f"{matmul.name}: its weight is not a constant")
    array = weight.const_value.numpy()
    split = array.reshape(*array.shape[:axis], heads, size, *array.shape[axis + 1 :])
    widths = [(0, 0)] * split.ndim
    widths[axis + 1] = (0, padding)
    padded = np.pad(split, widths).reshape(*array.shape[:axis], heads * (size + padding), *array.shape[axis + 1 :])
    matmul.replace_input_with(1, _weight(graph, f"{weight.name}_padded", padded))
    if not weight.uses():
        del graph.initializers[str(weight.name)]


def store_as_loaded(graph: ir.Graph) -> None:
    """Weights that tracing transposed are stored as the checkpoint has them, and transposed by a node.

    So they stay views of the checkpoint's file, which takes no memory of its own; compilers fold the node.
    """
    for name, value in list(graph.initializers.items()):
        assert value.const_value is not None
        array = value.const_value.numpy()
        if array.ndim != 2 or array.flags.c_contiguous or not array.T.flags.c_contiguous:
            continue
        transpose = ir.node("Transpose", [_weight(graph, f"{name}_T", array.T)], {"perm": [1, 0]})
        transpose.outputs[0].type, transpose.outputs[0].shape = value.type, value.shape
        graph.insert_before(graph[0], transpose)
        ir.convenience.replace_all_uses_with(value, transpose.outputs[0])
        del graph.initializers[name]


def _weight(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def constant(tape: ir.tape.Tape, name: str, array: np.ndarray) -> ir.Value:
    return tape.initializer(ir.tensor(array, name=name))
