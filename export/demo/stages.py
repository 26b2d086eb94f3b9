"""What each stage of the demo cascade is trained on: batches drawn as the runtime will see them, and losses.

A stage has two halves. `draw` makes a batch from the pool of clips and seeded random numbers, without derivatives;
`loss` is the part that is differentiated (on a GPU as a CUDA graph). Conditions, noise levels and windows are those of
`runtime.stages`; the noise schedules are read from the scheduler files that the checkpoint ships.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export import configs
from export.demo import cascade
from export.demo.captions import BACKGROUNDS, COLOURS, MOTIONS, PATTERNS, SHAPES, SIZES, Scene, training_scenes
from export.demo.scenes import (
    FRAMES,
    HALF_HEIGHT,
    HALF_WIDTH,
    MOST_THINGS,
    Window,
    centres,
    lay_out,
    render,
)
from export.modules.layers import (
    AddedKVAttention,
    AttentionPooling,
    LayerNorm,
    ResnetBlock2D,
    SpatialTransformer,
    TemporalConvLayer,
    TemporalTransformer,
)
from export.modules.text import T5Encoder
from export.modules.unet import UNetContext, UNetStep, VideoUNet
from export.modules.vae import VAEAttention, VAEDecoder, VAEEncoder, VAEResnet, downscaling
from export.tokenizers import convert_clip, convert_t5
from runtime.config import INTERP_FRAMES, NEGATIVE_PROMPT, SR1_SCALE, Settings
from runtime.schedulers import SchedulerConfig, alphas_cumprod, max_inference_steps
from runtime.stages.text import MAX_TOKENS
from runtime.tokenizer import Tokenizer, normalize_t5_prompt

KEYFRAME_SIZE, LARGE_SIZE, FULL_SIZE = (64, 40), (256, 160), (576, 320)
SETTINGS = Settings()
EXPERT_TIMESTEPS = 900  # sr2 is trained below this one: SDEdit never starts above (Show-1, section 3.4)
_VAE_SCALE = downscaling(cascade.NETWORKS["vae"][1])
_ANYWHERE = 0.3  # share of windows that need not hold a thing
READING_STEPS, _READING_RATE = 700, 3e-3
_DECIDING, _DECIDING_WIDTH = 1.7, 1.0  # logits of base's timesteps: the middle two thirds are 670 to 940 of 1000
NO_TEXT = 0.1  # share of captions replaced by the negative prompt, for guidance (Ho & Salimans 2022)

Batch = tuple[Tensor, ...]


@cache
def _constant(values: tuple[float, ...], device: str) -> Tensor:
    """Copied once: a copy to a GPU waits for what runs there."""
    return torch.tensor(values, device=device)


@dataclass(frozen=True)
class Lesson:
    """What a part of the training sees: for how long, and how much of each clip.

    `share` is of the stage's time. `size` is (width, height): of frames in base and interp, and of the part that is cut
    out of frames in the stages that add detail. `batch` is in the stage's own. `speed` is the least at which base's
    clips are seen, the highest being 1: what hardly moves is where frames learn to agree. `beside` is learned from in
    the same steps, its share of no account.
    """

    share: float
    size: tuple[int, int]
    frames: int = 1
    batch: float = 1.0
    speed: float = 1.0
    beside: "Lesson | None" = None

    @property
    def parts(self) -> "tuple[Lesson, ...]":
        return (self,) if self.beside is None else (self, self.beside)


class Pool:
    """Captioned training clips on one device; batches are drawn from it with replacement."""

    def __init__(self, count: int, seed: int, device: str):
        scenes, captions = zip(*training_scenes(count, seed), strict=True)
        self.scenes: tuple[Scene, ...] = scenes
        self.captions: list[str] = list(captions)
        self.clips = lay_out(scenes, seed).to(device)
        self.count, self.device = count, device

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.count, (batch,), generator=generator, device=self.device)

    def frames(self, index: Tensor, numbers: Tensor, size: tuple[int, int], window: Window | None = None) -> Tensor:
        """[B, 3, F, H, W] of clips `index` [B] at frame `numbers` [B, F]."""
        return render(self.clips[index], numbers, size, window)


class Stage(ABC):
    """One training run. `networks` are trained and shipped; `helpers` are trained and thrown away."""

    ships: tuple[str, ...]  # names of `networks`
    lesson = Lesson(1, (1, 1))  # the current one

    def __init__(self, pool: Pool, checkpoint: Path):
        self.pool, self.checkpoint = pool, checkpoint
        self.networks = nn.ModuleDict({name: cascade.make_network(name) for name in self.ships})
        self.helpers = nn.ModuleDict()

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"networks": self.networks, "helpers": self.helpers})

    @abstractmethod
    def draw(self, batch: int, generator: torch.Generator) -> Batch: ...

    @abstractmethod
    def loss(self, *batch: Tensor) -> Tensor: ...

    def prepare(self) -> None:  # noqa: B027 (most stages need none)
        """First changes to new networks."""

    def inherit(self, parent: VideoUNet) -> None:
        """Start from another network's weights: those of the same shape, and filters of its inputs, which go first.

        Layers that this one lacks are left out.
        """
        (network,) = self.networks.values()
        with torch.no_grad():
            parameters = dict(network.named_parameters())
            for name, value in parent.state_dict().items():
                if (own := parameters.get(name)) is None:
                    continue
                if own.shape == value.shape:
                    own.copy_(value)
                else:
                    own.zero_()[:, : value.shape[1]].copy_(value)

    def finish(self, generator: torch.Generator) -> None:  # noqa: B027 (most stages need none)
        """Last changes to the trained networks before they are saved."""

    def frozen(self, name: str) -> nn.Module:
        return cascade.load_network(self.checkpoint, name).to(self.pool.device)

    def window(self, index: Tensor, numbers: Tensor, size: tuple[int, int], generator: torch.Generator) -> Window:
        """The lesson's part of each clip's frames, which have `size`: mostly around a thing at the first of `numbers`.

        At multiples of a latent's pixels, so that stages of latents cut where the autoencoder does.
        """
        clips, device = self.pool.clips[index], self.pool.device
        rows = torch.arange(len(index), device=device)
        thing = torch.randint(MOST_THINGS, (len(index),), generator=generator, device=device)
        thing = thing * (clips.radius[:, 1, 0] > 0)  # the first where there is one
        centre = centres(clips, numbers[:, :1])[rows, thing, :, 0]  # [B, 2]
        whole, part = _constant(size, device), _constant(self.lesson.size, device)
        around = (centre / _constant((HALF_WIDTH, HALF_HEIGHT), device) + 1) / 2 * whole
        corner = around - part * torch.rand(len(index), 2, generator=generator, device=device)
        anywhere = (whole - part) * torch.rand(len(index), 2, generator=generator, device=device)
        free = torch.rand(len(index), 1, generator=generator, device=device) < _ANYWHERE
        corner = torch.where(free, anywhere, corner).clamp(min=0).minimum(whole - part)
        left, top = (corner / _VAE_SCALE).long().mul(_VAE_SCALE)[:, :, None].unbind(1)
        return left, top, self.lesson.size

    def random(self, generator: torch.Generator, *shape: int, like: Tensor | None = None) -> Tensor:
        """Standard normal."""
        shape = tuple(like.shape) if like is not None else shape
        return torch.randn(shape, generator=generator, device=self.pool.device)


_ATTRIBUTES = [(*SHAPES, None), (*COLOURS, None), (*SIZES, None), (*MOTIONS, None)] * MOST_THINGS
_ATTRIBUTES += [tuple(BACKGROUNDS), PATTERNS]
_CHOICES = [len(values) for values in _ATTRIBUTES]


def attributes(pool: Pool) -> Tensor:
    """What every clip's caption says, as classes, [N, attributes]; None for what a missing thing would be."""
    rows = []
    for scene in pool.scenes:
        things = [[t.shape, t.colour, t.size, t.motion] for t in scene.things]
        missing = [None] * (4 * (MOST_THINGS - len(things)))
        values = [*chain(*things), *missing, scene.background, scene.pattern]
        rows.append([choices.index(value) for choices, value in zip(_ATTRIBUTES, values, strict=True)])
    return torch.tensor(rows, device=pool.device)


