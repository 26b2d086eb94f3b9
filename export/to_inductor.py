"""AOTInductor's compiler: a torch module and its contract become a package of machine code and weights.

In half precision attention over frames is our own kernel, which reads frames where the convolutions have them: nothing
is permuted around it. Convolutions run channels-last; on CUDA they and the matrix products are chosen by timing, unless
that takes too long.
"""

import contextlib
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.decomposition import register_decomposition
from torch._inductor.package import package_aoti
from torch.nn.attention import SDPBackend, sdpa_kernel

from engines.errors import EngineError
from engines.limits import processors
from engines.memory import is_short_of_memory
from engines.spec import GraphSpec
from export.modules import ops
from export.modules.layers import (
    ACTIVATIONS,
    GroupNorm,
    ResnetBlock2D,
    SpatialTransformer,
    TemporalConv,
    TemporalConvLayer,
    TemporalTransformer,
    per_frame,
)
from export.networks import Graph
from export.to_onnx import dynamic_shapes
from runtime.runner_inductor import (
    BINDINGS,
    X86_LEVEL,
    cpu_level,
    group_norm,
    plain_temporal_attention,
    set_up_cuda,
    temporal_attention,
)

# Of frames' pixels. Not cuDNN's, which is planned for one size at a time: a package serves many, whatever it was traced
# with.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@register_decomposition(torch.ops.show1.attention.default)
def _attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    return ops._attention(q, k, v, num_heads)


@register_decomposition(torch.ops.show1.temporal_attention.default)
def _temporal_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """[B, F, P, C], see `_for_our_kernels`. The kernel takes half precision only."""
    attention = plain_temporal_attention if q.dtype == torch.float32 else temporal_attention
    return attention(q, k, v, num_heads)


def compile_inductor(graph: Graph, package: Path, target: str, autotune: bool = True) -> None:
    """Write `package` (.pt2) for `target`, which is this machine's (`runtime.runner_inductor.target`).

    On a GPU `autotune` times candidates for products and convolutions, at the sizes tuned for. The module is on the CPU
    before and afterwards, its filters then in another layout. Raises EngineError with the compiler's words.
    """
    spec, device = graph.spec, "cpu" if target.startswith("cpu") else "cuda"
    options: dict[str, Any] = {
        "aot_inductor.package": True,
        # Beside the library, which a process keeps to its end: of weights in it the disk would be kept, too.
        "aot_inductor.package_constants_on_disk_format": "binary_blob",
        "aot_inductor.metadata": {
            key: " ".join(binding.name for binding in bindings)
            for key, bindings in zip(BINDINGS, (spec.inputs, spec.outputs), strict=True)
        },
    }
    if device == "cuda":
        # The layout is forced: its heuristic gives up where shapes are dynamic.
        options |= {"max_autotune": autotune, "force_layout_optimization": True}
        set_up_cuda()
    else:  # as many threads as it will run with, not as this process has for its share of the processors
        options |= {"cpp.dynamic_threads": True, "cpp.threads": processors()}
    if cpu_level() == X86_LEVEL:  # for all processors of the level, whatever this one can do besides
        options |= {"cpp.simdlen": 256}
        if hasattr(torch._inductor.config.cpp, "march"):  # not before torch 2.13
            options |= {"cpp.march": X86_LEVEL}
    if sys.platform == "linux":
        # The C++ library that the process has. Where g++ finds the static one alone, a package would get a copy, whose
        # locales the other's parts get into: it crashes when it is loaded, at its first regular expression.
        options["aot_inductor.custom_op_libs"] = [":libstdc++.so.6"]
    inputs = graph.example(tuned_sizes(spec), torch.Generator().manual_seed(0))
    # The weights pass through here, on the bundle's disk unless the compiler would take its name for two. torch puts
    # what has a relative name among its caches, and leaves it there; kernels are cached there in any case.
    beside = package.parent.resolve()
    with (
        tempfile.TemporaryDirectory(dir=None if " " in str(beside) else beside) as scratch,
        torch.no_grad(),
        _quiet(),
    ):
        try:
            with _on(device, graph.module), _for_our_kernels(graph.module), sdpa_kernel(_ATTENTION):
                _filters_channels_last(graph.module)
                program = torch.export.export(
                    graph.module,
                    tuple(x.to(device) for x in inputs),
                    dynamic_shapes=dynamic_shapes(spec),
                    strict=False,
                )
                options["aot_inductor.output_path"] = f"{scratch}/{spec.name}"
                files = torch._inductor.aot_compile(
                    program.module(check_guards=False), *program.example_inputs, options=options
                )
                package_aoti(str(package), files)
        except Exception as error:  # its exceptions share no base class
            full = device == "cuda" and is_short_of_memory(error)
            mend = " Close what else uses the GPU, and build one engine at a time: --jobs 1." if full else ""
            raise EngineError(
                f"inductor could not build {spec.name} ({type(error).__name__}: {error}).{mend}"
            ) from error


