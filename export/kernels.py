"""Building the libraries of kernels (kernels/README.md) with CMake."""

import os
import re
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock

from engines.errors import EngineError
from engines.gpu import OLDEST, find_gpus
from engines.limits import processors
from runtime.kernels import (
    BUILD,
    CUDA,
    REFERENCE,
    find_library,
    find_nvcc,
    find_program,
    libraries,
    missing_headers,
    missing_programs,
)

ROOT = Path(__file__).resolve().parent.parent
_NO_CUDA = "-DCMAKE_CUDA_COMPILER=NOTFOUND"
_WSL = "/usr/lib/wsl/lib"  # has the driver's libraries there; linkers do not look into it


def build_library(
    target: str, folder: Path, *options: str, chosen: Callable[[], Iterable[str]] = tuple
) -> tuple[Path, str]:
    """The library `target` in its build folder, and what compiling printed: nothing where nothing had changed.

    Two processes may build at once; `chosen` says more options when no other does. Raises EngineError where a program
    is missing or fails.
    """
    if missing := missing_programs(target):
        raise EngineError(f"{target} cannot be built here. Install {' and '.join(missing)}.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.with_name(f"{folder.name}.lock").touch()
    except OSError as error:
        raise EngineError(f"{target} cannot be built: {folder.parent} cannot be written ({error}).") from None
    cmake, environment = str(find_program("cmake")), dict(os.environ)
    nvcc = find_nvcc() if target == CUDA else None
    if nvcc:
        # For a folder's first configuration: another compiler on the command line would have CMake forget the options.
        environment.setdefault("CUDACXX", nvcc[0])
    parallel = str(min(4, processors()))
    build = [cmake, "--build", str(folder), "--config", "Release", "--target", target, "--parallel", parallel]
    with FileLock(f"{folder}.lock"):
        if nvcc and _has_no_compiler(folder):
            (folder / "CMakeCache.txt").unlink()  # it would never look for one again
        _run(
            [cmake, "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release", *options, *chosen()], environment
        )
        if nvcc and _has_no_compiler(folder):
            log = folder / "CMakeFiles" / "CMakeConfigureLog.yaml"
            raise EngineError(f"{target} cannot be built: CMake could not compile with {nvcc[0]}. {log} says why.")
        printed = _run(build, environment)
    return libraries(folder, target)[0], printed


def _run(command: list[str], environment: dict[str, str]) -> str:
    """What it printed. Raises EngineError where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    printed = done.stdout + done.stderr
    if done.returncode:
        raise EngineError(f"`{' '.join(command)}` failed:\n{printed[-4000:]}")
    return printed


def _configured(folder: Path, variable: str) -> str:
    """What CMake has configured a folder with, and keeps in mind."""
    cache = folder / "CMakeCache.txt"
    text = cache.read_text(errors="replace") if cache.is_file() else ""
    found = re.search(rf"^{variable}:\w+=(.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def _has_no_compiler(folder: Path) -> bool:
    return _configured(folder, "CMAKE_CUDA_COMPILER").endswith("NOTFOUND")


def native(folder: Path | None = None) -> str:
    """CMAKE_CUDA_ARCHITECTURES of the cards that are here, by number: for CMake's own "native" another card that has
    taken this one's place is no reason to compile again. nvcc does not know cards before Turing.

    With a build folder also those that it was built for: cards hidden today, which other bundles run on.
    """
    cards = {gpu.target.removeprefix("sm") for gpu in find_gpus() if gpu.capability >= OLDEST}
    if cards and folder:
        cards |= set(filter(str.isdigit, _configured(folder, "CMAKE_CUDA_ARCHITECTURES").split(";")))
    return ";".join(sorted(cards)) or "native"


def build_for(device: str) -> Path:
    """The library that runs on "cuda" or "cpu": built where `find_library` looks for it, or what SHOW1_KERNELS has.

    Raises EngineError where it cannot be built.
    """
    if os.environ.get("SHOW1_KERNELS"):
        return find_library(CUDA if device == "cuda" else REFERENCE)
    if device == "cuda":
        folder = BUILD / CUDA
        return build_library(CUDA, folder, chosen=lambda: [f"-DCMAKE_CUDA_ARCHITECTURES={native(folder)}"])[0]
    return build_library(REFERENCE, BUILD / REFERENCE, _NO_CUDA)[0]


def prepare_inductor(device: str) -> Path:
    """`build_for`, and what inductor needs besides for "cuda": torch compiles and links against CUDA, and is told, here
    and in the processes begun from here, where it is, for it looks in fewer places. Raises EngineError."""
    if missing := missing_headers(device):
        raise EngineError(f"inductor cannot compile for {device} here. Install {' and '.join(missing)}.")
    if device == "cuda":
        _show_torch_the_toolkit()
    return build_for(device)


def _show_torch_the_toolkit() -> None:
    if nvcc := find_nvcc():
        home = Path(nvcc[0]).resolve().parent.parent
        if (home / "include" / "cuda_runtime.h").is_file():
            os.environ["CUDA_HOME"] = str(home)
    if Path(_WSL).is_dir():
        os.environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, [_WSL, os.environ.get("LIBRARY_PATH")]))
