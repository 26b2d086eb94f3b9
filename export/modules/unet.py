"""The UNets of the cascade as one module: pixel (base, interpolation, sr1), single images (IF-II) and latent (sr2).

What is constant while a video is denoised is a graph of its own, `UNetContext`; `UNetStep` is what runs every step.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engines.errors import CheckpointError
from export.modules.layers import (
    ACTIVATIONS,
    AddedKVAttention,
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    SpatialTransformer,
    TemporalConvLayer,
    TemporalTransformer,
    TextTimeEmbedding,
    TimestepEmbedding,
    Upsample2D,
    as_binding,
    sinusoid,
)

ADDED_KV, CROSS = "added_kv", "cross"

# block type without its 2D/3D ending -> (attention, resampling by a residual block rather than a convolution)
BLOCKS = {
    "ResnetDownsampleBlock": (None, True),
    "SimpleCrossAttnDownBlock": (ADDED_KV, True),
    "DownBlock": (None, False),
    "CrossAttnDownBlock": (CROSS, False),
    "ResnetUpsampleBlock": (None, True),
    "SimpleCrossAttnUpBlock": (ADDED_KV, True),
    "UpBlock": (None, False),
    "CrossAttnUpBlock": (CROSS, False),
}
MID_BLOCKS = {
    "UNetMidBlock3DSimpleCrossAttn": (ADDED_KV, True),
    "UNetMidBlock2DSimpleCrossAttn": (ADDED_KV, False),
    "UNetMidBlock3DCrossAttn": (CROSS, True),
}

# What the published classes could do and the cascade's checkpoints never ask for.
FIXED = {
    "addition_embed_type": (None, "text"),
    "center_input_sample": (False,),
    "class_embed_type": (None, "timestep"),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None, "group_norm"),
    "dual_cross_attention": (False,),
    "encoder_hid_dim_type": (None, "text_proj"),
    "mid_block_only_cross_attention": (None, False),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None, *ACTIVATIONS),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "transformer_layers_per_block": (1,),
    "upcast_attention": (False,),
    "act_fn": tuple(ACTIVATIONS),
    "mid_block_type": tuple(MID_BLOCKS),
}


@dataclass(frozen=True)
class UNetConfig:
    """A published unet/config.json, read in Show-1's meaning. Lists have one entry per level, finest first."""

    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: tuple[int, ...]
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    mid_block_type: str
    attention_head_dim: tuple[int, ...]
    cross_attention_dim: int
    encoder_hid_dim: int | None
    addition_embed_type: str | None
    addition_embed_type_num_heads: int
    class_embed_type: str | None
    time_embedding_dim: int
    time_embedding_act_fn: str | None
    flip_sin_to_cos: bool
    freq_shift: float
    act_fn: str
    norm_num_groups: int
    norm_eps: float
    resnet_time_scale_shift: str
    resnet_skip_time_act: bool
    resnet_out_scale_factor: float
    mid_block_scale_factor: float
    downsample_padding: int
    use_linear_projection: bool
    transformer_in: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str) -> "UNetConfig":
        """Raises CheckpointError, naming `where`, for values that no network of the cascade has."""

        def refuse(key: str, value: Any, allowed: Any) -> CheckpointError:
            return CheckpointError(f"{where}: {key} is {value!r}; supported: {allowed}. Is this a Show-1 checkpoint?")

        for key, allowed in FIXED.items():
            if key in config and config[key] not in allowed:
                raise refuse(key, config[key], " or ".join(map(repr, allowed)))
        try:
            channels = tuple(config["block_out_channels"])
            down, up = tuple(config["down_block_types"]), tuple(config["up_block_types"])
            mid = config.get("mid_block_type", "UNetMidBlock3DCrossAttn")  # diffusers' own 3D class has no such key
            in_channels, out_channels = config["in_channels"], config["out_channels"]
            text_dim = config["cross_attention_dim"]
        except KeyError as key:
            raise CheckpointError(f"{where}: {key} is missing. Is this a UNet's config.json?") from None
        for kind in (*down, *up):
            if kind[:-2] not in BLOCKS or kind[-2:] not in ("2D", "3D"):
                raise refuse("block type", kind, ", ".join(BLOCKS) + " with 2D or 3D")

        def per_level(key: str, default: Any) -> tuple:
            value = config.get(key, default)
            values = tuple(value) if isinstance(value, list) else (value,) * len(channels)
            if len(values) != len(channels):
                raise refuse(key, value, f"one value, or one for each of the {len(channels)} levels")
            return values

        if config.get("num_attention_heads") is not None:
            raise refuse("num_attention_heads", config["num_attention_heads"], "null (Show-1 uses attention_head_dim)")
        return cls(
            in_channels=in_channels,
            out_channels=out_channels,
            block_out_channels=channels,
            layers_per_block=per_level("layers_per_block", 2),
            down_block_types=down,
            up_block_types=up,
            mid_block_type=mid,
            attention_head_dim=per_level("attention_head_dim", 8),
            cross_attention_dim=text_dim,
            encoder_hid_dim=config.get("encoder_hid_dim"),
            addition_embed_type=config.get("addition_embed_type"),
            addition_embed_type_num_heads=config.get("addition_embed_type_num_heads", 64),
            class_embed_type=config.get("class_embed_type"),
            time_embedding_dim=config.get("time_embedding_dim") or channels[0] * 4,
            time_embedding_act_fn=config.get("time_embedding_act_fn"),
            flip_sin_to_cos=config.get("flip_sin_to_cos", True),
            freq_shift=config.get("freq_shift", 0),
            act_fn=config.get("act_fn", "silu"),
            norm_num_groups=config.get("norm_num_groups", 32),
            norm_eps=config.get("norm_eps", 1e-5),
            resnet_time_scale_shift=config.get("resnet_time_scale_shift", "default"),
            resnet_skip_time_act=config.get("resnet_skip_time_act", False),
            resnet_out_scale_factor=config.get("resnet_out_scale_factor", 1.0),
            mid_block_scale_factor=config.get("mid_block_scale_factor", 1.0),
            downsample_padding=config.get("downsample_padding", 1),
            use_linear_projection=config.get("use_linear_projection", False),
            transformer_in=config.get("transfromer_in_opt", False),  # the published spelling
        )

    @property
    def text_dim(self) -> int:
        """Channels of the text that the UNet is given."""
        return self.encoder_hid_dim or self.cross_attention_dim

    @property
    def size_multiple(self) -> int:
        """Heights and widths must be multiples of this: only convolutional resamplers follow odd sizes."""
        resnet_sampler = BLOCKS[self.down_block_types[0][:-2]][1]
        return 2 ** (len(self.block_out_channels) - 1) if resnet_sampler else 1

    @property
    def temporal(self) -> bool:
        """Whether frames see each other; IF-II treats them as independent images."""
        return MID_BLOCKS[self.mid_block_type][1]


