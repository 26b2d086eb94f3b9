"""Layers of the Show-1 UNets, under the parameter names of the published checkpoints.

Activations travel as [B*F, C, H, W] (frame index fastest); layers that mix frames are told `frames` and unfold it.
The count stays symbolic when a module is traced, so that one graph serves any number of frames.

Half-precision modules keep islands in float32 where the range or the sums of float16 do not suffice: normalisation,
the sinusoidal embedding and the softmax of text pooling.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.modules.ops import attention, temporal_attention

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "swish": F.silu}


class GroupNorm(nn.GroupNorm):
    """Group normalisation with its statistics in float32 (Wu & He 2018)."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation with its statistics in float32 (Ba et al. 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


def as_binding(x: Tensor) -> Tensor:
    """A result as a graph's output: NumPy has no bfloat16, so such networks bind float32."""
    return x.float() if x.dtype == torch.bfloat16 else x


def sinusoid(t: Tensor, channels: int, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Timestep [B] -> float32 [B, channels] (Vaswani et al. 2017, sec. 3.5); cosines first when flipped."""
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / (half - freq_shift))
    angles = t.float()[:, None] * exponent.exp()
    parts = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=-1)


class TimestepEmbedding(nn.Module):
    def __init__(self, in_channels: int, channels: int, act: str):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, channels)
        self.linear_2 = nn.Linear(channels, channels)
        self.act = ACTIVATIONS[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


class AttentionPooling(nn.Module):
    """One token that attends to all: [B, L, D] -> [B, D] (DeepFloyd IF)."""

    def __init__(self, heads: int, dim: int):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(1, dim))
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(dim=1, keepdim=True) + self.positional_embedding
        x = torch.cat([pooled, x], dim=1)
        q, k, v = (
            proj(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, 1 or L + 1, d]
            for proj, y in ((self.q_proj, pooled), (self.k_proj, x), (self.v_proj, x))
        )
        scale = q.shape[-1] ** -0.25  # on both sides: their product could leave the range of float16
        weights = ((q * scale) @ (k * scale).transpose(-1, -2)).float().softmax(-1).to(v.dtype)
        return (weights @ v).flatten(1)


class TextTimeEmbedding(nn.Module):
    """Text [B, L, D] as an addition to the time embedding [B, T]."""

    def __init__(self, text_dim: int, channels: int, heads: int):
        super().__init__()
        self.norm1 = LayerNorm(text_dim)
        self.pool = AttentionPooling(heads, text_dim)
        self.proj = nn.Linear(text_dim, channels)
        self.norm2 = LayerNorm(channels)

    def forward(self, text: Tensor) -> Tensor:
        return self.norm2(self.proj(self.pool(self.norm1(text))))


class ResnetBlock2D(nn.Module):
    """Residual block; `resample` is None, "down" (average of 2 x 2) or "up" (nearest, twice the size)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        emb_channels: int,
        groups: int,
        eps: float,
        act: str,
        time_scale_shift: str,
        skip_time_act: bool,
        out_scale_factor: float,
        resample: str | None = None,
    ):
        super().__init__()
        self.scale_shift = time_scale_shift == "scale_shift"
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb_channels, out_channels * (2 if self.scale_shift else 1))
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.act = ACTIVATIONS[act]
        self.skip_time_act = skip_time_act
        self.out_scale_factor = out_scale_factor
        self.resample = resample

    def _resample(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x

    def forward(self, x: Tensor, emb: Tensor, frames: int) -> Tensor:
        """x [B*F, C, H, W], emb [B, T]."""
        h = self.conv1(self._resample(self.act(self.norm1(x))))
        t = self.time_emb_proj(emb if self.skip_time_act else self.act(emb))
        # Projected once per batch item, then spread over its frames: [B, N] -> [B*F, N, 1, 1].
        t = t[:, None].expand(-1, frames, -1).flatten(0, 1)[..., None, None]
        if self.scale_shift:
            scale, shift = t.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + t)
        h = self.conv2(self.act(h))
        x = self._resample(x)
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return (x + h) / self.out_scale_factor if self.out_scale_factor != 1 else x + h


class Downsample2D(nn.Module):
    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, emb: Tensor, frames: int) -> Tensor:
        return self.conv(x)


class Upsample2D(nn.Module):
    """Nearest to the size of the skip it will meet (sizes need not be even), then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class TemporalConv(nn.Conv3d):
    """Convolution over three frames, [B, C, F, H*W] in and out; a (3, 1, 1) filter in the checkpoint.

    Runs as a (3, 1) filter: the same arithmetic, and kernels for two dimensions are the faster ones.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.squeeze(-1), self.bias, padding=(1, 0))


