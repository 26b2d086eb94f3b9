"""The cascade's networks, loaded from a checkpoint and cut into the graphs that become their engines."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines import catalog
from engines.catalog import Network
from engines.errors import CheckpointError, SettingsError
from engines.memory import is_short_of_memory
from engines.spec import PRECISIONS, Binding, GraphSpec
from export.checkpoint import (
    file_hash,
    find_folder,
    load_vae,
    load_weights,
    read_config,
    tensor_sizes,
    weight_files,
)
from export.modules.text import CLIPTextEncoder, T5Encoder
from export.modules.unet import UNetConfig, UNetContext, UNetShallow, UNetStep, VideoUNet
from export.modules.vae import Autoencoder, VAEDecoder, VAEEncoder, downscaling
from runtime.config import stage_sizes
from runtime.schedulers import SchedulerConfig

# What each UNet's in_channels is made of: guards against a checkpoint in the wrong folder.
_IN_CHANNELS = {"base": 3, "interp": 7, "if2": 6, "sr1": 6, "sr2": 4}
_NOISE_CHANNELS = {"base": 3, "interp": 3, "if2": 3, "sr1": 3, "sr2": 4}


@dataclass(frozen=True)
class Source:
    """A network's files in a checkpoint, found but not loaded."""

    network: Network
    folder: Path
    config: dict[str, Any]
    weights: list[Path]
    scheduler: dict[str, Any] | None  # UNets only

    @classmethod
    def find(cls, network: Network, checkpoint: Path, precision: str) -> "Source":
        home = find_folder(checkpoint, network.folders)
        folder = home / network.subfolder
        config = read_config(folder / "config.json")
        scheduler = None
        if network.name in catalog.UNETS:
            scheduler = read_config(home / "scheduler" / "scheduler_config.json")
            SchedulerConfig.from_dict(scheduler, f"{home.name}/scheduler/scheduler_config.json")
        return cls(network, folder, config, weight_files(folder, precision == "fp16"), scheduler)

    @property
    def where(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def vae(self) -> dict[str, Any] | None:
        """The config of the autoencoder whose latents sr2 works on."""
        return read_config(self.folder.parent / "vae" / "config.json") if self.network.name == "sr2" else None

    @cached_property  # from the files' headers; a build asks many times
    def parameters(self) -> int:
        return sum(tensor_sizes(self.weights))

    @cached_property
    def tensors(self) -> int:
        return len(tensor_sizes(self.weights))

    @property
    def learned_variance(self) -> bool:
        """Whether the stage's scheduler reads the variance half of the network's output."""
        return self.scheduler is not None and SchedulerConfig.from_dict(self.scheduler, self.where).learned_variance

    def fingerprint(self) -> dict[str, str]:
        config = json.dumps([self.config, self.vae], sort_keys=True)
        return {"weights": file_hash(self.weights), "config": hashlib.sha256(config.encode()).hexdigest()}

    def made(self, engine: Mapping[str, str]) -> bool:
        """Whether an engine (its entry's `source`) was made from these files; reads all of them."""
        return self.fingerprint().items() <= engine.items()


@dataclass(frozen=True)
class Graph:
    """A module to be traced, its contract, and how to make inputs for it: `example(sizes, generator)`."""

    spec: GraphSpec
    module: nn.Module
    example: Callable[[Mapping[str, int], torch.Generator], list[Tensor]]


@dataclass(frozen=True)
class LoadedNetwork:
    graphs: list[Graph]
    properties: dict[str, Any]


def load(source: Source, precision: str, size: tuple[int, int], keep_variance: bool = False) -> LoadedNetwork:
    """Load a network's weights and cut it into graphs.

    `size` is (width, height) of the finished video; `keep_variance` keeps the variance half of a UNet's output even
    where its scheduler drops it. Raises CheckpointError for files that do not make this network, SettingsError for a
    precision that modules do not have, MemoryError where there is too little.
    """
    name = source.network.name
    if precision not in PRECISIONS:
        raise SettingsError(f"precision {precision!r}; allowed: {', '.join(PRECISIONS)}.")
    try:
        if name in catalog.UNETS:
            return _unet(source, precision, size, keep_variance)
        if name in catalog.TEXT_ENCODERS:
            return (_t5 if name == "t5" else _clip)(source, precision)
        return _vae(source, precision, size)
    except KeyError as key:
        raise CheckpointError(f"{source.where}/config.json: {key} is missing. Download it again.") from None
    # What layers raise for impossible sizes, and torch where it gets no memory.
    except (TypeError, ValueError, IndexError, ZeroDivisionError, RuntimeError) as error:
        if is_short_of_memory(error):
            raise MemoryError(f"{name}: {error}") from None
        raise CheckpointError(
            f"{source.where}/config.json makes no {name} network ({type(error).__name__}: {error}). Download it again."
        ) from error


def _empty(build: Callable[[], nn.Module]) -> Any:
    with torch.device("meta"):
        return build()


def _dtype(precision: str) -> torch.dtype:
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def _random(binding: Binding, sizes: Mapping[str, int], generator: torch.Generator, scale: float = 1.0) -> Tensor:
    shape = [sizes[axis] if isinstance(axis, str) else axis for axis in binding.axes]
    return (torch.randn(shape, generator=generator) * scale).to(getattr(torch, binding.dtype))


def _token_ids(sizes: Mapping[str, int], vocabulary: int, generator: torch.Generator) -> Tensor:
    return torch.randint(vocabulary, (sizes["batch"], sizes["tokens"]), generator=generator)


def _t5(source: Source, precision: str) -> LoadedNetwork:
    config = source.config
    module = _empty(lambda: T5Encoder(config, source.where))
    # The embedding is stored once or twice, under either name.
    renames = {"encoder.embed_tokens.": "shared."}
    load_weights(module, source.weights, _dtype(precision), source.where, renames)
    spec = catalog.text_graph(config["d_model"], PRECISIONS[precision])

    def example(sizes: Mapping[str, int], generator: torch.Generator) -> list[Tensor]:
        mask = torch.ones(sizes["batch"], sizes["tokens"], dtype=torch.int64)
        mask[0, sizes["tokens"] // 2 :] = 0  # one padded text
        return [_token_ids(sizes, config["vocab_size"], generator), mask]

    return LoadedNetwork([Graph(spec, module, example)], {})


def _clip(source: Source, precision: str) -> LoadedNetwork:
    config = source.config
    module = _empty(lambda: CLIPTextEncoder(config, source.where))
    load_weights(module, source.weights, _dtype(precision), source.where, ignore=("position_ids", "text_projection"))
    max_tokens = config.get("max_position_embeddings", 77)
    spec = catalog.text_graph(config["hidden_size"], PRECISIONS[precision], max_tokens)

    def example(sizes: Mapping[str, int], generator: torch.Generator) -> list[Tensor]:
        return [_token_ids(sizes, config["vocab_size"], generator)]

    return LoadedNetwork([Graph(spec, module, example)], {"max_tokens": max_tokens})


def _vae(source: Source, precision: str, size: tuple[int, int]) -> LoadedNetwork:
    config, encodes = source.config, source.network.name == "vae_encoder"
    vae = _empty(lambda: Autoencoder(config))
    load_vae(vae, source.weights, _dtype(precision), source.where)
    factor = downscaling(config)
    make_spec = catalog.vae_encoder_graph if encodes else catalog.vae_decoder_graph
    spec = make_spec(config["latent_channels"], factor, (size[1], size[0]), PRECISIONS[precision])
    module, spread = (VAEEncoder(vae), 0.5) if encodes else (VAEDecoder(vae), 1.0)  # of pixels, of latents
    graph = Graph(spec, module, lambda sizes, g: [_random(spec.inputs[0], sizes, g, spread)])
    return LoadedNetwork([graph], {"factor": factor, "scaling_factor": config.get("scaling_factor", 0.18215)})


def _unet(source: Source, precision: str, size: tuple[int, int], keep_variance: bool) -> LoadedNetwork:
    name, where = source.network.name, f"{source.where}/config.json"
    config = UNetConfig.from_dict(source.config, where)
    noise_channels, dtype = _NOISE_CHANNELS[name], PRECISIONS[precision]
    if config.in_channels != _IN_CHANNELS[name] or config.out_channels not in (noise_channels, 2 * noise_channels):
        raise CheckpointError(
            f"{where}: {config.in_channels} channels in and {config.out_channels} out; the {name} network has "
            f"{_IN_CHANNELS[name]} in and {noise_channels} or {2 * noise_channels} out. "
            "Is another stage's checkpoint in this folder?"
        )
    has_variance = config.out_channels == 2 * noise_channels
    if source.learned_variance and not has_variance:
        raise CheckpointError(f"{where}: the scheduler wants a learned variance, the network predicts none.")
    learned_variance = has_variance and (source.learned_variance or keep_variance)

    unet = _empty(lambda: VideoUNet(config))
    load_weights(unet, source.weights, _dtype(precision), source.where)
    if has_variance and not learned_variance:
        unet.drop_variance(noise_channels)

    text_kv = sum(2 * attention.channels for attention in unet.text_attentions())
    cond_emb = config.time_embedding_dim if config.addition_embed_type else None
    context = catalog.context_graph(config.text_dim, text_kv, cond_emb, bool(config.class_embed_type), dtype)
    width, height = stage_sizes(size)[name]
    if source.vae:
        try:
            factor = downscaling(source.vae)
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{source.folder.parent.name}/vae/config.json: {error!r}. Download it again."
            ) from None
        width, height = width // factor, height // factor
    step = catalog.step_graph(
        name,
        config.in_channels,
        noise_channels,
        learned_variance,
        context,
        config.size_multiple,
        len(config.block_out_channels),
        unet.deep_channels,
        (height, width),
        dtype,
    )
    shallow = catalog.shallow_graph(step, unet.finest_attends)
    context_module, step_module = UNetContext(unet), UNetStep(unet, noise_channels)

    def context_example(sizes: Mapping[str, int], generator: torch.Generator) -> list[Tensor]:
        inputs = [_random(context.inputs[0], sizes, generator)]
        if config.class_embed_type:
            inputs.append(torch.rand(sizes["batch"], generator=generator) * 999)
        return inputs

    def step_example(sizes: Mapping[str, int], generator: torch.Generator) -> list[Tensor]:
        sample = _random(step.inputs[0], sizes, generator)
        timestep = torch.rand(sizes["batch"], generator=generator) * 999
        with torch.no_grad():
            return [sample, timestep, *context_module(*context_example(sizes, generator))]

    def shallow_example(sizes: Mapping[str, int], generator: torch.Generator) -> list[Tensor]:
        sample, timestep, *made = step_example({"tokens": 2, **sizes}, generator)
        read = made if unet.finest_attends else made[1:]  # text_kv comes first
        return [sample, timestep, _random(shallow.inputs[2], sizes, generator), *read]

    graphs = [
        Graph(context, context_module, context_example),
        Graph(step, step_module, step_example),
        Graph(shallow, UNetShallow(unet, noise_channels), shallow_example),
    ]
    return LoadedNetwork(graphs, {"text_dim": config.text_dim, "noise_level": bool(config.class_embed_type)})


def schedulers(sources: Iterable[Source]) -> dict[str, dict[str, Any]]:
    """The published scheduler configs of the UNets among `sources`, validated: name -> config, "sr1.noising" -> ..."""
    found = {}
    for source in sources:
        if source.scheduler is None:
            continue
        name, home = source.network.name, source.folder.parent
        found[name] = source.scheduler
        if source.network.stage == "sr1":
            path = home / "image_noising_scheduler" / "scheduler_config.json"
            found[f"{name}.noising"] = read_config(path)
            SchedulerConfig.from_dict(found[f"{name}.noising"], f"{home.name}/{path.parent.name}/{path.name}")
    return found