class Layers(nn.Module):
    """The layers of one block: resnet, then temporal convolution, attention, temporal attention where it has them."""

    def __init__(self, config: UNetConfig, level: int, io: list[tuple[int, int]], attention: str | None, mid: bool):
        super().__init__()
        channels = io[0][1]
        temporal = config.temporal
        self.resnets = nn.ModuleList(
            resnet(config, i, o, scale=config.mid_block_scale_factor if mid else None) for i, o in io
        )
        if temporal:
            self.temp_convs = nn.ModuleList(TemporalConvLayer(channels, config.norm_num_groups) for _ in io)
        if attention:
            count = 1 if mid else len(io)
            self.attentions = nn.ModuleList(spatial_attention(config, channels, level, attention) for _ in range(count))
            if temporal:
                # Show-1 reads attention_head_dim as the number of heads here, whatever it means for the spatial ones.
                heads = config.attention_head_dim[level]
                self.temp_attentions = nn.ModuleList(
                    TemporalTransformer(channels, heads, channels // heads, config.norm_num_groups)
                    for _ in range(count)
                )

    def layer(self, i: int, x: Tensor, emb: Tensor, texts: Iterator[Tensor], frames: int) -> Tensor:
        x = self.resnets[i](x, emb, frames)
        if hasattr(self, "temp_convs"):
            x = self.temp_convs[i](x, frames)
        if hasattr(self, "attentions") and i < len(self.attentions):
            x = self.attentions[i](x, next(texts), frames)
            if hasattr(self, "temp_attentions"):
                x = self.temp_attentions[i](x, frames)
        return x


class DownBlock(Layers):
    def __init__(self, config: UNetConfig, level: int):
        channels = config.block_out_channels
        out, previous = channels[level], channels[max(level - 1, 0)]
        attention, resnet_sampler = BLOCKS[config.down_block_types[level][:-2]]
        layers = config.layers_per_block[level]
        super().__init__(config, level, [(previous if i == 0 else out, out) for i in range(layers)], attention, False)
        if level < len(channels) - 1:
            sampler = (
                resnet(config, out, out, resample="down")
                if resnet_sampler
                else Downsample2D(out, config.downsample_padding)
            )
            self.downsamplers = nn.ModuleList([sampler])

    def forward(self, x: Tensor, emb: Tensor, texts: Iterator[Tensor], frames: int) -> list[Tensor]:
        """Every layer's output, the downsampler's last: each becomes a skip."""
        skips = self.on_level(x, emb, texts, frames)
        if hasattr(self, "downsamplers"):
            skips.append(self.downsamplers[0](skips[-1], emb, frames))
        return skips

    def on_level(self, x: Tensor, emb: Tensor, texts: Iterator[Tensor], frames: int) -> list[Tensor]:
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, emb, texts, frames)
            skips.append(x)
        return skips


