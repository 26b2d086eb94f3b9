"""Published checkpoint folders: finding them, loading safetensors into our modules."""

import hashlib
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engines.errors import CheckpointError
from engines.memory import is_short_of_memory
from export.config_file import read_config
from runtime.runner import first_line

SAFETENSORS = ".safetensors"
_SAFE_STEMS = ("diffusion_pytorch_model", "model")  # as diffusers and transformers name them
# torch's mapping on Windows takes as much of the memory that may be promised as the file is large.
_READ = {"backend": "pread"} if sys.platform == "win32" else {}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")

# Autoencoders saved before diffusers 0.18 call their attention projections otherwise.
_OLD_VAE_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def find_folder(checkpoint: Path, names: Iterable[str], subfolder: str = "") -> Path:
    """The one of `names` that lies below `checkpoint`. Raises CheckpointError where none or several do."""
    names = list(names)
    there = [name for name in names if (checkpoint / name / subfolder).is_dir()]
    if len(there) > 1:  # e.g. a random checkpoint beside a downloaded one
        raise CheckpointError(
            f"{checkpoint} holds {' and '.join(there)}, which go by different names for the same networks. Move all "
            "but one of them away."
        )
    if there:
        return checkpoint / there[0] / subfolder
    raise CheckpointError(
        f"{checkpoint}: no folder {' or '.join(f'{n}/{subfolder}'.rstrip('/') for n in names)}. Give --checkpoint a "
        "folder that holds the published checkpoints, or fetch them with `python -m export download`."
    )


def is_safetensors(file: str) -> bool:
    """Whether a file of a repository holds weights that `weight_files` finds, by its name."""
    return is_weights(file, _SAFE_STEMS, SAFETENSORS)


def is_weights(file: str, stems: Iterable[str], suffix: str) -> bool:
    """Whether `find_weights` looks for such a name: whole or a shard, of either variant."""
    name = rf"({'|'.join(stems)})(\.fp16)?(-\d+-of-\d+)?{re.escape(suffix)}"
    return re.fullmatch(name, PurePosixPath(file).name) is not None


def weight_files(folder: Path, prefer_fp16: bool) -> list[Path]:
    """The safetensors files of a folder: whole or in shards, full precision or the fp16 variant.

    Both variants load into either precision; the one asked for is taken where both are there. Raises CheckpointError.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing. Download the whole checkpoint again.")
    files, _ = find_weights(folder, prefer_fp16, _SAFE_STEMS, SAFETENSORS)
    if files:
        return files
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder}: {', '.join(pickles)} is a pickle, which can run any code when it is loaded, and is refused. "
            "Builds read .safetensors, which `python -m export download` fetches or makes; of .bin files that are here "
            "already `python -m export convert`, given the same --checkpoint and --stage, makes them, without running "
            "what they hold."
        )
    raise CheckpointError(f"{folder}: no .safetensors weights ({' or '.join(_SAFE_STEMS)}, whole or in shards).")


def save_weights(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """`save_file`, with the permissions that new files get here; by itself it leaves them to their owner alone.

    Raises OSError, SafetensorError.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


def find_weights(
    folder: Path,
    prefer_fp16: bool,
    stems: Iterable[str],
    suffix: str,
    there: Callable[[Path], bool] = Path.is_file,
) -> tuple[list[Path], Path | None]:
    """Files of weights that are `there`, and the index of those that are shards; no files where there are none.

    An index without any of its shards is passed over: downloads hold every index, and the shards of one variant.
    Raises CheckpointError where shards are missing.
    """
    incomplete = None
    for variant in (".fp16", "") if prefer_fp16 else ("", ".fp16"):
        for stem in stems:
            if there(whole := folder / f"{stem}{variant}{suffix}"):
                return [whole], None
            for name in (f"{stem}{suffix}.index{variant}.json", f"{stem}{variant}{suffix}.index.json"):
                if (index := folder / name).is_file():
                    shards = _shards(index)
                    missing = [shard.name for shard in shards if not there(shard)]
                    if shards and not missing:
                        return shards, index
                    error = CheckpointError(
                        f"{index}: shards {', '.join(missing) or '(none listed)'} are missing. Download them again."
                    )
                    if len(missing) < len(shards):
                        raise error
                    incomplete = incomplete or error
    if incomplete:
        raise incomplete
    return [], None


def _shards(index: Path) -> list[Path]:
    weight_map = read_config(index).get("weight_map", {})
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: its weight_map does not name files. Download it again.")
    return [index.parent / name for name in sorted(set(weight_map.values()))]


def tensor_sizes(files: Iterable[Path]) -> list[int]:
    """Numbers of parameters, tensor by tensor, from the files' headers alone."""
    sizes = []
    for path in files:
        try:
            with safe_open(path, framework="np") as file:
                sizes += [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise unreadable(path, error) from None
    return sizes


def unreadable(path: Path, error: Exception) -> MemoryError | CheckpointError:
    """What it means that a library did not read a file of a checkpoint: memory is short, or it is damaged."""
    if is_short_of_memory(error):
        return MemoryError(f"{path}: {first_line(error)}")
    return CheckpointError(f"{path} cannot be read ({first_line(error)}). Download it again.")


def file_hash(paths: Iterable[Path]) -> str:
    """SHA-256 over the contents of files, in order. Raises CheckpointError where one cannot be read."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise unreadable(path, error) from None
    return digest.hexdigest()


def load_weights(
    module: nn.Module,
    files: Iterable[Path],
    dtype: torch.dtype,
    where: str,
    renames: Mapping[str, str] | None = None,
    ignore: Iterable[str] = (),
) -> None:
    """Fill `module` (built on the meta device) from safetensors, cast to `dtype`, shard by shard.

    `renames` replaces parts of names; names that contain one of `ignore` are skipped. Raises CheckpointError that
    lists every missing, unexpected and misshapen parameter.
    """
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    state: dict[str, Tensor] = {}
    unexpected, misshapen = [], {}
    for path in files:
        try:
            with safe_open(path, framework="pt", **_READ) as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    ours = name
                    for old, new in (renames or {}).items():
                        ours = ours.replace(old, new)
                    if any(part in ours for part in ignore):
                        continue
                    if ours not in wanted:
                        unexpected.append(name)
                        continue
                    value = file.get_tensor(name)
                    if tuple(value.shape) != wanted[ours]:
                        # The oldest autoencoders keep these projections as 1 x 1 convolutions.
                        if tuple(value.shape) == (*wanted[ours], 1, 1):
                            value = value[..., 0, 0]
                        else:
                            misshapen[ours] = f"{name} {list(value.shape)}, wanted {list(wanted[ours])}"
                            continue
                    state[ours] = value.to(dtype)
        except (SafetensorError, OSError) as error:
            raise unreadable(path, error) from None
    missing = [name for name in wanted if name not in state and name not in misshapen]
    problems = [
        f"{len(names)} {kind}: {', '.join(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen.values()))
        if names
    ]
    if problems:
        raise CheckpointError(f"{where}: the weights do not fit the config beside them. " + "; ".join(problems) + ".")
    module.load_state_dict(state, assign=True)
    module.eval().requires_grad_(False)


def load_vae(module: nn.Module, files: Iterable[Path], dtype: torch.dtype, where: str) -> None:
    load_weights(module, files, dtype, where, renames=_OLD_VAE_NAMES)
