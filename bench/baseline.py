"""The reference as its users run it: networks of diffusers' own layers in eager torch, and torch.compile of the same.

The published pipelines fold frames into the batch, project the text anew in every step and for every frame, take one
interpolation gap at a time and guidance as a batch of two. So does this. The UNets are assembled here because diffusers
has neither Show-1's pixel blocks nor its reading of `attention_head_dim`; layers, attention processors, schedulers and
autoencoder are diffusers', the text encoders transformers'.
"""

import contextlib
import gc
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engines.catalog import UNETS
from engines.errors import EngineError
from engines.limits import processors

try:
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler
    from diffusers.models.activations import get_activation
    from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0
    from diffusers.models.embeddings import TextTimeEmbedding, TimestepEmbedding, Timesteps
    from diffusers.models.resnet import Downsample2D, ResnetBlock2D, TemporalConvLayer, Upsample2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
    from torch import Tensor, nn
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
except ImportError as error:
    raise EngineError(
        f"{error.name} is not installed. The baselines are torch with diffusers' layers: "
        "`pip install -e '.[export,bench]'`."
    ) from None

from bench.timing import Summary, summarize
from bench.work import BASELINES, Calls, count_flop
from export.checkpoint import load_vae, load_weights
from export.modules.unet import ADDED_KV, BLOCKS, MID_BLOCKS, UNetConfig
from runtime.runner import first_line
from runtime.stages.text import MAX_TOKENS

warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")

COMPILE_MODE = {"cuda": "reduce-overhead"}  # with CUDA graphs, as diffusers' documentation advises