class MidBlock(Layers):
    def __init__(self, config: UNetConfig):
        channels = config.block_out_channels[-1]
        super().__init__(config, -1, [(channels, channels)] * 2, MID_BLOCKS[config.mid_block_type][0], True)

    def forward(self, x: Tensor, emb: Tensor, texts: Iterator[Tensor], frames: int) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, x, emb, texts, frames)
        return x


class UpBlock(Layers):
    """Block `index` of the way up, coarsest first; each layer meets one skip, the last the finer level's."""

    def __init__(self, config: UNetConfig, index: int):
        channels = config.block_out_channels
        level = len(channels) - 1 - index
        out = channels[level]
        below = channels[level + 1] if index else channels[-1]
        last_skip = channels[max(level - 1, 0)]
        layers = config.layers_per_block[level] + 1
        attention, resnet_sampler = BLOCKS[config.up_block_types[index][:-2]]
        io = [((below if i == 0 else out) + (last_skip if i == layers - 1 else out), out) for i in range(layers)]
        # A list of head sizes is read as on the way down here, finest first, although this way is coarsest first: the
        # reference's quirk. Cross-attention looks up its own level.
        super().__init__(config, index if attention == ADDED_KV else level, io, attention, False)
        self.resnet_sampler = resnet_sampler
        if level > 0:
            self.upsamplers = nn.ModuleList(
                [resnet(config, out, out, resample="up") if resnet_sampler else Upsample2D(out)]
            )

    def forward(self, x: Tensor, emb: Tensor, texts: Iterator[Tensor], skips: list[Tensor], frames: int) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat([x, skips.pop()], dim=1), emb, texts, frames)
        if not hasattr(self, "upsamplers"):
            return x
        if self.resnet_sampler:
            return self.upsamplers[0](x, emb, frames)
        return self.upsamplers[0](x, size=skips[-1].shape[-2:])


def resnet(config: UNetConfig, i: int, o: int, scale: float | None = None, resample: str | None = None):
    return ResnetBlock2D(
        i,
        o,
        emb_channels=config.time_embedding_dim,
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        act=config.act_fn,
        time_scale_shift=config.resnet_time_scale_shift,
        skip_time_act=config.resnet_skip_time_act,
        out_scale_factor=config.resnet_out_scale_factor if scale is None else scale,
        resample=resample,
    )


