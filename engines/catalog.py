"""The nine networks of the cascade: where a checkpoint keeps them, which stage runs them, what their engines bind.

`docs/engines.md` is the same contract in prose.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from engines.errors import SettingsError
from engines.spec import Axis, Binding, GraphSpec

STAGES = ("text", "base", "interp", "sr1", "sr2")


@dataclass(frozen=True)
class Network:
    """One network, one engine. `folders` are the names its checkpoint goes by: short, and as downloaded."""

    name: str
    stage: str
    folders: tuple[str, ...]
    subfolder: str

    @property
    def path(self) -> str:
        """Its folder in a checkpoint with short names."""
        return f"{self.folders[0]}/{self.subfolder}"


_BASE = ("base", "show-1-base")
_SR2 = ("sr2", "show-1-sr2")

CATALOG: dict[str, Network] = {
    network.name: network
    for network in (
        Network("t5", "text", _BASE, "text_encoder"),
        Network("base", "base", _BASE, "unet"),
        Network("interp", "interp", ("interpolation", "show-1-interpolation"), "unet"),
        Network("if2", "sr1", ("if2", "IF-II-L-v1.0"), "unet"),
        Network("sr1", "sr1", ("sr1", "show-1-sr1"), "unet"),
        Network("clip", "sr2", _SR2, "text_encoder"),
        Network("sr2", "sr2", _SR2, "unet"),
        Network("vae_encoder", "sr2", _SR2, "vae"),
        Network("vae_decoder", "sr2", _SR2, "vae"),
    )
}

UNETS = ("base", "interp", "if2", "sr1", "sr2")
DEEP = "deep"  # what a UNet's coarser levels hand to its finest: an output of a step, an input of a shallow one

TOKENIZERS = {"t5": _BASE, "clip": _SR2}
TEXT_ENCODERS = tuple(TOKENIZERS)


def networks_of(stages: Iterable[str]) -> list[Network]:
    """The networks of some stages ("all" for every one), in the cascade's order."""
    wanted = set(stages)
    unknown = wanted - {"all", *STAGES}
    if unknown:
        raise SettingsError(f"unknown stage {', '.join(sorted(unknown))}; allowed: all, {', '.join(STAGES)}.")
    return [network for network in CATALOG.values() if "all" in wanted or network.stage in wanted]


# Frames and batch of each UNet: (min, opt, max). interp takes all seven gaps, guided, as one batch of 14.
_BATCH = {"base": (1, 2, 16), "interp": (1, 14, 32), "if2": (1, 2, 4), "sr1": (1, 2, 4), "sr2": (1, 2, 4)}
_FRAMES = {"base": (1, 8, 64), "interp": (2, 5, 32), "if2": (1, 1, 8), "sr1": (1, 8, 32), "sr2": (1, 29, 256)}

_TEXT_BATCH = Axis(1, 2, 8)
_TOKENS = Axis(1, 77, 512)


