"""Checkpoints of random weights in the published format: something to build and run where the real ones are not.

Nothing is learned: the videos are noise in colour. Speed and memory hardly depend on a weight's value, so the published
size shows what the real checkpoints need.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from engines.catalog import networks_of
from engines.errors import OutputError, SettingsError
from engines.memory import GIB
from engines.store import move
from export.checkpoint import save_weights
from export.configs import PUBLISHED, SCHEDULERS
from export.demo import cascade
from export.modules.vae import Autoencoder, VAEDecoder

STAMP = "random-checkpoint.json"  # what was asked for; by it `renew` knows a folder of its own
_SHARD = 2 * GIB
_LEVELS = 5  # a weight is one of 11 values: they pack to a quarter and are exact in float16


# size -> folder -> config.json. The golden size is that of the demo cascade, near the golden set's.
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {"published": PUBLISHED, "golden": dict(cascade.NETWORKS.values())}
_OWN = {STAMP, "settings.json", *(folder.partition("/")[0] for folder in PUBLISHED)}  # what stands in `out`


def random_checkpoint(
    out: Path, size: str = "golden", seed: int = 0, stages: Iterable[str] = ("all",), renew: bool = False
) -> None:
    """Write the networks of `stages` in the published folders below `out`, which must not exist; schedulers and
    tokenizers of all.

    With `renew`, `out` may be a random checkpoint: it stays where it is what is asked for, with this version's
    networks, else a new one takes its place. Weights are drawn tensor by tensor and written in shards of 2 GiB, in
    float16: the published size has 24 GB of them. Raises SettingsError, OutputError for an `out` that is anything else
    or cannot be written.
    """
    out = out.absolute()  # "." has no name
    if size not in CONFIGS:
        raise SettingsError(f"size {size!r}; allowed: {', '.join(CONFIGS)}.")
    if not 0 <= seed < 2**64:
        raise SettingsError(f"seed {seed}; allowed: 0 to 2^64 - 1.")
    if out.exists() and not renew:
        raise OutputError(f"{out} exists. Choose a new folder for --out.")
    networks = networks_of(stages)
    wanted = {network.path for network in networks}
    configs = {folder: config for folder, config in CONFIGS[size].items() if folder in wanted}
    stamp = {"size": size, "seed": seed, "stages": list(dict.fromkeys(network.stage for network in networks))}
    if out.exists():
        there = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
        if there and (STAMP not in there or there - _OWN):
            raise OutputError(
                f"{out} holds other files, or a random checkpoint of an older version. Delete it if nothing in it is "
                "needed, or choose another --out."
            )
        if _is_current(out, stamp, configs):
            return
    need = 2 * sum(math.prod(shape) for f, c in configs.items() for shape in _shapes(f, c).values())
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if need > free:
            raise OutputError(
                f"{out}: {need / 1e9:.3g} GB needed, {free / 1e9:.3g} GB free. Make room or choose another."
            )
        # Under another name until it is whole, lest an interrupted run is taken for a checkpoint.
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
            made = Path(folder) / out.name
            _write(made, configs, torch.Generator().manual_seed(seed))
            if size == "golden":
                cascade.save_rest(made)
            else:
                cascade.save_tokenizers(made)
                cascade.save_schedulers(made, SCHEDULERS)
            cascade.write_json(made / STAMP, stamp)
            if out.exists():
                move(out, Path(folder) / "replaced")
            move(made, out)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{out}: cannot be written ({error}). Make room or choose another --out.") from None


def _is_current(folder: Path, stamp: dict[str, Any], configs: Mapping[str, dict[str, Any]]) -> bool:
    wanted = {STAMP: stamp, **{f"{name}/config.json": config for name, config in configs.items()}}
    try:
        return all(json.loads((folder / name).read_text()) == content for name, content in wanted.items())
    except (OSError, ValueError):
        return False


def _write(out: Path, configs: Mapping[str, dict[str, Any]], generator: torch.Generator) -> None:
    for folder, config in configs.items():
        cascade.write_json(out / folder / "config.json", config)
        shapes = _shapes(folder, config)
        draws = ((name, _draw(name, shape, generator)) for name, shape in shapes.items())
        if folder == "sr2/vae":
            draws = _with_contrast(config, dict(draws))
        _save(out / folder, draws, 2 * sum(map(math.prod, shapes.values())))


def _shapes(folder: str, config: dict[str, Any]) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: value.shape for name, value in cascade.make_module(folder, config).state_dict().items()}


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """float16: ones for scales, zeros for biases, for the rest torch's usual range, 1/sqrt(inputs), on 11 levels."""
    if len(shape) < 2:
        return torch.full(shape, float(name.endswith("weight")), dtype=torch.float16)
    levels = torch.randint(-_LEVELS, _LEVELS + 1, shape, dtype=torch.int8, generator=generator)
    return levels.half() * (1 / (_LEVELS * math.prod(shape[1:]) ** 0.5))


def _with_contrast(config: dict[str, Any], state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Scale the autoencoder's last layer so that pictures spread over [-1, 1]; untrained ones are all but grey."""
    vae = Autoencoder(config).requires_grad_(False)
    vae.load_state_dict(state)
    spread = VAEDecoder(vae)(torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))).std()
    state["decoder.conv_out.weight"] *= (0.5 / spread).half()
    yield from state.items()


def _save(folder: Path, values: Iterator[tuple[str, Tensor]], size: int) -> None:
    """One safetensors file, or shards and their index, as transformers and diffusers write them."""
    stem, count = cascade.weights_stem(folder), math.ceil(size / _SHARD)
    if count == 1:
        save_weights(dict(values), folder / f"{stem}.safetensors")
        return
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    index = 1

    def finish() -> None:
        name = f"{stem}-{index:05}-of-{count:05}.safetensors"
        save_weights(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, value in values:
        shard[name] = value
        if index < count and sum(2 * v.numel() for v in shard.values()) > size / count:
            finish()
            index += 1
    finish()
    content = {"metadata": {"total_size": size}, "weight_map": weight_map}
    cascade.write_json(folder / f"{stem}.safetensors.index.json", content)