def spatial_attention(config: UNetConfig, channels: int, level: int, kind: str) -> nn.Module:
    """`attention_head_dim` is channels per head with added keys, the number of heads with cross-attention."""
    head_dim, groups = config.attention_head_dim[level], config.norm_num_groups
    if kind == ADDED_KV:
        return AddedKVAttention(channels, head_dim, config.cross_attention_dim, groups, config.norm_eps)
    return SpatialTransformer(channels, head_dim, config.cross_attention_dim, groups, config.use_linear_projection)


class VideoUNet(nn.Module):
    """Holds the parameters under their published names. Run it through `UNetContext` and `UNetStep`."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        c0, emb = config.block_out_channels[0], config.time_embedding_dim
        self.conv_in = nn.Conv2d(config.in_channels, c0, 3, padding=1)
        if config.transformer_in:
            self.transformer_in = TemporalTransformer(c0, 8, 64, config.norm_num_groups)
        self.time_embedding = TimestepEmbedding(c0, emb, config.act_fn)
        if config.class_embed_type:
            self.class_embedding = TimestepEmbedding(c0, emb, config.act_fn)
        if config.addition_embed_type:
            self.add_embedding = TextTimeEmbedding(config.text_dim, emb, config.addition_embed_type_num_heads)
        if config.encoder_hid_dim:
            self.encoder_hid_proj = nn.Linear(config.encoder_hid_dim, config.cross_attention_dim)
        levels = range(len(config.block_out_channels))
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in levels)
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpBlock(config, index) for index in levels)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, c0, config.norm_eps)
        self.conv_out = nn.Conv2d(c0, config.out_channels, 3, padding=1)

    def text_attentions(self) -> Iterator[AddedKVAttention | SpatialTransformer]:
        """In the order in which the step meets them."""
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            yield from getattr(block, "attentions", ())

    @property
    def finest_attends(self) -> bool:
        """Whether the finest level reads the text."""
        return hasattr(self.down_blocks[0], "attentions")

    @property
    def deep_channels(self) -> int:
        """Of what the coarser levels hand to the finest."""
        return self.config.block_out_channels[:2][-1]

    def drop_variance(self, channels: int) -> None:
        """Keep the first `channels` rows of the last convolution: DPM-Solver and fixed variances read no others."""
        self.conv_out.weight = nn.Parameter(self.conv_out.weight[:channels].clone())
        self.conv_out.bias = nn.Parameter(self.conv_out.bias[:channels].clone())
        self.conv_out.out_channels = channels

    def embed_time(self, embedding: TimestepEmbedding, t: Tensor) -> Tensor:
        config = self.config
        t_emb = sinusoid(t, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift)
        return embedding(t_emb.to(self.conv_in.weight.dtype))


class UNetContext(nn.Module):
    """What one prompt (and noise level) contributes to every step, computed once.

    prompt_embeds [B, L, D], noise_level float32 [B] (super-resolution only)
    -> text_kv [B, L, K]: keys and values of every text attention side by side,
       cond_emb [B, T]: what text and noise level add to the time embedding (pixel UNets only).
    """

    def __init__(self, unet: VideoUNet):
        super().__init__()
        self.unet = unet

    def forward(self, prompt_embeds: Tensor, noise_level: Tensor | None = None) -> tuple[Tensor, ...]:
        unet, config = self.unet, self.unet.config
        prompt_embeds = prompt_embeds.to(unet.conv_in.weight.dtype)
        text = unet.encoder_hid_proj(prompt_embeds) if config.encoder_hid_dim else prompt_embeds
        text_kv = torch.cat([attn.project_text(text) for attn in unet.text_attentions()], dim=-1)
        if not config.addition_embed_type:
            return (as_binding(text_kv),)
        cond_emb = unet.add_embedding(prompt_embeds)
        if noise_level is not None:
            cond_emb = cond_emb + unet.embed_time(unet.class_embedding, noise_level)
        return as_binding(text_kv), as_binding(cond_emb)


class UNetStep(nn.Module):
    """One evaluation of the network in the denoising loop.

    sample [B, C, F, H, W], timestep float32 [B], text_kv and cond_emb from `UNetContext`
    -> noise_pred [B, N, F, H, W], variance_frac of the same shape where the scheduler learned its variance,
       deep [B, D, F, H, W]: what the coarser levels hand to the finest, for `UNetShallow`.
    """

    def __init__(self, unet: VideoUNet, noise_channels: int):
        super().__init__()
        self.unet = unet
        self.noise_channels = noise_channels

    def forward(
        self, sample: Tensor, timestep: Tensor, text_kv: Tensor, cond_emb: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        unet, frames = self.unet, sample.shape[2]
        emb = _embedding(unet, timestep, cond_emb)
        texts = iter(_texts(unet, text_kv))
        x = _enter(unet, sample)
        skips = [x]
        for block in unet.down_blocks:
            skips += block(skips[-1], emb, texts, frames)
        x = unet.mid_block(skips[-1], emb, texts, frames)
        for block in unet.up_blocks[:-1]:
            x = block(x, emb, texts, skips, frames)
        deep = as_binding(_unfold(x, frames))
        x = unet.up_blocks[-1](x, emb, texts, skips, frames)
        return *_leave(unet, x, frames).split(self.noise_channels, dim=1), deep


class UNetShallow(nn.Module):
    """The same evaluation with the coarser levels' part taken from a step before (Ma et al. 2023, arXiv 2312.00858).

    Only the finest level is computed; text_kv is an input where that level attends to the text.
    """

    def __init__(self, unet: VideoUNet, noise_channels: int):
        super().__init__()
        self.unet = unet
        self.noise_channels = noise_channels

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        deep: Tensor,
        context: Tensor | None = None,
        more: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """`context` and `more` are what the level reads of `UNetContext`'s outputs, in their order."""
        unet, frames = self.unet, sample.shape[2]
        first, last = unet.down_blocks[0], unet.up_blocks[-1]
        given = [value for value in (context, more) if value is not None]
        texts: Iterator[Tensor] = iter(())
        if unet.finest_attends:
            parts = _texts(unet, given.pop(0))
            texts = iter(parts[: len(first.attentions)] + parts[-len(last.attentions) :])
        emb = _embedding(unet, timestep, *given)
        x = _enter(unet, sample)
        skips = [x, *first.on_level(x, emb, texts, frames)]
        x = last(deep.to(x.dtype).transpose(1, 2).flatten(0, 1), emb, texts, skips, frames)
        return _leave(unet, x, frames).split(self.noise_channels, dim=1)


