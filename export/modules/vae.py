"""The latent stage's autoencoder (Stable Diffusion's), on diffusers' layers, split into its two directions."""

from collections.abc import Mapping
from typing import Any

from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from export.modules.layers import GroupNorm, as_binding
from export.modules.ops import attention


class _Attention:
    """Attention processor that keeps the operation whole for the backends (see `export.modules.ops`)."""

    def __call__(self, attn: Attention, x: Tensor, *_: Any, temb: Tensor | None = None, **__: Any) -> Tensor:
        n, c, h, w = x.shape
        y = attn.group_norm(x).flatten(2).transpose(1, 2)
        y = attention(attn.to_q(y), attn.to_k(y), attn.to_v(y), attn.heads)
        return x + attn.to_out[0](y).transpose(1, 2).reshape(n, c, h, w)


def autoencoder(config: Mapping[str, Any]) -> AutoencoderKL:
    vae = AutoencoderKL.from_config(dict(config))
    vae.set_attn_processor(_Attention())
    for module in list(vae.modules()):
        for name, child in module.named_children():
            if type(child) is nn.GroupNorm:  # float32 statistics in every precision
                setattr(module, name, GroupNorm(child.num_groups, child.num_channels, child.eps))
    return vae


class VAEEncoder(nn.Module):
    """image [N, 3, H, W] in [-1, 1] -> mean and logvar of the latents, each [N, 4, H/8, W/8]; unscaled."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        moments = self.quant_conv(self.encoder(image.to(self.quant_conv.weight.dtype)))
        mean, logvar = as_binding(moments).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)


class VAEDecoder(nn.Module):
    """latents [N, 4, H/8, W/8], already divided by the scaling factor -> image [N, 3, H, W], unclamped."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv

    def forward(self, latents: Tensor) -> Tensor:
        return as_binding(self.decoder(self.post_quant_conv(latents.to(self.post_quant_conv.weight.dtype))))