def told(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of all attributes, from logits side by side [B, sum of choices]."""
    losses = [F.cross_entropy(part, labels[:, i]) for i, part in enumerate(logits.split(_CHOICES, dim=-1))]
    return torch.stack(losses).mean()


class Text(Stage):
    """Both text encoders learn to say what a caption means, as their models had learned to read before Show-1."""

    ships = ("t5", "clip")

    def __init__(self, pool: Pool, checkpoint: Path):
        super().__init__(pool, checkpoint)
        for name, key in (("t5", "d_model"), ("clip", "hidden_size")):
            width = cascade.NETWORKS[name][1][key]
            head = (LayerNorm(width), AttentionPooling(4, width), nn.Linear(width, sum(_CHOICES)))
            self.helpers[name] = nn.Sequential(*head)
        self.labels = attributes(pool)
        self.tokens = {name: tokens(checkpoint, name, pool.captions, pool.device) for name in ("t5", "clip")}

    def draw(self, batch: int, generator: torch.Generator) -> Batch:
        index = self.pool.draw(batch, generator)
        (t5_ids, mask), (clip_ids, _) = self.tokens["t5"], self.tokens["clip"]
        return t5_ids[index], mask[index], clip_ids[index], self.labels[index]

    def loss(self, *batch: Tensor) -> Tensor:
        t5_ids, mask, clip_ids, labels = batch
        embeds = {"t5": self.networks["t5"](t5_ids, mask), "clip": self.networks["clip"](clip_ids)}
        return sum(told(self.helpers[name](embeds[name]), labels) for name in embeds) / len(embeds)  # type: ignore[return-value]


class Diffusion(Stage):
    """Prediction of v for one UNet (Salimans & Ho 2022), its prompts encoded beforehand by a finished encoder.

    Not of the noise, as in Show-1: an error there is 1 / alpha times as large in the clean sample, hundreds of times in
    the first steps of a run, which decide what is shown.
    """

    encoder = "t5"
    negative = ""
    # Count errors of v as errors in the clean sample, sigma times as large: those of little noise are the hardest to
    # avoid and decide nothing that is seen.
    of_clean = True
    noise_level: int | None = None

    def __init__(self, pool: Pool, checkpoint: Path):
        super().__init__(pool, checkpoint)
        (name,) = self.ships
        self.unet = self.networks[name]
        _start_as_identity(self.unet)
        self.still = without_time(self.unet)
        config = SchedulerConfig.from_dict(cascade.SCHEDULERS[name], name)
        self.kept = torch.from_numpy(alphas_cumprod(config)).to(pool.device)
        # Timesteps that a run can visit.
        self.timesteps = max_inference_steps(config) if config.solver == "dpm" else config.num_train_timesteps
        noising = SchedulerConfig.from_dict(configs.NOISING, name)
        self.condition_kept = torch.from_numpy(alphas_cumprod(noising)).to(pool.device)
        encoder = self.frozen(self.encoder)
        self.embeds = encode(encoder, *tokens(checkpoint, self.encoder, pool.captions, pool.device))
        self.no_text = encode(encoder, *tokens(checkpoint, self.encoder, [self.negative], pool.device))

    @abstractmethod
    def clip(self, index: Tensor, levels: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """What is to be denoised [B, C, F, H, W], and the condition beside it."""

    def draw(self, batch: int, generator: torch.Generator) -> Batch:
        device = self.pool.device
        index = self.pool.draw(batch, generator)
        with torch.no_grad():
            levels = self.draw_levels(batch, generator)
            clean, condition = self.clip(index, levels, generator)
            drop = torch.rand(batch, generator=generator, device=device) < NO_TEXT
            embeds = torch.where(drop[:, None, None], self.no_text, self.embeds[index]).float()
            timestep = self.draw_timesteps(batch, generator)
            noise = self.random(generator, like=clean)
            sample, target = add_noise(self.kept, clean, noise, timestep), add_noise(self.kept, noise, -clean, timestep)
            if condition is not None:
                sample = torch.cat([sample, condition], dim=1)
        return sample, timestep.float(), embeds, target, *([] if levels is None else [levels.float()])

    def draw_timesteps(self, batch: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.timesteps, (batch,), generator=generator, device=self.pool.device)

    def consecutive(self, index: Tensor, generator: torch.Generator, of: int = FRAMES) -> Tensor:
        """Numbers of as many frames as the lesson has, [B, F], from anywhere in clips of `of` frames."""
        frames = self.lesson.frames
        start = torch.randint(of - frames + 1, (len(index), 1), generator=generator, device=index.device)
        return (start + torch.arange(frames, device=index.device)).float()

    def draw_levels(self, batch: int, generator: torch.Generator) -> Tensor | None:
        """Half of the batch at the level of every run, the rest up to twice as high or down to none."""
        if self.noise_level is None:
            return None
        device = self.pool.device
        other = torch.randint(2 * self.noise_level, (batch,), generator=generator, device=device)
        fixed = torch.rand(batch, generator=generator, device=device) < 0.5
        return torch.where(fixed, self.noise_level, other)

    def loss(self, *batch: Tensor) -> Tensor:
        sample, timestep, embeds, target, *levels = batch
        unet = self.still if target.shape[2] == 1 else self.unet
        context = UNetContext(unet)(embeds, *levels)
        predicted = UNetStep(unet, target.shape[1])(sample, timestep, *context)[0]
        error = (predicted.float() - target).square().mean(dim=(1, 2, 3, 4))
        if self.of_clean:
            error = error * (1 - self.kept[timestep.long()])
        return error.mean()

    def with_condition(
        self, index: Tensor, numbers: Tensor, levels: Tensor | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The lesson's part of large frames `numbers` [B, F], and of the small ones resized as the runtime does.

        The latter are noised to `levels` [B]; both are [B, 3, F, H, W].
        """
        left, top, (width, height) = window = self.window(index, numbers, LARGE_SIZE, generator)
        upscaled = self.upscaled(self.pool.frames(index, numbers, KEYFRAME_SIZE))
        rows, columns = top + torch.arange(height, device=top.device), left + torch.arange(width, device=left.device)
        b = torch.arange(len(index), device=index.device)[:, None, None]
        condition = upscaled.permute(0, 3, 4, 1, 2)[b, rows[:, :, None], columns[:, None, :]].permute(0, 3, 4, 1, 2)
        noise = self.random(generator, like=condition)
        return (
            self.pool.frames(index, numbers, LARGE_SIZE, window),
            add_noise(self.condition_kept, condition, noise, levels),
        )

    @staticmethod
    def upscaled(small: Tensor) -> Tensor:
        """Frames [B, 3, F, H, W] four times as large, as the runtime resizes them."""
        b, _, f, h, w = small.shape
        size = (h * SR1_SCALE, w * SR1_SCALE)
        large = F.interpolate(small.transpose(1, 2).flatten(0, 1), size=size, mode="bilinear", align_corners=True)
        return large.unflatten(0, (b, f)).transpose(1, 2)


class Base(Diffusion):
    ships = ("base",)

    def prepare(self) -> None:
        """Let the pooled text, which steers every layer, say all that the caption says before there is a picture."""
        pooling, labels = self.unet.add_embedding.to(self.pool.device), attributes(self.pool)
        head = nn.Linear(self.unet.config.time_embedding_dim, sum(_CHOICES)).to(self.pool.device)
        optimizer = torch.optim.AdamW([*pooling.parameters(), *head.parameters()], lr=_READING_RATE)
        generator = torch.Generator().manual_seed(0)
        for step in range(READING_STEPS):
            index = torch.randint(self.pool.count, (256,), generator=generator)
            optimizer.param_groups[0]["lr"] = _READING_RATE * (1 - step / READING_STEPS)
            optimizer.zero_grad()
            told(head(pooling(self.embeds[index].float())), labels[index]).backward()
            optimizer.step()

    def draw_timesteps(self, batch: int, generator: torch.Generator) -> Tensor:
        """Mostly those at which frames agree where things are, and outlines form: logit-normal (Esser et al. 2024)."""
        uniform = super().draw_timesteps(batch, generator)
        share = torch.sigmoid(_DECIDING + _DECIDING_WIDTH * self.random(generator, batch))
        anywhere = torch.rand(batch, generator=generator, device=self.pool.device) < 0.25
        return torch.where(anywhere, uniform, (share * self.timesteps).long())

    def clip(self, index: Tensor, levels: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        numbers = self.consecutive(index, generator, of=SETTINGS.keyframes) * (INTERP_FRAMES - 1)
        slowest, draws = self.lesson.speed, torch.rand(2, len(index), 1, generator=generator, device=index.device)
        speed = slowest + (1 - slowest) * draws[0]
        start = (FRAMES - 1) * (1 - speed) * draws[1]
        return self.pool.frames(index, start + speed * numbers, self.lesson.size), None


class Interp(Diffusion):
    ships = ("interp",)

    def clip(self, index: Tensor, levels: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        gap = INTERP_FRAMES - 1
        start = torch.randint(FRAMES // gap, (len(index), 1), generator=generator, device=index.device) * gap
        numbers = (start + torch.arange(INTERP_FRAMES, device=index.device)).float()
        clean = self.pool.frames(index, numbers, self.lesson.size)
        # The runtime's key frames are generated: a little noise keeps this stage from trusting every pixel.
        ends = clean[:, :, [0, -1]]
        strength = 0.1 * torch.rand(len(index), 1, 1, 1, 1, generator=generator, device=index.device)
        ends = ends + strength * self.random(generator, like=ends)
        weight = torch.linspace(0, 1, INTERP_FRAMES, device=index.device)[:, None, None]
        fade = ends[:, :, :1] * (1 - weight) + ends[:, :, 1:] * weight
        mask = torch.zeros_like(fade[:, :1])
        mask[:, :, [0, -1]] = 1
        return clean, torch.cat([fade, mask], dim=1)


class FirstFrame(Diffusion):
    ships = ("if2",)
    noise_level = SETTINGS.if2_noise_level

    def clip(self, index: Tensor, levels: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        number = torch.randint(FRAMES, (len(index), 1), generator=generator, device=index.device).float()
        return self.with_condition(index, number, levels, generator)


class Sr1(Diffusion):
    ships = ("sr1",)
    noise_level = SETTINGS.sr1_noise_level

    def clip(self, index: Tensor, levels: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        large, condition = self.with_condition(index, self.consecutive(index, generator), levels, generator)
        # In front the first frame, clean: from if2 or from the window before, so with small faults.
        first = large[:, :, :1]
        strength = 0.05 * torch.rand(len(index), 1, 1, 1, 1, generator=generator, device=index.device)
        condition[:, :, :1] = first + strength * self.random(generator, like=first)
        return large, condition


class Sr2(Diffusion):
    ships = ("sr2",)
    encoder = "clip"
    negative = NEGATIVE_PROMPT
    of_clean = False  # SDEdit may begin where there is little noise, and nowhere else

    def __init__(self, pool: Pool, checkpoint: Path):
        super().__init__(pool, checkpoint)
        self.timesteps = EXPERT_TIMESTEPS
        self.vae = VAEEncoder(self.frozen("vae"))
        self.scale = cascade.NETWORKS["vae"][1]["scaling_factor"]

    def draw_timesteps(self, batch: int, generator: torch.Generator) -> Tensor:
        """More of little noise: most of SDEdit is there."""
        share = torch.rand(batch, generator=generator, device=self.pool.device).square()
        return (share * self.timesteps).long()

    def clip(self, index: Tensor, levels: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        numbers = self.consecutive(index, generator)
        clips = self.pool.frames(index, numbers, FULL_SIZE, self.window(index, numbers, FULL_SIZE, generator))
        frames = clips.transpose(1, 2).flatten(0, 1)
        mean, logvar = self.vae(frames)
        latents = (mean + (0.5 * logvar).exp() * self.random(generator, like=mean)) * self.scale
        return latents.float().unflatten(0, (len(index), -1)).transpose(1, 2), None


class Vae(Stage):
    """Reconstruction with a weak pull of the latents to a standard normal (Kingma & Welling 2013)."""

    ships = ("vae",)

    def __init__(self, pool: Pool, checkpoint: Path):
        super().__init__(pool, checkpoint)
        self.vae = self.networks["vae"]
        _start_as_identity(self.vae)
        self.encoder, self.decoder = VAEEncoder(self.vae), VAEDecoder(self.vae)

    def draw(self, batch: int, generator: torch.Generator) -> Batch:
        index = self.pool.draw(batch, generator)
        number = torch.rand(batch, 1, generator=generator, device=self.pool.device) * (FRAMES - 1)
        image = self.pool.frames(index, number, FULL_SIZE, self.window(index, number, FULL_SIZE, generator))[:, :, 0]
        width, height = self.lesson.size
        return image, self.random(generator, batch, 4, height // _VAE_SCALE, width // _VAE_SCALE)

    def loss(self, *batch: Tensor) -> Tensor:
        image, noise = batch
        mean, logvar = (value.float() for value in self.encoder(image))
        error = self.decoder(mean + (0.5 * logvar).exp() * noise).float() - image
        # Differences of neighbours count apart: edges and fine lines are few pixels.
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        # So does the mean colour of every latent's square: small things are few pixels too.
        colours = F.avg_pool2d(error, _VAE_SCALE).abs().mean()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return error.square().mean() + 0.3 * error.abs().mean() + 0.5 * edges + 0.5 * colours + 1e-6 * divergence

    def finish(self, generator: torch.Generator) -> None:
        """Give latents mean 0 and, times the published scaling factor, deviation 1; the decoder undoes it."""
        with torch.no_grad():
            latents = torch.cat([self.encoder(self.draw(4, generator)[0])[0] for _ in range(16)])
            mean = latents.mean(dim=(0, 2, 3))
            gain = 1 / (latents.std(dim=(0, 2, 3)) * cascade.NETWORKS["vae"][1]["scaling_factor"])
            half = len(mean)
            into, out = self.vae.quant_conv, self.vae.post_quant_conv
            into.weight[:half] *= gain[:, None, None, None]
            into.bias[:half] = (into.bias[:half] - mean) * gain
            into.bias[half:] += 2 * gain.log()
            out.bias += out.weight[..., 0, 0] @ mean
            out.weight /= gain[None, :, None, None]


def _start_as_identity(network: nn.Module) -> None:
    """Zero the last layer of every residual branch: a deep network then starts to learn as a shallow one."""
    last = {ResnetBlock2D: "conv2", TemporalConvLayer: "conv4", TemporalTransformer: "proj_out"}
    last |= {SpatialTransformer: "proj_out", AddedKVAttention: "to_out", VAEResnet: "conv2", VAEAttention: "to_out"}
    for module in network.modules():
        if type(module) in last:
            layer = getattr(module, last[type(module)])
            for parameter in (layer[-1] if isinstance(layer, nn.Sequential) else layer).parameters():
                nn.init.zeros_(parameter)  # norms, in front of some, stay


def without_time(unet: VideoUNet) -> VideoUNet:
    """The same pixel network for single pictures, on the same parameters: its layers over time are left out.

    So it learns first what Show-1's had learned before as an image model, at half the work.
    """
    still = "UNetMidBlock2DSimpleCrossAttn"
    if unet.config.mid_block_type != still.replace("2D", "3D"):
        return unet
    twin = VideoUNet(replace(unet.config, mid_block_type=still))
    for name, module in twin.named_modules():
        module._parameters.update(unet.get_submodule(name)._parameters)
    return twin


def tokens(checkpoint: Path, name: str, texts: list[str], device: str) -> tuple[Tensor, Tensor]:
    """Ids and mask [N, 77], by the tokenizer that the bundle will get."""
    folder = checkpoint / Path(cascade.NETWORKS[name][0]).parent / "tokenizer"
    convert = {"t5": convert_t5, "clip": convert_clip}[name]
    batch = Tokenizer.from_text(convert(folder), str(folder)).encode(
        [normalize_t5_prompt(text) for text in texts] if name == "t5" else texts, MAX_TOKENS
    )
    return torch.from_numpy(batch.input_ids).to(device), torch.from_numpy(batch.attention_mask).to(device)


def encode(encoder: nn.Module, ids: Tensor, mask: Tensor, chunk: int = 1024) -> Tensor:
    """Text embeddings, float16 [N, 77, D]: the whole pool's, once."""
    masked = isinstance(encoder, T5Encoder)
    with torch.no_grad():
        batches = zip(ids.split(chunk), mask.split(chunk), strict=True)
        return torch.cat([encoder(*(batch if masked else batch[:1])).half() for batch in batches])


def add_noise(kept: Tensor, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """alpha * clean + sigma * noise (Ho et al. 2020, eq. 4), a timestep [B] for each clip; `kept` is alpha squared."""
    share = kept[timestep].reshape(-1, *[1] * (clean.ndim - 1))
    return share.sqrt() * clean + (1 - share).sqrt() * noise
