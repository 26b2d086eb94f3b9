"""Attention as custom operators, so that every backend can choose its own kernels for it.

On export each becomes one ONNX `Attention` node, named after its operator: what a backend then replaces or keeps.
The operators have no derivative: where one is asked for, in training, plain arithmetic runs instead.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # [N, heads, S or L, d]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).contiguous()


@torch.library.custom_op("show1::attention", mutates_args=())
def _attention_op(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    return _attention(q, k, v, num_heads)


@torch.library.custom_op("show1::temporal_attention", mutates_args=())
def _temporal_attention_op(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    return _attention(q, k, v, num_heads)


@_attention_op.register_fake
@_temporal_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    return torch.empty_like(q)


def attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v per head, heads side by side in the last axis (Vaswani et al. 2017, eq. 1).

    q [N, S, heads * d], k and v [N, L, heads * d] -> [N, S, heads * d]. For the pixels of a frame: few, long rows.
    """
    return _plain(q, k, v, num_heads) if q.requires_grad else _attention_op(q, k, v, num_heads)


def temporal_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """The same for the frames of a pixel: very many rows (one per pixel) of few tokens suit other kernels."""
    return _plain(q, k, v, num_heads) if q.requires_grad else _temporal_attention_op(q, k, v, num_heads)


def _plain(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """By matrix products, for training: what is trained is small, and fused kernels have room for 65,535 rows on a GPU
    and slow derivatives on a CPU."""
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)
