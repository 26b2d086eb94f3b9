"""`export download`: the published checkpoints from Hugging Face, only what the cascade reads, as safetensors.

Weights that are published as pickles alone, as Show-1's are, are fetched and converted.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from engines.catalog import CATALOG, TOKENIZERS, networks_of
from engines.errors import CheckpointError
from export.checkpoint import SAFETENSORS, is_safetensors
from export.convert import PICKLE, convert, is_pickle, is_there, target_of

# folder -> repository. Weights: CC BY-NC 4.0 (Show-1), DeepFloyd IF licence (IF-II, to be accepted on its page).
REPOSITORIES = {
    "show-1-base": "showlab/show-1-base",
    "show-1-interpolation": "showlab/show-1-interpolation",
    "IF-II-L-v1.0": "DeepFloyd/IF-II-L-v1.0",
    "show-1-sr1": "showlab/show-1-sr1",
    "show-1-sr2": "showlab/show-1-sr2",
}
_SMALL = (".json", ".txt", ".model")


def needed_files(files: Iterable[str], subfolders: set[str], prefer_fp16: bool) -> list[str]:
    """Of a repository's files those below `subfolders` that a build reads: configs, tokenizers, one set of weights.

    Weights are pickles only where there are no safetensors.
    """
    chosen = []
    for subfolder in sorted(subfolders):
        here = [file for file in files if PurePosixPath(file).parts[0] == subfolder]
        weights = [file for file in here if is_safetensors(file)] or [file for file in here if is_pickle(file)]
        half = [file for file in weights if ".fp16" in PurePosixPath(file).name]
        full = [file for file in weights if file not in half]
        chosen += [file for file in here if file.endswith(_SMALL)]
        chosen += (half or full) if prefer_fp16 else (full or half)
    return chosen


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """What the hub raises, as CheckpointError that says what to do."""
    try:
        yield
    except GatedRepoError:
        raise CheckpointError(
            f"{repository} is gated: log in with `hf auth login` and accept the licence on the model's page at "
            "Hugging Face, then run this again."
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"{repository} was not found, or you are not allowed to see it.") from None
    except Exception as error:  # the hub's and its transport's share no base class
        hint = "Check the connection and the disk"
        if isinstance(error, HfHubHTTPError) and error.response.status_code == HTTPStatus.FORBIDDEN:
            hint = "A fine-grained token must be allowed to read public gated repositories, if yours is one"
        raise CheckpointError(
            f"{repository} cannot be fetched ({error}). {hint}; a second run goes on where this one stopped."
        ) from None


def _check_weights(repository: str, files: Iterable[str], subfolders: set[str]) -> None:
    have = {PurePosixPath(file).parts[0] for file in files if is_safetensors(file) or is_pickle(file)}
    if missing := sorted(subfolders - have):
        raise CheckpointError(
            f"{repository} has no weights in {', '.join(missing)}, neither {SAFETENSORS} nor {PICKLE}; nothing else is "
            "read."
        )


def download(out: Path, stages: Iterable[str] = ("all",), precision: str = "fp16") -> None:
    """Fetch the checkpoints of `stages` into folders below `out`; what is there already is not fetched again.

    Pickles are converted, and then deleted.

    Raises CheckpointError that says what to do when a repository is gated, unknown or out of reach, or a file of it
    cannot be converted.
    """
    fp16 = precision == "fp16"
    subfolders: dict[str, set[str]] = {}
    for network in networks_of(stages):
        folder = network.folders[1]
        subfolders.setdefault(folder, {"scheduler", "image_noising_scheduler"}).add(network.subfolder)
        if network.name in TOKENIZERS:
            subfolders[folder].add("tokenizer")
    repositories = {folder: REPOSITORIES[folder] for folder in subfolders}
    for repository in repositories.values():  # one that is refused is told before tens of GB are fetched
        with _explained(repository):
            HfApi().auth_check(repository)
    for folder, repository in repositories.items():
        with _explained(repository):
            listed = HfApi().list_repo_files(repository)
        files = needed_files(listed, subfolders[folder], fp16)
        _check_weights(repository, files, subfolders[folder] & {network.subfolder for network in CATALOG.values()})
        home, pickles = out / folder, [file for file in files if is_pickle(file)]
        converted = {file for file in pickles if target_of(home / file, fp16).is_file()}
        wanted = [file for file in files if file not in converted]
        with _explained(repository):
            snapshot_download(repository, allow_patterns=wanted, local_dir=home)
        if missing := [file for file in wanted if not (home / file).is_file()]:  # the hub warns alone where it has some
            raise CheckpointError(f"{repository}: {', '.join(missing)} did not arrive. Run this again.")
        fetched = {PurePosixPath(file).parent for file in pickles if file not in converted}
        for subfolder in dict.fromkeys(PurePosixPath(file).parent for file in pickles):
            # Or an interrupted run has not come to the index. Else pickles that are here are the user's.
            if subfolder in fetched or not is_there(home / subfolder, fp16):
                print(f"{folder}/{subfolder}: published as pickles, which become safetensors", file=sys.stderr)
                convert(home / subfolder, fp16, remove=True)