def _embedding(unet: VideoUNet, timestep: Tensor, cond_emb: Tensor | None = None) -> Tensor:
    emb = unet.embed_time(unet.time_embedding, timestep)
    if cond_emb is not None:
        emb = emb + cond_emb.to(emb.dtype)
    act = unet.config.time_embedding_act_fn
    return ACTIVATIONS[act](emb) if act else emb


def _texts(unet: VideoUNet, text_kv: Tensor) -> list[Tensor]:
    """Each text attention's part."""
    channels = [2 * attn.channels for attn in unet.text_attentions()]
    return list(text_kv.to(unet.conv_in.weight.dtype).split(channels, dim=-1))


def _enter(unet: VideoUNet, sample: Tensor) -> Tensor:
    """[B, C, F, H, W] -> [B*F, C0, H, W]."""
    x = unet.conv_in(sample.to(unet.conv_in.weight.dtype).transpose(1, 2).flatten(0, 1))
    return unet.transformer_in(x, sample.shape[2]) if unet.config.transformer_in else x


def _leave(unet: VideoUNet, x: Tensor, frames: int) -> Tensor:
    """[B*F, C0, H, W] -> [B, N or 2N, F, H, W]."""
    x = unet.conv_out(ACTIVATIONS[unet.config.act_fn](unet.conv_norm_out(x)))
    return as_binding(_unfold(x, frames))


def _unfold(x: Tensor, frames: int) -> Tensor:
    """[B*F, C, H, W] -> [B, C, F, H, W]."""
    return x.unflatten(0, (-1, frames)).transpose(1, 2)
