"""The two text encoders: T5 v1.1 (pixel stages) and CLIP (latent stage), under their published parameter names.

Our own, since the library's classes rename CLIP's parameters and do not trace with a free number of tokens.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.errors import CheckpointError
from export.modules.layers import LayerNorm, as_binding


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _activation(name: str, allowed: Mapping[str, Any], where: str) -> Any:
    if name not in allowed:
        raise CheckpointError(f"{where}: activation {name!r} is not supported; allowed: {', '.join(allowed)}.")
    return allowed[name]


class T5Norm(nn.Module):
    """Root mean square normalisation without mean or bias, in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (x * self.weight.float()).to(self.weight.dtype)


class T5SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int, head_dim: int, buckets: int | None):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.k = nn.Linear(dim, heads * head_dim, bias=False)
        self.v = nn.Linear(dim, heads * head_dim, bias=False)
        self.o = nn.Linear(heads * head_dim, dim, bias=False)
        if buckets:
            self.relative_attention_bias = nn.Embedding(buckets, heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """`bias` float32 [B, heads, L, L] holds positions and padding. T5 does not divide by sqrt(d)."""
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        weights = ((q @ k.transpose(-1, -2)).float() + bias).softmax(-1).to(v.dtype)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class T5FeedForward(nn.Module):
    """Gated feed-forward: [B, L, D] -> float32 [B, L, D]."""

    # wo sums thousands of products of gated activations, the one place where XXL leaves the range of float16. A power
    # of two on either side keeps its sums in range and spares the matrix being stored in float32. In float16 that is
    # exact above 2^-8; below it costs 2^-19 at most.
    _HEADROOM = 64.0

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.wi_0 = nn.Linear(dim, inner, bias=False)
        self.wi_1 = nn.Linear(dim, inner, bias=False)
        self.wo = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = _gelu_tanh(self.wi_0(x)) * self.wi_1(x)
        return self.wo(x / self._HEADROOM).float() * self._HEADROOM


class T5Layer(nn.Module):
    """A residual sub-layer; the published names are `SelfAttention` and `DenseReluDense`."""

    def __init__(self, dim: int, eps: float, **body: nn.Module):
        super().__init__()
        self.layer_norm = T5Norm(dim, eps)
        ((self.body, module),) = body.items()
        self.add_module(self.body, module)

    def forward(self, x: Tensor, *bias: Tensor) -> Tensor:
        return x + getattr(self, self.body)(self.layer_norm(x), *bias).float()


class T5Encoder(nn.Module):
    """T5 v1.1 encoder (Raffel et al. 2020): input_ids, attention_mask int64 [B, L] -> prompt_embeds [B, L, D].

    The residual stream is float32 in every precision: it grows past float16 in the XXL size.
    """

    def __init__(self, config: Mapping[str, Any], where: str):
        super().__init__()
        feed_forward = config.get("feed_forward_proj", "relu")
        if feed_forward != "gated-gelu":
            raise CheckpointError(f"{where}: feed_forward_proj is {feed_forward!r}; supported: 'gated-gelu' (T5 v1.1).")
        dim, heads, eps = config["d_model"], config["num_heads"], config.get("layer_norm_epsilon", 1e-6)
        self.buckets = config.get("relative_attention_num_buckets", 32)
        self.max_distance = config.get("relative_attention_max_distance", 128)
        self.shared = nn.Embedding(config["vocab_size"], dim)
        self.encoder = nn.Module()
        self.encoder.block = nn.ModuleList()
        for i in range(config["num_layers"]):
            attention = T5SelfAttention(dim, heads, config["d_kv"], self.buckets if i == 0 else None)
            block = nn.Module()
            block.layer = nn.ModuleList(
                [
                    T5Layer(dim, eps, SelfAttention=attention),
                    T5Layer(dim, eps, DenseReluDense=T5FeedForward(dim, config["d_ff"])),
                ]
            )
            self.encoder.block.append(block)
        self.encoder.final_layer_norm = T5Norm(dim, eps)

    def _position_bias(self, length: int) -> Tensor:
        """float32 [heads, L, L]: exact buckets near, logarithmic ones far, one half of them for each direction."""
        position = torch.arange(length, device=self.shared.weight.device)
        distance = position[None, :] - position[:, None]
        half = self.buckets // 2
        exact = half // 2
        far = exact + (
            torch.log(distance.abs().clamp(min=1).float() / exact)
            / math.log(self.max_distance / exact)
            * (half - exact)
        ).long().clamp(max=half - exact - 1)
        bucket = torch.where(distance.abs() < exact, distance.abs(), far) + (distance > 0) * half
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        return table(bucket).float().permute(2, 0, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        padding = (1 - attention_mask.float()) * torch.finfo(torch.float32).min
        bias = self._position_bias(input_ids.shape[1]) + padding[:, None, None]
        x = self.shared(input_ids).float()
        for block in self.encoder.block:
            x = block.layer[0](x, bias)
            x = block.layer[1](x)
        return as_binding(self.encoder.final_layer_norm(x))


class CLIPLayer(nn.Module):
    def __init__(self, dim: int, heads: int, inner: int, eps: float, act: Any):
        super().__init__()
        self.heads, self.act = heads, act
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(dim, dim) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.layer_norm1 = LayerNorm(dim, eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, inner), "fc2": nn.Linear(inner, dim)})
        self.layer_norm2 = LayerNorm(dim, eps)

    def forward(self, x: Tensor, causal: Tensor) -> Tensor:
        y = self.layer_norm1(x)
        q, k, v = (
            self.self_attn[f"{name}_proj"](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("q", "k", "v")
        )
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        weights = (scores.float() + causal).softmax(-1).to(v.dtype)
        x = x + self.self_attn["out_proj"]((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](self.act(self.mlp["fc1"](self.layer_norm2(x))))


class CLIPTextEncoder(nn.Module):
    """CLIP's text tower (Radford et al. 2021): input_ids int64 [B, L] -> prompt_embeds [B, L, D], all tokens.

    Causal, padding attended, final layer norm applied: what the reference hands to the latent stage.
    """

    def __init__(self, config: Mapping[str, Any], where: str):
        super().__init__()
        dim, eps = config["hidden_size"], config.get("layer_norm_eps", 1e-5)
        if dim % config["num_attention_heads"]:
            raise ValueError(f"hidden_size {dim} is no multiple of num_attention_heads")
        activations = {"gelu": F.gelu, "quick_gelu": _quick_gelu}
        act = _activation(config.get("hidden_act", "quick_gelu"), activations, where)
        self.text_model = nn.Module()
        self.text_model.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(config["vocab_size"], dim),
                "position_embedding": nn.Embedding(config.get("max_position_embeddings", 77), dim),
            }
        )
        self.text_model.encoder = nn.Module()
        self.text_model.encoder.layers = nn.ModuleList(
            CLIPLayer(dim, config["num_attention_heads"], config["intermediate_size"], eps, act)
            for _ in range(config["num_hidden_layers"])
        )
        self.text_model.final_layer_norm = LayerNorm(dim, eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        embeddings = self.text_model.embeddings
        length = input_ids.shape[1]
        x = embeddings["token_embedding"](input_ids) + embeddings["position_embedding"].weight[:length]
        position = torch.arange(length, device=input_ids.device)
        causal = (position[None, :] > position[:, None]).float() * torch.finfo(torch.float32).min
        for layer in self.text_model.encoder.layers:
            x = layer(x, causal)
        return as_binding(self.text_model.final_layer_norm(x))