class Layers(nn.Module):
    """One block's layers: resnet, then temporal convolution, attention, temporal attention where it has them."""

    def __init__(self, config: UNetConfig, level: int, io: list[tuple[int, int]], attention: str | None, mid: bool):
        super().__init__()
        channels, groups, temporal = io[0][1], config.norm_num_groups, config.temporal
        self.temporal = temporal
        self.resnets = nn.ModuleList(_resnet(config, i, o, mid=mid) for i, o in io)
        if temporal:
            self.temp_convs = nn.ModuleList(
                TemporalConvLayer(channels, channels, dropout=0.1, norm_num_groups=groups) for _ in io
            )
        if attention:
            count, heads = 1 if mid else len(io), config.attention_head_dim[level]
            self.attentions = nn.ModuleList(_attention(config, channels, heads, attention) for _ in range(count))
            if temporal:
                self.temp_attentions = nn.ModuleList(
                    TransformerTemporalModel(heads, channels // heads, in_channels=channels, norm_num_groups=groups)
                    for _ in range(count)
                )

    def layer(self, i: int, x: Tensor, emb: Tensor, text: Tensor, frames: int) -> Tensor:
        """x [B*F, C, H, W], emb [B*F, T], text [B*F, L, D]."""
        x = self.resnets[i](x, emb)
        if self.temporal:
            x = self.temp_convs[i](x, num_frames=frames)
        if hasattr(self, "attentions") and i < len(self.attentions):
            attention = self.attentions[i]
            x = attention(x, encoder_hidden_states=text)
            x = x if isinstance(attention, Attention) else x.sample
            if self.temporal:
                x = self.temp_attentions[i](x, num_frames=frames).sample
        return x


def _resnet(config: UNetConfig, i: int, o: int, mid: bool = False, **resample: bool) -> nn.Module:
    return ResnetBlock2D(
        in_channels=i,
        out_channels=o,
        temb_channels=config.time_embedding_dim,
        eps=config.norm_eps,
        groups=config.norm_num_groups,
        non_linearity=config.act_fn,
        time_embedding_norm=config.resnet_time_scale_shift,
        skip_time_act=config.resnet_skip_time_act,
        output_scale_factor=config.mid_block_scale_factor if mid else config.resnet_out_scale_factor,
        **resample,
    )


def _attention(config: UNetConfig, channels: int, heads: int, kind: str) -> nn.Module:
    """`heads` is channels per head with added keys, the number of heads with cross-attention."""
    groups, text_dim = config.norm_num_groups, config.cross_attention_dim
    if kind == ADDED_KV:
        return Attention(
            query_dim=channels,
            cross_attention_dim=channels,
            heads=channels // heads,
            dim_head=heads,
            added_kv_proj_dim=text_dim,
            norm_num_groups=groups,
            eps=config.norm_eps,
            bias=True,
            upcast_softmax=True,
            cross_attention_norm="group_norm",
            processor=AttnAddedKVProcessor2_0(),
        )
    return Transformer2DModel(
        heads,
        channels // heads,
        in_channels=channels,
        cross_attention_dim=text_dim,
        norm_num_groups=groups,
        use_linear_projection=config.use_linear_projection,
    )


class ReferenceUNet(nn.Module):
    """Any UNet of the cascade, under its published parameter names."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        channels, emb = config.block_out_channels, config.time_embedding_dim
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        if config.transformer_in:
            self.transformer_in = TransformerTemporalModel(
                8, 64, in_channels=channels[0], norm_num_groups=config.norm_num_groups
            )
        self.time_proj = Timesteps(channels[0], config.flip_sin_to_cos, config.freq_shift)
        self.time_embedding = TimestepEmbedding(channels[0], emb, config.act_fn)
        if config.class_embed_type:
            self.class_embedding = TimestepEmbedding(channels[0], emb, config.act_fn)
        if config.addition_embed_type:
            self.add_embedding = TextTimeEmbedding(config.text_dim, emb, config.addition_embed_type_num_heads)
        if config.encoder_hid_dim:
            self.encoder_hid_proj = nn.Linear(config.encoder_hid_dim, config.cross_attention_dim)
        levels = range(len(channels))
        self.down_blocks = nn.ModuleList(self._down(level) for level in levels)
        mid = (channels[-1], channels[-1])
        self.mid_block = Layers(config, -1, [mid, mid], MID_BLOCKS[config.mid_block_type][0], mid=True)
        self.up_blocks = nn.ModuleList(self._up(index) for index in levels)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_act = get_activation(config.act_fn)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)
        self.time_act = get_activation(config.time_embedding_act_fn) if config.time_embedding_act_fn else nn.Identity()

    def _down(self, level: int) -> Layers:
        config, channels = self.config, self.config.block_out_channels
        out, before = channels[level], channels[max(level - 1, 0)]
        attention, by_resnet = BLOCKS[config.down_block_types[level][:-2]]
        io = [(out if i else before, out) for i in range(config.layers_per_block[level])]
        block = Layers(config, level, io, attention, mid=False)
        if level < len(channels) - 1:
            sampler = (
                _resnet(config, out, out, down=True)
                if by_resnet
                else Downsample2D(out, use_conv=True, out_channels=out, padding=config.downsample_padding, name="op")
            )
            block.downsamplers = nn.ModuleList([sampler])
        return block

    def _up(self, index: int) -> Layers:
        config, channels = self.config, self.config.block_out_channels
        level = len(channels) - 1 - index
        out, below = channels[level], channels[level + 1] if index else channels[-1]
        count = config.layers_per_block[level] + 1
        skips = [out] * (count - 1) + [channels[max(level - 1, 0)]]
        attention, by_resnet = BLOCKS[config.up_block_types[index][:-2]]
        io = [((out if i else below) + skip, out) for i, skip in enumerate(skips)]
        # A list of head sizes is read finest first on this way too: the reference's quirk.
        block = Layers(config, index if attention == ADDED_KV else level, io, attention, mid=False)
        if level:
            sampler = (
                _resnet(config, out, out, up=True) if by_resnet else Upsample2D(out, use_conv=True, out_channels=out)
            )
            block.upsamplers = nn.ModuleList([sampler])
        return block

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, noise_level: Tensor | None = None) -> Tensor:
        """sample [B, C, F, H, W], timestep [B], text [B, L, D], noise_level [B] -> [B, out_channels, F, H, W]."""
        batch, channels, frames, height, width = sample.shape
        emb = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        if noise_level is not None:
            emb = emb + self.class_embedding(self.time_proj(noise_level).to(sample.dtype))
        if hasattr(self, "add_embedding"):
            emb = emb + self.add_embedding(text)
        emb = self.time_act(emb)
        if hasattr(self, "encoder_hid_proj"):
            text = self.encoder_hid_proj(text)
        emb, text = emb.repeat_interleave(frames, dim=0), text.repeat_interleave(frames, dim=0)

        x = self.conv_in(sample.permute(0, 2, 1, 3, 4).reshape(batch * frames, channels, height, width))
        if hasattr(self, "transformer_in"):
            x = self.transformer_in(x, num_frames=frames).sample
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = block.layer(i, x, emb, text, frames)
                skips.append(x)
            if hasattr(block, "downsamplers"):
                sampler = block.downsamplers[0]
                x = sampler(x, emb) if isinstance(sampler, ResnetBlock2D) else sampler(x)
                skips.append(x)
        for i in range(len(self.mid_block.resnets)):
            x = self.mid_block.layer(i, x, emb, text, frames)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = block.layer(i, torch.cat([x, skips.pop()], dim=1), emb, text, frames)
            if hasattr(block, "upsamplers"):
                sampler = block.upsamplers[0]
                x = sampler(x, emb) if isinstance(sampler, ResnetBlock2D) else sampler(x, skips[-1].shape[-2:])
        x = self.conv_out(self.conv_act(self.conv_norm_out(x)))
        return x.reshape(batch, frames, -1, height, width).permute(0, 2, 1, 3, 4)


@dataclass(frozen=True)
class Place:
    """Where the baselines run, and in what: ("cuda", "float16") as their users do, ("cpu", "float32")."""

    device: str
    dtype: str

    @classmethod
    def here(cls) -> "Place":
        return cls("cuda", "float16") if torch.cuda.is_available() else cls("cpu", "float32")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def limit_threads(self) -> None:
        """To what ONNX Runtime gets: torch does not know of a container's quota of processors."""
        if self.device == "cpu":
            torch.set_num_threads(min(torch.get_num_threads(), processors()))

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Source:
    """A network's published config and the files of its weights; without files it gets random ones."""

    network: str
    config: Mapping[str, Any]
    files: tuple[Path, ...] = ()


def make_network(source: Source, place: Place) -> Any:
    """The network in eval mode. Text encoders always have random weights: nothing is compared with them."""
    make: dict[str, Callable[[], nn.Module]] = {
        **dict.fromkeys(UNETS, lambda: ReferenceUNet(UNetConfig.from_dict(source.config, source.network))),
        "t5": lambda: T5EncoderModel(T5Config(**source.config)),
        "clip": lambda: CLIPTextModel(CLIPTextConfig(**source.config)),
        "vae_encoder": lambda: AutoencoderKL.from_config(dict(source.config)),
        "vae_decoder": lambda: AutoencoderKL.from_config(dict(source.config)),
    }
    if source.network in ("t5", "clip"):  # they hold buffers that the meta device would lose
        with torch.device(place.device), _default_dtype(place.torch_dtype):
            return make[source.network]().eval().requires_grad_(False)
    with torch.device("meta"):
        module = make[source.network]().eval().requires_grad_(False)
    if place.device == "meta":
        return module
    if source.files:
        load = load_vae if source.network.startswith("vae") else load_weights
        load(module, source.files, place.torch_dtype, source.network)
        return module.to(place.device)
    nn.Module.to(module, place.torch_dtype).to_empty(device=place.device)
    torch.manual_seed(0)
    # None is left at zero, as some of diffusers' are: products with zeros take less power and so less time.
    for parameter in module.parameters():
        parameter.normal_(std=(parameter.numel() / len(parameter)) ** -0.5) if parameter.ndim > 1 else parameter.zero_()
    for child in module.modules():
        if isinstance(child, nn.GroupNorm | nn.LayerNorm):
            child.weight.fill_(1)
    return module


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make_scheduler(config: Mapping[str, Any]) -> Any:
    """A published scheduler, its last step as diffusers 0.19 has it: to t = 0, not to no noise at all."""
    if config["_class_name"] == "DDPMScheduler":
        return DDPMScheduler.from_config(dict(config))
    return DPMSolverMultistepScheduler.from_config({**config, "final_sigmas_type": "sigma_min"})


class DenoisingLoop:
    """Steps of a published pipeline on random inputs: the network on a batch of two, guidance, the scheduler's step."""

    def __init__(self, unet: ReferenceUNet, scheduler: Mapping[str, Any], calls: Calls, place: Place):
        self.call: Callable[..., Tensor] = unet  # or what torch.compile made of it
        self.scheduler = make_scheduler(scheduler)
        batch, channels, *rest = calls.shape
        self.noise_channels = 4 if calls.network == "sr2" else 3
        random = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random).to(place.device, place.torch_dtype)

        self.x = draw(1, self.noise_channels, *rest)
        self.condition = draw(1, channels - self.noise_channels, *rest)
        self.text = draw(batch, MAX_TOKENS, unet.config.text_dim)
        level = {"if2": 150, "sr1": 250}.get(calls.network, 0)
        self.more = (torch.full((batch,), level, device=place.device),) if unet.config.class_embed_type else ()

    def predict(self, timestep: Tensor) -> Tensor:
        """[2, out_channels, F, H, W] for the negative prompt and the prompt."""
        x = torch.cat([torch.cat([self.x, self.condition], dim=1)] * 2)
        return self.call(x, timestep.to(x.device).expand(len(x)), self.text, *self.more)

    def step(self, timestep: Tensor, guidance_scale: float = 7.0) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        negative, positive = self.predict(timestep).chunk(2)
        noise_pred, *variance = positive.split(self.noise_channels, dim=1)
        negative = negative[:, : self.noise_channels]
        noise_pred = negative + guidance_scale * (noise_pred - negative)
        if self.scheduler.config.variance_type in ("learned", "learned_range"):
            noise_pred = torch.cat([noise_pred, *variance], dim=1)
        # The scheduler sees frames as its batch, so that each is thresholded on its own.
        by_frame = [t.transpose(1, 2).flatten(0, 1) for t in (noise_pred, self.x)]
        x = self.scheduler.step(by_frame[0], timestep, by_frame[1]).prev_sample
        self.x = x.unflatten(0, (1, -1)).transpose(1, 2).to(self.x.dtype)

    def steps(self, count: int) -> Iterator[Tensor]:
        """Timesteps of a loop; `step` takes them one after the other."""
        self.scheduler.set_timesteps(max(count, 50))
        yield from self.scheduler.timesteps[:count]