def tuned_sizes(spec: GraphSpec) -> dict[str, int]:
    """What a profile is tuned for, with no axis of size 1 and no two of equal size, lest tracing takes one for another.

    Pixels are two at least at the coarsest level: one would be a graph of its own.
    """
    sizes: dict[str, int] = {}
    for axis, limits in spec.profile.items():
        size = max(limits.opt, 2 * limits.min if axis in ("height", "width") else 2)
        while size in sizes.values():
            size += limits.multiple
        sizes[axis] = size
    return sizes


@contextlib.contextmanager
def _on(device: str, module: nn.Module) -> Iterator[None]:
    module.to(device)
    try:
        yield
    finally:
        module.to("cpu")
        if device != "cpu":
            torch.cuda.empty_cache()  # the package, loaded next, takes its memory from the driver: of T5 as much again


def _filters_channels_last(module: nn.Module) -> None:
    """As convolutions read them: a filter in another layout would be copied in every call."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.to(memory_format=torch.channels_last)
        elif isinstance(layer, TemporalConv):  # runs in two dimensions
            filters = layer.weight.data.squeeze(-1)
            layer.weight.data = filters.to(memory_format=torch.channels_last).unsqueeze(-1)


@contextlib.contextmanager
def _for_our_kernels(module: nn.Module) -> Iterator[None]:
    """The forward functions of layers, written for the kernels and for channels-last activations.

    Our norm takes half precision only, and so do the layers that leave more to it than a norm.
    """
    forwards: dict[type[nn.Module], Any] = {
        SpatialTransformer: _spatial_transformer,
        TemporalTransformer: _temporal_transformer,
    }
    if next(module.parameters()).dtype != torch.float32:
        forwards |= {GroupNorm: _norm, ResnetBlock2D: _resnet, TemporalConvLayer: _temporal_convs}
    plain = {layer: layer.forward for layer in forwards}
    for layer, forward in forwards.items():
        layer.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer, forward in plain.items():
            layer.forward = forward  # type: ignore[method-assign]


def _norm(
    self: GroupNorm,
    x: Tensor,
    activation: str = "none",
    frames: int = 1,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """By the kernel, which is given the very tensors that layers make.

    What is seen through another shape before it is written down gets that shape's index in every element; coarse
    levels, whose sizes need not divide, fill it with divisions.
    """
    return group_norm(x, self.weight, self.bias, self.num_groups, self.eps, activation, frames, add, scale, shift)


_NAMES = {function: "silu" if name == "swish" else name for name, function in ACTIVATIONS.items()}


def _resnet(self: ResnetBlock2D, x: Tensor, emb: Tensor, frames: int) -> Tensor:
    """The first convolution's bias, scale, shift and activations are the norms'."""
    resample, act = _double if self.resample == "up" else self._resample, _NAMES[self.act]
    h = F.conv2d(resample(_norm(self.norm1, x, act)), self.conv1.weight, padding=1)
    t, bias = self.time_emb_proj(emb if self.skip_time_act else self.act(emb)), self.conv1.bias[None]
    if self.scale_shift:
        scale, shift = t.chunk(2, dim=1)
        h = _norm(self.norm2, h, act, add=bias, scale=scale, shift=shift)
    else:
        h = _norm(self.norm2, h, act, add=t + bias)
    h = self.conv2(h)
    x = resample(x)
    if self.conv_shortcut is not None:
        x = self.conv_shortcut(x)
    return (x + h) / self.out_scale_factor if self.out_scale_factor != 1 else x + h


def _temporal_convs(self: TemporalConvLayer, x: Tensor, frames: int) -> Tensor:
    """Every convolution's bias but the last one's is the next norm's."""
    bf, c, h, w = x.shape
    y = _clips(_norm(self.conv1[0], x, "silu", frames), frames)  # [B, C, F, H*W]
    for layers, following in ((self.conv1, self.conv2), (self.conv2, self.conv3), (self.conv3, self.conv4)):
        y = _taps(layers[-1], y)
        y = _norm(following[0], y, "silu", add=layers[-1].bias[None])
    y = _taps(self.conv4[-1], y).transpose(1, 2).reshape(bf, c, h, w)
    return x + (y + self.conv4[-1].bias[:, None, None])


