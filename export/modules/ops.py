"""Attention as custom operators, so that every backend can choose its own kernels for it.

On export each becomes one ONNX `Attention` node, named after its operator: what a backend then replaces or keeps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # [N, heads, S or L, d]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).contiguous()


@torch.library.custom_op("show1::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v per head, heads side by side in the last axis (Vaswani et al. 2017, eq. 1).

    q [N, S, heads * d], k and v [N, L, heads * d] -> [N, S, heads * d]. For the pixels of a frame: few, long rows.
    """
    return _attention(q, k, v, num_heads)


@torch.library.custom_op("show1::temporal_attention", mutates_args=())
def temporal_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """The same for the frames of a pixel: very many rows (one per pixel) of 2 to 32 tokens suit other kernels."""
    return _attention(q, k, v, num_heads)


@attention.register_fake
@temporal_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    return torch.empty_like(q)
