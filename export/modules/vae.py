"""The latent stage's autoencoder (Stable Diffusion's AutoencoderKL), under its published parameter names."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from export.modules.layers import ACTIVATIONS, GroupNorm, as_binding
from export.modules.ops import attention

_EPS = 1e-6

# What the published class could do and Stable Diffusion's autoencoders never ask for.
_FIXED = {
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}


def downscaling(config: Mapping[str, Any]) -> int:
    """How many times as wide and high a frame is as its latents: every level but the last halves."""
    return 2 ** (len(config["block_out_channels"]) - 1)


class VAEResnet(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int, act: str):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, _EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels, _EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.act = ACTIVATIONS[act]

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.act(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(self.act(self.norm2(h)))


class VAEAttention(nn.Module):
    """One head over all pixels."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, _EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = self.group_norm(x).flatten(2).transpose(1, 2)
        y = attention(self.to_q(y), self.to_k(y), self.to_v(y), 1)
        return x + self.to_out[0](y).transpose(1, 2).reshape(n, c, h, w)


class _Downsample(nn.Module):
    """Half the size; the padding that stride 2 needs lies right and below only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Block(nn.Module):
    """One level: resnets, then a sampler (`samplers`, under its published name) on all levels but the last."""

    def __init__(self, i: int, o: int, layers: int, groups: int, act: str, **samplers: nn.Module):
        super().__init__()
        self.resnets = nn.ModuleList(VAEResnet(i if n == 0 else o, o, groups, act) for n in range(layers))
        self.samplers = list(samplers)
        for name, sampler in samplers.items():
            self.add_module(name, nn.ModuleList([sampler]))

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for name in self.samplers:
            x = getattr(self, name)[0](x)
        return x


class _Mid(nn.Module):
    def __init__(self, channels: int, groups: int, act: str):
        super().__init__()
        self.resnets = nn.ModuleList(VAEResnet(channels, channels, groups, act) for _ in range(2))
        self.attentions = nn.ModuleList([VAEAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class _Coder(nn.Module):
    """Either direction: convolution, blocks, norm, convolution. The encoder's middle follows its blocks."""

    def __init__(self, io: tuple[int, int], channels: list[int], layers: int, groups: int, act: str, encoder: bool):
        super().__init__()
        first, last = channels[0], channels[-1]
        blocks = []
        for level, o in enumerate(channels):
            sampler = {"downsamplers": _Downsample(o)} if encoder else {"upsamplers": _Upsample(o)}
            more = sampler if level < len(channels) - 1 else {}
            blocks.append(_Block(channels[max(level - 1, 0)], o, layers, groups, act, **more))
        self.encoder = encoder
        self.conv_in = nn.Conv2d(io[0], first, 3, padding=1)
        self.add_module("down_blocks" if encoder else "up_blocks", nn.ModuleList(blocks))
        self.mid_block = _Mid(last if encoder else first, groups, act)
        self.conv_norm_out = GroupNorm(groups, last, _EPS)
        self.conv_act = ACTIVATIONS[act]
        self.conv_out = nn.Conv2d(last, io[1], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        order = [*self.down_blocks, self.mid_block] if self.encoder else [self.mid_block, *self.up_blocks]
        x = self.conv_in(x)
        for block in order:
            x = block(x)
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))


class Autoencoder(nn.Module):
    """Holds the parameters of both directions; run it through `VAEEncoder` and `VAEDecoder`."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        channels, latents = list(config["block_out_channels"]), config.get("latent_channels", 4)
        for key, value in _FIXED.items():
            if config.get(key, value) != value:
                raise ValueError(f"{key} is {config[key]!r}; supported: {value!r}")
        for direction, kind in (("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D")):
            if config[f"{direction}_block_types"] != [kind] * len(channels):
                raise ValueError(f"{direction}_block_types: supported is {kind} for each of {len(channels)} levels")
        layers, groups = config.get("layers_per_block", 1), config.get("norm_num_groups", 32)
        act = config.get("act_fn", "silu")
        pixels = config.get("in_channels", 3), config.get("out_channels", 3)
        self.encoder = _Coder((pixels[0], 2 * latents), channels, layers, groups, act, encoder=True)
        self.decoder = _Coder((latents, pixels[1]), channels[::-1], layers + 1, groups, act, encoder=False)
        self.quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1)
        self.post_quant_conv = nn.Conv2d(latents, latents, 1)


class VAEEncoder(nn.Module):
    """image [N, 3, H, W] in [-1, 1] -> mean and logvar of the latents, each [N, 4, H/8, W/8]; unscaled."""

    def __init__(self, vae: Autoencoder):
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        moments = self.quant_conv(self.encoder(image.to(self.quant_conv.weight.dtype)))
        mean, logvar = as_binding(moments).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)


class VAEDecoder(nn.Module):
    """latents [N, 4, H/8, W/8], already divided by the scaling factor -> image [N, 3, H, W], unclamped."""

    def __init__(self, vae: Autoencoder):
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv

    def forward(self, latents: Tensor) -> Tensor:
        return as_binding(self.decoder(self.post_quant_conv(latents.to(self.post_quant_conv.weight.dtype))))
