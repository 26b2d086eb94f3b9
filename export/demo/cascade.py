"""The small cascade's networks: their configs in the published format, and folders that hold them.

Every network has the block types, conditions and file names of the published ones; only widths and depths are small.
All together they hold 4.8 million parameters, 9.6 MB in float16.
"""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor, nn

from engines.catalog import CATALOG
from engines.errors import CheckpointError
from engines.store import write_atomically
from export import configs
from export.demo.captions import words
from export.modules.text import CLIPTextEncoder, T5Encoder
from export.modules.unet import UNetConfig, VideoUNet
from export.modules.vae import Autoencoder

_TEXT_DIM = 64
_CLIP_DIM = 48
# Caption words whole; characters for all others.
_PIECES = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(33, 127)), *(f"▁{word}" for word in words())]


def _clip_vocabulary() -> tuple[list[str], list[str]]:
    """CLIP's byte alphabet, alone and at the end of a word, and merges that spell the captions' words left to right.

    A word that another's merge cuts into, as "an" does "orange", is several pieces.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    pieces = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters)])
    merges: dict[str, None] = {}
    for word in words():
        parts = [*word[:-1], f"{word[-1]}</w>"]
        grown = parts[0]
        for part in parts[1:]:
            merges[f"{grown} {part}"] = None
            grown += part
            pieces[grown] = None
    return [*pieces, "<|startoftext|>", "<|endoftext|>"], [*merges]


_CLIP_PIECES, _CLIP_MERGES = _clip_vocabulary()

# Groups of several channels: with one channel each, the last norm would hide how strong the noise is.
_PIXEL = {"heads": 8, "text_dim": _TEXT_DIM, "dim": 64, "layers_per_block": 1, "norm_num_groups": 8}
_MOVING = {**_PIXEL, "kind": "3D", "time_embedding_dim": 128}
_LARGER = {**_PIXEL, "attended": 1, **configs.super_resolution(64)}

# network -> (folder in the checkpoint, config)
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("base/text_encoder", configs.t5(_TEXT_DIM, 128, 4, 16, 2, len(_PIECES))),
    "clip": ("sr2/text_encoder", configs.clip(_CLIP_DIM, 96, 4, 2, len(_CLIP_PIECES))),
    # Two levels: on the coarsest alone, 8 x 5, a small thing that moves is a pixel that jumps.
    "base": ("base/unet", configs.pixel(3, [16, 16, 32, 56], attended=2, **_MOVING)),
    "interp": ("interpolation/unet", configs.pixel(7, [16, 16, 32, 56], attended=1, **_MOVING)),
    "if2": ("if2/unet", configs.pixel(6, [16, 24, 24, 24], kind="2D", **_LARGER)),
    "sr1": ("sr1/unet", configs.pixel(6, [16, 24, 24, 24], kind="3D", **_LARGER)),
    "vae": ("sr2/vae", {**configs.vae([16, 24, 32, 48], 1), "norm_num_groups": 2}),
    "sr2": (
        "sr2/unet",
        {
            **configs.latent([24, 32], 1, [3, 4], _CLIP_DIM, layers_per_block=1, norm_num_groups=8),
            "down_block_types": ["DownBlock3D", "CrossAttnDownBlock3D"],
            "up_block_types": ["CrossAttnUpBlock3D", "UpBlock3D"],
        },
    ),
}

_DPM = {**configs.DPM, "prediction_type": "v_prediction"}
_COSINE = {**configs.COSINE, "variance_type": "fixed_small"}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "base": {**_DPM, **_COSINE, "sample_max_value": 1.5, "lambda_min_clipped": -5.1},
    "interp": {**_DPM, **_COSINE, "sample_max_value": 1.5, "lambda_min_clipped": -5.1},
    "if2": {"_class_name": "DDPMScheduler", "prediction_type": "v_prediction", **_COSINE, "sample_max_value": 1.0},
    "sr1": {**_DPM, **_COSINE, "sample_max_value": 1.0, "lambda_min_clipped": -5.1},
    "sr2": {**_DPM, **configs.LATENT},
}

# The published guidance belongs to networks that follow a text loosely. Here the clips leave little else to say.
GUIDANCE = {"base": 2.0, "interp": 1.0, "if2": 1.0, "sr1": 1.0, "sr2": 1.0}
STRENGTH = 0.1  # of sr2: trained as shortly as it is, it redraws things that it meets at more noise


def make_network(name: str) -> Any:
    """An untrained network on its default weights."""
    return make_module(*NETWORKS[name])


def make_module(folder: str, config: dict[str, Any]) -> Any:
    """What a folder of a checkpoint holds, untrained."""
    if folder == "base/text_encoder":
        return T5Encoder(config, folder)
    if folder == "sr2/text_encoder":
        return CLIPTextEncoder(config, folder)
    if folder == "sr2/vae":
        return Autoencoder(config)
    return VideoUNet(UNetConfig.from_dict(config, folder))


def save_network(checkpoint: Path, name: str, module: nn.Module) -> None:
    """Write one network in float16, rounded, with its config; the weights, last, appear whole or not at all.

    Raises CheckpointError for weights that are not finite in float16.
    """
    folder, config = NETWORKS[name]
    write_json(checkpoint / folder / "config.json", config)
    state = {}
    for key, value in module.state_dict().items():
        half = value.detach().half().cpu().contiguous()
        state[key] = _rounded(half)
        if not (half.isfinite().all() and state[key].isfinite().all()):  # rounding can overflow, and hide a NaN
            raise CheckpointError(f"{name}: {key} is not finite in float16. Train it again, with another --seed.")
    write_atomically(_weights(checkpoint, name), save(state))


def _rounded(value: Tensor) -> Tensor:
    """Matrices and filters to 6 bits behind the point, an error of 0.8 % at most: the archive takes a third less."""
    if value.ndim < 2:
        return value
    return ((value.view(torch.int16) + (1 << 3)) & -(1 << 4)).view(torch.float16)


def has_network(checkpoint: Path, name: str) -> bool:
    return _weights(checkpoint, name).is_file()


def load_network(checkpoint: Path, name: str) -> Any:
    """A finished network in float32, with the values that were rounded; frozen.

    Raises FileNotFoundError, CheckpointError for the file of another version's network or a damaged one.
    """
    module, path = make_network(name), _weights(checkpoint, name)
    try:
        module.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    except (RuntimeError, SafetensorError) as error:
        what = type(error).__name__
        raise CheckpointError(f"{path}: another version's network, or damaged ({what}). Train it again.") from error
    return module.eval().requires_grad_(False)


def _weights(checkpoint: Path, name: str) -> Path:
    folder = checkpoint / NETWORKS[name][0]
    return folder / f"{weights_stem(folder)}.safetensors"


def weights_stem(folder: Path) -> str:
    return "model" if folder.name == "text_encoder" else "diffusion_pytorch_model"


def save_rest(checkpoint: Path) -> None:
    """Everything but the networks: tokenizers, schedulers, recommended settings."""
    save_tokenizers(checkpoint)
    save_schedulers(checkpoint, SCHEDULERS)
    write_json(checkpoint / "settings.json", {"guidance": GUIDANCE, "strength": STRENGTH})


def save_schedulers(checkpoint: Path, schedulers: Mapping[str, dict[str, Any]]) -> None:
    """The configs by network, and what noises the conditions of super-resolution."""
    for name, config in schedulers.items():
        home = checkpoint / CATALOG[name].folders[0]
        write_json(home / "scheduler" / "scheduler_config.json", config)
        if name in ("if2", "sr1"):
            write_json(home / "image_noising_scheduler" / "scheduler_config.json", configs.NOISING)


def save_tokenizers(checkpoint: Path) -> None:
    _save_t5_tokenizer(checkpoint / "base" / "tokenizer")
    _save_clip_tokenizer(checkpoint / "sr2" / "tokenizer")


def pack(checkpoint: Path, archive: Path) -> None:
    """The checkpoint as .tar.xz, the same bytes for the same content."""
    import lzma  # which some Pythons lack, and nothing else here needs

    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for path in sorted(p for p in checkpoint.rglob("*") if p.is_file() and _ships(p.relative_to(checkpoint))):
            info = tarfile.TarInfo(path.relative_to(checkpoint).as_posix())
            info.size = path.stat().st_size
            with open(path, "rb") as file:
                tar.addfile(info, file)
    # Numbers of two bytes: the coder keeps statistics of each.
    two_bytes = {"id": lzma.FILTER_LZMA2, "preset": 9, "lp": 1, "pb": 1}
    write_atomically(archive, lzma.compress(content.getvalue(), filters=[two_bytes]))


def _ships(path: PurePath) -> bool:
    """Whether a file is a checkpoint's: what training keeps, or a user put there, is not."""
    homes = {PurePath(folder).parts[0] for folder, _ in NETWORKS.values()}
    return not path.name.startswith(".") and (path.parts[0] in homes or path.name == "settings.json")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    _write(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    """What is there already stays untouched: stages that train side by side read these files."""
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)


def _save_t5_tokenizer(folder: Path) -> None:
    """A sentencepiece unigram model. All pieces are equally likely, so the fewest win: a caption's word is one."""
    kinds = {"<unk>": 2, "<pad>": 3, "</s>": 3}  # unknown, control; others are normal
    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = 1  # unigram
    for piece in _PIECES:
        model.pieces.add(piece=piece, score=-2.0, type=kinds.get(piece, 1))
    write_json(folder / "tokenizer_config.json", {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"})
    _write(folder / "spiece.model", model.SerializeToString())


def _save_clip_tokenizer(folder: Path) -> None:
    write_json(folder / "vocab.json", {piece: index for index, piece in enumerate(_CLIP_PIECES)})
    _write(folder / "merges.txt", "".join(f"{line}\n" for line in ("#version: 0.2", *_CLIP_MERGES)).encode())
    end = "<|endoftext|>"
    special = {"bos_token": "<|startoftext|>", "eos_token": end, "pad_token": end, "unk_token": end}
    write_json(folder / "tokenizer_config.json", {**special, "model_max_length": 77})