@dataclass(frozen=True)
class Measured:
    """Seconds of one reference call; of a UNet's: of one denoising step, with guidance and scheduler.

    `first` is the first call, which compiles where that is asked for. Without `call`, `failure` says why.
    """

    call: Summary | None
    first: float | None
    failure: str | None = None


def measure_network(
    source: Source,
    scheduler: Mapping[str, Any] | None,
    calls: Calls,
    place: Place,
    kinds: Sequence[str],
    repeats: int,
    on_network: Callable[[str, Any], None] = lambda *_: None,
    is_time_left: Callable[[], bool] = lambda: True,
) -> dict[str, Measured]:
    """Time the network as each of `kinds`. Text encoders and autoencoder stay eager throughout, as their users have it.

    `on_network` gets the eager network before it is measured. Without time left no further kind is begun.
    """
    results: dict[str, Measured] = {}
    with torch.no_grad():
        try:
            module = make_network(source, place)
            on_network(source.network, module)
        except RuntimeError as error:  # too little memory for the network itself
            return dict.fromkeys(kinds, _failed(error))
        if not isinstance(module, ReferenceUNet):
            result = _measure(
                lambda module=module: [_plain_call(module, calls, place)] * (repeats + 1), place, warmup=1
            )
            results = dict.fromkeys(kinds, result)
            kinds = ()
        for kind in sorted(kinds, key=BASELINES.index):
            assert scheduler is not None
            if not is_time_left():
                results[kind] = Measured(None, None, "the time was up")
                continue
            results[kind] = _measure(
                partial(_steps, kind, module, scheduler, calls, place, repeats + 2), place, warmup=2
            )
            torch._dynamo.reset()
    del module
    gc.collect()
    if place.device == "cuda":
        torch.cuda.empty_cache()
    return results


