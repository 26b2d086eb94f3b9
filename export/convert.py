"""`export convert`: weights that were published as pickles, written as safetensors.

A pickle can run any code when it is loaded. These are read by torch's unpickler of weights, which makes tensors and
refuses what is none, and only here: builds read safetensors. Of the published checkpoints Show-1's hold pickles.
"""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from engines.catalog import networks_of
from engines.errors import CheckpointError
from engines.store import write_atomically
from export.checkpoint import find_folder, find_weights, read_config, weight_files
from runtime.runner import first_line

PICKLE = ".bin"
_STEMS = ("diffusion_pytorch_model", "pytorch_model")  # diffusers' and transformers' file names


def is_pickle(file: str) -> bool:
    """Whether a file of a repository is a pickle of weights, by its name; training leaves others beside them."""
    name = PurePosixPath(file).name
    return name.startswith(_STEMS) and name.endswith(PICKLE)


def safe_name(name: str) -> str:
    """What the publishers' libraries call the safetensors in the place of a pickle, and their index likewise."""
    return re.sub(r"^pytorch_model", "model", name).replace(PICKLE, ".safetensors", 1)


def convert_checkpoint(checkpoint: Path, stages: Iterable[str], precision: str) -> Iterator[Path]:
    """Convert what is pickled of the networks of `stages`; yields every file written. Raises CheckpointError."""
    fp16, networks = precision == "fp16", networks_of(stages)
    for folder in dict.fromkeys(find_folder(checkpoint, network.folders, network.subfolder) for network in networks):
        try:
            weight_files(folder, fp16)
        except CheckpointError:
            if not (written := convert(folder, fp16)):
                raise
            yield from written


def convert(folder: Path, prefer_fp16: bool, remove: bool = False) -> list[Path]:
    """Write a folder's pickled weights as safetensors, shard by shard, their index last; returns the files written.

    Of two variants the one asked for is taken. `remove` deletes each pickle once its tensors are written, so that the
    disk holds one shard twice at most; what an earlier call has written then stands for its pickle. Raises
    CheckpointError for files that hold anything but tensors.
    """

    def there(path: Path) -> bool:
        return path.is_file() or path.with_name(safe_name(path.name)).is_file()

    files, index = find_weights(folder, prefer_fp16, _STEMS, PICKLE, there)
    written = []
    for path in files:
        if path.is_file():
            written.append(_write(path))
            if remove:
                path.unlink()
    if index:
        target, content = index.with_name(safe_name(index.name)), read_config(index)
        content["weight_map"] = {name: safe_name(file) for name, file in content["weight_map"].items()}
        write_atomically(target, json.dumps(content, indent=2).encode())
        written.append(target)
    return written


def _write(path: Path) -> Path:
    target = path.with_name(safe_name(path.name))
    temporary = target.with_name(f".{target.name}")
    try:
        save_file(_read(path), temporary, {"format": "pt"})
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target} cannot be written ({error}). Is there room on the disk?") from None
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _read(path: Path) -> dict[str, Tensor]:
    try:
        # Mapped, a shard of 10 GB takes no memory; torch's oldest format cannot be.
        state = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:  # torch's text recommends to read it all the same
        raise CheckpointError(
            f"{path} holds objects that are no tensors and could run code, or is damaged (a git clone without git-lfs "
            "holds pointers alone), and is refused. Download it again."
        ) from None
    except Exception as error:  # damaged ones raise all sorts
        raise CheckpointError(f"{path} cannot be read ({first_line(error)}). Download it again.") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} does not hold the tensors of one network by their names, and is refused.")
    return dict(_apart(state))


def _apart(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with memory of its own, as safetensors want it: T5's embedding goes by two names."""
    seen = set()
    for name, value in state.items():
        memory = value.untyped_storage().data_ptr()
        yield name, value.clone(memory_format=torch.contiguous_format) if memory in seen else value.contiguous()
        seen.add(memory)
