"""`export convert`: weights that were published as pickles, written as safetensors.

A pickle can run any code when it is loaded. These are read by torch's unpickler of weights, which makes tensors and
refuses what is none, and only here: builds read safetensors. Show-1's repositories hold pickles alone, T5 in float32.
"""

import json
import pickle
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from engines.catalog import networks_of
from engines.errors import CheckpointError
from engines.store import move, write_atomically
from export.checkpoint import (
    SAFETENSORS,
    find_folder,
    find_weights,
    is_weights,
    save_weights,
    unreadable,
    weight_files,
)
from export.config_file import read_config

PICKLE = ".bin"
_PICKLE_STEMS = ("diffusion_pytorch_model", "pytorch_model")  # as diffusers and transformers name them


def is_pickle(file: str) -> bool:
    """Whether a file of a repository is a pickle of weights that `convert` finds, by its name."""
    return is_weights(file, _PICKLE_STEMS, PICKLE)


def target_of(file: Path, fp16: bool) -> Path:
    """Where the tensors of a pickle go, or its index."""
    return file.with_name(_safe_name(file.name, fp16))


def _safe_name(name: str, half: bool) -> str:
    """What the publishers' libraries call the safetensors in the place of a pickle, or their index; `half`: as fp16."""
    name = re.sub(r"^pytorch_model", "model", name).replace(PICKLE, SAFETENSORS, 1)
    if half and ".fp16" not in name:
        name = re.sub(r"\.json$" if name.endswith(".json") else "(?<=model)", r".fp16\g<0>", name, count=1)
    return name


def convert_checkpoint(checkpoint: Path, stages: Iterable[str], precision: str) -> Iterator[Path]:
    """Convert what is pickled of the networks of `stages`; yields every file written. Raises CheckpointError."""
    fp16, networks = precision == "fp16", networks_of(stages)
    for folder in dict.fromkeys(find_folder(checkpoint, network.folders, network.subfolder) for network in networks):
        if not is_there(folder, fp16) and any(is_pickle(path.name) for path in folder.iterdir()):
            yield from convert(folder, fp16)
        weight_files(folder, fp16)  # raises where there still are none


def is_there(folder: Path, fp16: bool) -> bool:
    """Whether a folder has safetensors of the precision asked for, whole."""
    try:
        return all((".fp16" in path.name) is fp16 for path in weight_files(folder, fp16))
    except CheckpointError:
        return False


def convert(folder: Path, fp16: bool, remove: bool = False) -> list[Path]:
    """Write a folder's pickled weights as safetensors, shard by shard, their index last; returns the files written.

    `fp16` takes the half-precision files where there are any, else it halves the full ones: a build to fp16 can then
    map them instead of holding its own copy. `remove` deletes each pickle once its tensors are written, so that the
    disk holds one shard twice at most; what an earlier call has written then stands for its pickle. Raises
    CheckpointError for files that hold anything but tensors, or numbers that half precision has not.
    """
    # Of shards, some may be converted.
    files, index = find_weights(
        folder, fp16, _PICKLE_STEMS, PICKLE, lambda path: path.is_file() or target_of(path, fp16).is_file()
    )
    written = []
    for path in filter(Path.is_file, files):
        written.append(target_of(path, fp16))
        _write(path, written[-1], fp16)
        if remove:
            path.unlink()
    if index:
        content = read_config(index)
        content["weight_map"] = {name: _safe_name(file, fp16) for name, file in content["weight_map"].items()}
        written.append(target_of(index, fp16))
        write_atomically(written[-1], json.dumps(content, indent=2).encode())
    return written


def _write(path: Path, target: Path, fp16: bool) -> None:
    temporary = target.with_name(f".{target.name}")
    try:
        save_weights(dict(_apart(path, _read(path), fp16)), temporary, {"format": "pt"})
        move(temporary, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target} cannot be written ({error}). Is there room on the disk?") from None
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        # Mapped, a shard of 10 GB takes no memory (but on Windows, see `checkpoint`); torch's oldest format cannot be.
        state = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path) and sys.platform != "win32")
    except pickle.UnpicklingError:  # torch's text recommends to read it all the same
        raise CheckpointError(
            f"{path} holds objects that are no tensors and could run code, or is damaged (a git clone without git-lfs "
            "holds pointers alone), and is refused. Download it again."
        ) from None
    except Exception as error:  # damaged ones raise all sorts
        raise unreadable(path, error) from None
    if not isinstance(state, Mapping) or not all(map(_is_weight, state, state.values())):
        raise CheckpointError(f"{path} does not hold the tensors of one network by their names, and is refused.")
    return state


def _is_weight(name: Any, value: Any) -> bool:
    plain = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta and not value.is_quantized
    return isinstance(name, str) and plain


def _apart(path: Path, state: Mapping[str, Tensor], fp16: bool) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with memory of its own, as safetensors want it: T5's embedding goes by two names."""
    seen = set()
    for name, value in state.items():
        memory, full = value.untyped_storage().data_ptr(), value
        if fp16 and value.is_floating_point():
            value = value.half()
            if bool(value.isinf().any()) and not bool(full.isinf().any()):
                raise CheckpointError(f"{path}: {name} is out of half precision's range. Use --precision fp32.")
        yield name, value.clone(memory_format=torch.contiguous_format) if memory in seen else value.contiguous()
        seen.add(memory)