class TemporalConvLayer(nn.Module):
    """Four temporal convolutions around a residual; the Identity stands where training has its dropout."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.conv1 = nn.Sequential(GroupNorm(groups, channels), nn.SiLU(), TemporalConv(channels))
        for name in ("conv2", "conv3", "conv4"):
            layers = (GroupNorm(groups, channels), nn.SiLU(), nn.Identity(), TemporalConv(channels))
            setattr(self, name, nn.Sequential(*layers))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        bf, c, h, w = x.shape
        y = x.reshape(-1, frames, c, h * w).transpose(1, 2)  # [B, C, F, H*W]
        y = self.conv4(self.conv3(self.conv2(self.conv1(y))))
        return x + y.transpose(1, 2).reshape(bf, c, h, w)


class SelfAttention(nn.Module):
    def __init__(self, channels: int, heads: int, temporal: bool):
        super().__init__()
        self.heads = heads
        self.attention = temporal_attention if temporal else attention
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out[0](self.attention(self.to_q(x), self.to_k(x), self.to_v(x), self.heads))


class TextCrossAttention(nn.Module):
    """Queries from the image, keys and values from the text; the latter are projected once per prompt."""

    def __init__(self, channels: int, heads: int, text_dim: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(text_dim, channels, bias=False)
        self.to_v = nn.Linear(text_dim, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def project_text(self, text: Tensor) -> Tensor:
        return torch.cat([self.to_k(text), self.to_v(text)], dim=-1)

    def forward(self, x: Tensor, text_kv: Tensor) -> Tensor:
        k, v = text_kv.chunk(2, dim=-1)
        return self.to_out[0](attention(self.to_q(x), k, v, self.heads))


class GEGLU(nn.Module):
    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(channels, inner * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """Gated feed-forward, four times as wide inside (Shazeer 2020). `net.1` is dropout in the published module."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(channels, channels * 4), nn.Identity(), nn.Linear(channels * 4, channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, a second attention, GEGLU. With `text_dim` over pixels and text, without it twice over frames."""

    def __init__(self, channels: int, heads: int, text_dim: int | None = None):
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attn1 = SelfAttention(channels, heads, temporal=text_dim is None)
        self.norm2 = LayerNorm(channels)
        self.attn2 = (
            TextCrossAttention(channels, heads, text_dim) if text_dim else SelfAttention(channels, heads, temporal=True)
        )
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, *text_kv: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), *text_kv)
        return x + self.ff(self.norm3(x))


class TemporalTransformer(nn.Module):
    """Double self-attention over the frames of every pixel; no positions, no text (Show-1's temp_attentions)."""

    def __init__(self, channels: int, heads: int, head_dim: int, groups: int):
        super().__init__()
        inner = heads * head_dim
        self.norm = GroupNorm(groups, channels, 1e-6)
        self.proj_in = nn.Linear(channels, inner)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(inner, heads)])
        self.proj_out = nn.Linear(inner, channels)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        bf, c, h, w = x.shape
        y = x.reshape(-1, frames, c, h * w).transpose(1, 2)  # [B, C, F, H*W]
        y = self.norm(y).permute(0, 3, 2, 1)  # [B, H*W, F, C]
        y = self.proj_in(y.reshape(-1, frames, c))
        y = self.proj_out(self.transformer_blocks[0](y))
        return x + y.reshape(-1, h * w, frames, c).permute(0, 2, 3, 1).reshape(bf, c, h, w)


class SpatialTransformer(nn.Module):
    """Self-attention over a frame's pixels and cross-attention to the text (sr2's attentions)."""

    def __init__(self, channels: int, heads: int, text_dim: int, groups: int, linear_projection: bool):
        super().__init__()
        self.channels = channels
        self.norm = GroupNorm(groups, channels, 1e-6)
        self.linear_projection = linear_projection
        project = nn.Linear if linear_projection else lambda i, o: nn.Conv2d(i, o, 1)
        self.proj_in = project(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads, text_dim)])
        self.proj_out = project(channels, channels)

    def project_text(self, text: Tensor) -> Tensor:
        return self.transformer_blocks[0].attn2.project_text(text)

    def forward(self, x: Tensor, text_kv: Tensor, frames: int) -> Tensor:
        bf, c, h, w = x.shape
        y = self.norm(x)
        y = y if self.linear_projection else self.proj_in(y)
        y = y.flatten(2).transpose(1, 2)  # [B*F, H*W, C]
        y = self.proj_in(y) if self.linear_projection else y
        y = self.transformer_blocks[0](y, per_frame(text_kv, frames))
        y = self.proj_out(y) if self.linear_projection else y
        y = y.transpose(1, 2).reshape(bf, c, h, w)
        return x + (y if self.linear_projection else self.proj_out(y))


class AddedKVAttention(nn.Module):
    """One softmax over the text's tokens and the frame's own pixels, text first (DeepFloyd IF's attention)."""

    def __init__(self, channels: int, head_dim: int, text_dim: int, groups: int, eps: float):
        super().__init__()
        self.channels = channels
        self.heads = channels // head_dim
        self.group_norm = GroupNorm(groups, channels, eps)
        self.norm_cross = GroupNorm(32, text_dim)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.add_k_proj = nn.Linear(text_dim, channels)
        self.add_v_proj = nn.Linear(text_dim, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def project_text(self, text: Tensor) -> Tensor:
        text = self.norm_cross(text.transpose(1, 2)).transpose(1, 2)
        return torch.cat([self.add_k_proj(text), self.add_v_proj(text)], dim=-1)

    def forward(self, x: Tensor, text_kv: Tensor, frames: int) -> Tensor:
        bf, c, h, w = x.shape
        y = self.group_norm(x).flatten(2).transpose(1, 2)  # [B*F, H*W, C]
        text_k, text_v = per_frame(text_kv, frames).chunk(2, dim=-1)
        k = torch.cat([text_k, self.to_k(y)], dim=1)
        v = torch.cat([text_v, self.to_v(y)], dim=1)
        y = self.to_out[0](attention(self.to_q(y), k, v, self.heads))
        return x + y.transpose(1, 2).reshape(bf, c, h, w)


def per_frame(text: Tensor, frames: int) -> Tensor:
    """[B, L, C] -> [B*F, L, C]: every frame reads the same text."""
    return text[:, None].expand(-1, frames, -1, -1).flatten(0, 1)