def _failed(error: Exception, first: float | None = None) -> Measured:
    return Measured(None, first, f"{type(error).__name__}: {first_line(error)}")


def _measure(make_calls: Callable[[], Sequence[Callable[[], Any]]], place: Place, warmup: int) -> Measured:
    times: list[float] = []
    try:
        # As torch comes: the runtime, in the same process, has cuDNN search for the fastest.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False):
            for call in make_calls():
                place.synchronize()
                start = time.perf_counter()
                call()
                place.synchronize()
                times.append(time.perf_counter() - start)
    except (RuntimeError, NotImplementedError, ValueError) as error:  # too little memory; a shape that xformers refuses
        return _failed(error, times[0] if times else None)
    return Measured(summarize(times[warmup:]), times[0])


def _plain_call(module: Any, calls: Calls, place: Place) -> Callable[[], Any]:
    if calls.network in ("t5", "clip"):
        ids = torch.ones(calls.shape, dtype=torch.int64, device=place.device)
        return lambda: module(input_ids=ids)
    x = torch.randn(calls.shape, generator=torch.Generator().manual_seed(0)).to(place.device, place.torch_dtype)
    return lambda: module.encode(x) if calls.network == "vae_encoder" else module.decode(x)


def _steps(
    kind: str, module: Any, scheduler: Mapping[str, Any], calls: Calls, place: Place, count: int
) -> list[Callable[[], Any]]:
    """Of a denoising loop, in order."""
    loop = DenoisingLoop(module, scheduler, calls, place)
    if kind == "compile":
        loop.call = torch.compile(module, dynamic=False, mode=COMPILE_MODE.get(place.device))
    elif kind == "xformers":
        use_xformers(module)
    return [partial(loop.step, timestep) for timestep in loop.steps(count)]


def use_xformers(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, Attention):
            child.set_use_memory_efficient_attention_xformers(True)


def network_flop(source: Source, calls: Calls) -> int:
    """FLOP of one reference call, counted on the meta device."""
    meta = Place("meta", "float32")
    with torch.no_grad():
        module = make_network(source, meta)
        if isinstance(module, ReferenceUNet):
            loop = DenoisingLoop(module, _ANY_SCHEDULER, calls, meta)
            return count_flop(lambda: loop.predict(torch.zeros((), device="meta")))
        return count_flop(_plain_call(module, calls, meta))


_ANY_SCHEDULER = {"_class_name": "DDPMScheduler"}
