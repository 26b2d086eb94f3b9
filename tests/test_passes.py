"""Graph passes change how a graph computes, never what: each is compared with the graph that it was given."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

import onnx_ir as ir
from torch import Tensor, nn

from engines.compile_trt import detach_weights, prepare
from engines.errors import ParityError
from engines.passes import (
    decompose_attention,
    fuse_spatial_attention,
    head_size,
    is_temporal,
    pad_heads,
    split_group_norm,
    store_as_loaded,
)
from engines.spec import Axis, Binding, GraphSpec
from export.modules.layers import AddedKVAttention, TemporalTransformer
from export.parity import DetachedRunner
from export.to_onnx import trace

pytestmark = pytest.mark.torch

CHANNELS, HEADS, TEXT, FRAMES = 40, 4, 64, 3  # heads of 10 channels, as base's and interp's


class Layers(nn.Module):
    """Attention over pixels and text, then over frames: one layer of a pixel UNet."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = AddedKVAttention(CHANNELS, CHANNELS // HEADS, TEXT, groups=4, eps=1e-5)
        self.temporal = TemporalTransformer(CHANNELS, HEADS, CHANNELS // HEADS, groups=4)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        frames = x.shape[0] // text.shape[0]
        return self.temporal(self.spatial(x, self.spatial.project_text(text), frames), frames)


SPEC = GraphSpec(
    "layers",
    (Binding("x", "float32", ("images", CHANNELS, "height", 5)), Binding("text", "float32", (2, "tokens", TEXT))),
    (Binding("y", "float32", ("images", CHANNELS, "height", 5)),),
    {"images": Axis(2, 6, 64, 2), "height": Axis(2, 4, 64), "tokens": Axis(2, 7, 77)},
)


@pytest.fixture
def model() -> ir.Model:
    return _traced().clone()


@cache
def _traced() -> ir.Model:
    torch.manual_seed(0)
    module = Layers().eval().requires_grad_(False)
    return trace(module, SPEC, (torch.randn(2 * FRAMES, CHANNELS, 4, 5), torch.randn(2, 7, TEXT)))


def run(model: ir.Model) -> np.ndarray:
    """At sizes that were not traced. Takes the model's weights out of it: a model runs once."""
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((10, CHANNELS, 3, 5)), "text": rng.standard_normal((2, 9, TEXT))}
    return DetachedRunner(detach_weights(model)).infer({name: x.astype(np.float32) for name, x in feeds.items()})["y"]


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def pad_and_decompose(graph: ir.Graph) -> None:
    pad_heads(graph, 16)
    decompose_attention(graph, is_temporal)


PASSES: dict[str, Callable[[ir.Graph], None]] = {
    "fuse_spatial_attention": fuse_spatial_attention,
    "split_group_norm": split_group_norm,
    "decompose_attention": lambda graph: decompose_attention(graph, lambda node: True),
    "pad_heads": lambda graph: pad_heads(graph, 16),
    "pad_heads, then decompose_attention": pad_and_decompose,
    "store_as_loaded": store_as_loaded,
}


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_changes_the_graph_and_nothing_it_computes(model: ir.Model, name: str) -> None:
    before, expected = operators(model), run(model.clone())
    shapes = [value.shape for value in model.graph.initializers.values()]
    PASSES[name](model.graph)
    assert (operators(model), [value.shape for value in model.graph.initializers.values()]) != (before, shapes)
    np.testing.assert_allclose(run(model), expected, rtol=0, atol=2e-6)


def test_an_axis_that_tracing_fixed_is_told() -> None:
    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:2]

    bindings = [(Binding(name, "float32", ("batch", 4)),) for name in "xy"]
    with pytest.raises(ParityError, match=r"^first: tracing fixed y's batch axis at 2\.$"):
        trace(First(), GraphSpec("first", *bindings, {"batch": Axis(2, 3, 8)}), (torch.randn(3, 4),))


def test_norms_are_of_operators_that_the_cpu_and_cuda_both_have(model: ir.Model) -> None:
    """ONNX Runtime registers CUDA's InstanceNormalization for opsets below 22 alone; GroupNormalization, nowhere."""
    assert "GroupNormalization" in operators(model)
    split_group_norm(model.graph)
    assert not {"GroupNormalization", "InstanceNormalization"} & set(operators(model))


def test_only_attention_over_pixels_is_fused(model: ir.Model) -> None:
    fuse_spatial_attention(model.graph)
    left = [node for node in model.graph if node.op_type == "Attention"]
    assert len(left) == 2 and all(map(is_temporal, left))
    assert operators(model).count("MultiHeadAttention") == 1


def test_heads_of_attention_over_frames_are_padded_and_no_others(model: ir.Model) -> None:
    pad_heads(model.graph, 16)
    sizes = {is_temporal(node): head_size(node) for node in model.graph if node.op_type == "Attention"}
    assert sizes == {True: 16, False: 10}
    pad_heads(model.graph, 16)  # again: nothing left to pad, the scale is still that of 10 channels
    scales = [n.attributes["scale"].as_float() for n in model.graph if n.op_type == "Attention" and is_temporal(n)]
    assert scales == pytest.approx([10**-0.5] * 2)


def test_attention_is_decomposed_where_asked(model: ir.Model) -> None:
    decompose_attention(model.graph, is_temporal)
    assert operators(model).count("Attention") == 1
    assert operators(model).count("Softmax") == 2


@pytest.mark.parametrize(
    ("precision", "form", "left"),
    [("fp16", "fused", 3), ("fp16", "padded", 3), ("fp16", "decomposed", 1), ("fp32", "fused", 0)],
)
def test_tensorrt_is_left_attention_that_it_has_kernels_for(
    model: ir.Model, precision: str, form: str, left: int
) -> None:
    """Of three, one is over pixels, which is fused whatever is asked for."""
    prepare(model, precision, form)
    assert operators(model).count("Attention") == left


def test_weights_are_stored_as_the_checkpoint_has_them(model: ir.Model) -> None:
    store_as_loaded(model.graph)
    arrays = [value.const_value.numpy() for value in model.graph.initializers.values()]
    assert all(array.flags.c_contiguous for array in arrays)
    module = Layers()
    stored = {array.shape for array in arrays if array.ndim == 2}
    assert tuple(module.temporal.transformer_blocks[0].ff.net[2].weight.shape) in stored  # [C, 4C], not [4C, C]