def _taps(conv: TemporalConv, x: Tensor) -> Tensor:
    """The convolution without its bias."""
    return F.conv2d(x, conv.weight.squeeze(-1), padding=(1, 0))


def _clips(x: Tensor, frames: int) -> Tensor:
    """[B*F, C, H, W] -> [B, C, F, H*W]"""
    _, c, h, w = x.shape
    return x.reshape(-1, frames, c, h * w).transpose(1, 2)


def _temporal_transformer(self: TemporalTransformer, x: Tensor, frames: int) -> Tensor:
    """Frames stay before pixels, where channels-last activations have them; attention alone looks at the axes.

    Between the layers there are three: of four inductor would take the second for channels and put it last.
    """
    bf, c, h, w = x.shape
    if x.dtype == torch.float32:
        y = self.norm(_clips(x, frames)).permute(0, 2, 3, 1).flatten(1, 2)
    else:
        y = _norm(self.norm, x, frames=frames).permute(0, 2, 3, 1).reshape(-1, frames * h * w, c)
    y = self.proj_in(y)  # [B, F*H*W, C]
    block = self.transformer_blocks[0]
    for norm, attn in ((block.norm1, block.attn1), (block.norm2, block.attn2)):
        z = norm(y)
        q, k, v = (project(z).unflatten(1, (frames, h * w)) for project in (attn.to_q, attn.to_k, attn.to_v))
        y = y + attn.to_out[0](attn.attention(q, k, v, attn.heads).flatten(1, 2))
    y = self.proj_out(y + block.ff(block.norm3(y)))
    return x + y.view(bf, h, w, c).permute(0, 3, 1, 2)


def _spatial_transformer(self: SpatialTransformer, x: Tensor, text_kv: Tensor, frames: int) -> Tensor:
    """Projections by 1 x 1 convolutions are matrix products here, which have their biases in them."""
    bf, c, h, w = x.shape
    y = self.norm(x).flatten(2).transpose(1, 2)  # [B*F, H*W, C]
    y = F.linear(y, self.proj_in.weight.flatten(1), self.proj_in.bias)
    y = self.transformer_blocks[0](y, per_frame(text_kv, frames))
    y = F.linear(y, self.proj_out.weight.flatten(1), self.proj_out.bias)
    return x + y.transpose(1, 2).reshape(bf, c, h, w)


def _double(x: Tensor) -> Tensor:
    """Every pixel four times, [N, C, H, W] -> [N, C, 2 H, 2 W], for which inductor halves integers: its own nearest
    neighbours are found by divisions in float64."""
    n, c, h, w = x.shape
    y = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(n, h, 2, w, 2, c)
    return y.reshape(n, 2 * h, 2 * w, c).permute(0, 3, 1, 2)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch warns of its own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