def _pixels(opt: int, multiple: int, least: int) -> Axis:
    """Up to 1024, or four times the size tuned for where that is more: one engine serves other formats."""
    opt = max(opt // multiple * multiple, least)
    return Axis(least, opt, max(4 * opt, 1024 // multiple * multiple), multiple)


def text_graph(width: int, dtype: str, max_tokens: int | None = None) -> GraphSpec:
    """A text encoder: T5, which reads a mask, or CLIP, which reads none and has positions for `max_tokens`."""
    axes = ("batch", "tokens")
    names = ("input_ids", "attention_mask") if max_tokens is None else ("input_ids",)
    tokens = _TOKENS if max_tokens is None else Axis(1, max_tokens, max_tokens)
    return GraphSpec(
        "encode",
        tuple(Binding(name, "int64", axes) for name in names),
        (Binding("prompt_embeds", dtype, (*axes, width)),),
        {"batch": _TEXT_BATCH, "tokens": tokens},
    )


def context_graph(text_dim: int, text_kv: int, cond_emb: int | None, noise_level: bool, dtype: str) -> GraphSpec:
    """What a prompt contributes to every step; see `docs/engines.md`."""
    inputs = [Binding("prompt_embeds", dtype, ("batch", "tokens", text_dim))]
    outputs = [Binding("text_kv", dtype, ("batch", "tokens", text_kv))]
    if noise_level:
        inputs.append(Binding("noise_level", "float32", ("batch",)))
    if cond_emb:
        outputs.append(Binding("cond_emb", dtype, ("batch", cond_emb)))
    profile = {"batch": _TEXT_BATCH, "tokens": _TOKENS}
    return GraphSpec("context", tuple(inputs), tuple(outputs), profile)


def step_graph(
    network: str,
    in_channels: int,
    noise_channels: int,
    learned_variance: bool,
    context: GraphSpec,
    size_multiple: int,
    levels: int,
    deep_channels: int,
    size: tuple[int, int],
    dtype: str,
) -> GraphSpec:
    """One denoising step at (height, width) `size`, fed with the outputs of `context`."""
    outputs = {"noise_pred": noise_channels}
    if learned_variance:
        outputs["variance_frac"] = noise_channels
    outputs[DEEP] = deep_channels
    least = 2 ** (levels - 1)  # one pixel at the coarsest level
    return GraphSpec(
        "step",
        (_pixels_of("sample", in_channels, dtype), Binding("timestep", "float32", ("batch",)), *context.outputs),
        tuple(_pixels_of(name, channels, dtype) for name, channels in outputs.items()),
        {
            "batch": Axis(*_BATCH[network]),
            "frames": Axis(*_FRAMES[network]),
            "height": _pixels(size[0], size_multiple, least),
            "width": _pixels(size[1], size_multiple, least),
            "tokens": _TOKENS,
        },
    )


def shallow_graph(step: GraphSpec, reads_text: bool) -> GraphSpec:
    """A step that takes the coarser levels' part from one before (DeepCache): see `docs/engines.md`."""
    sample, timestep, *context = step.inputs
    *outputs, deep = step.outputs
    read = [binding for binding in context if reads_text or binding.name != "text_kv"]
    axes = {axis for binding in (sample, *read) for axis in binding.axes}
    profile = {axis: limits for axis, limits in step.profile.items() if axis in axes}
    return GraphSpec("shallow", (sample, timestep, deep, *read), tuple(outputs), profile)


def predictions(graph: GraphSpec) -> list[str]:
    """Names of a graph's outputs, less what a step hands on to shallow ones."""
    return [binding.name for binding in graph.outputs if binding.name != DEEP]


def _pixels_of(name: str, channels: int, dtype: str) -> Binding:
    return Binding(name, dtype, ("batch", channels, "frames", "height", "width"))


# The autoencoder takes frames one by one or a few together: its activations are the largest of the cascade.
_VAE_FRAMES = Axis(1, 1, 32)


def vae_encoder_graph(latent_channels: int, factor: int, size: tuple[int, int], dtype: str) -> GraphSpec:
    latents = ("frames", latent_channels, f"height/{factor}", f"width/{factor}")
    profile = {
        "frames": _VAE_FRAMES,
        "height": _pixels(size[0], factor, factor),
        "width": _pixels(size[1], factor, factor),
    }
    return GraphSpec(
        "encode",
        (Binding("image", dtype, ("frames", 3, "height", "width")),),
        (Binding("mean", dtype, latents), Binding("logvar", dtype, latents)),
        profile,
    )


def vae_decoder_graph(latent_channels: int, factor: int, size: tuple[int, int], dtype: str) -> GraphSpec:
    profile = {
        "frames": _VAE_FRAMES,
        "height": _pixels(size[0] // factor, 1, 1),
        "width": _pixels(size[1] // factor, 1, 1),
    }
    return GraphSpec(
        "decode",
        (Binding("latents", dtype, ("frames", latent_channels, "height", "width")),),
        (Binding("image", dtype, ("frames", 3, f"height*{factor}", f"width*{factor}")),),
        profile,
    )
