"""Building the libraries of kernels (kernels/README.md) with CMake."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from engines.errors import EngineError
from engines.gpu import find_gpus
from runtime.kernels import BUILD, libraries

ROOT = Path(__file__).resolve().parent.parent
CUDA, REFERENCE = "show1_kernels", "show1_kernels_ref"
_COMPILERS = ("c++", "g++", "clang++", "cl")
_NO_CUDA = "-DCMAKE_CUDA_COMPILER=NOTFOUND"


def find_program(name: str) -> str | None:
    """From this Python's environment, where pip may have put it, or from PATH."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def missing_programs(target: str) -> list[str]:
    """What has to be installed before a library can be built."""
    missing = [] if find_program("cmake") else ["CMake (`pip install cmake`)"]
    if not any(map(shutil.which, _COMPILERS)):
        missing.append("a C++ compiler")
    if target == CUDA and shutil.which("nvcc") is None:
        missing.append("nvcc, of the CUDA toolkit 13")
    return missing


def build_library(target: str, folder: Path, *options: str) -> tuple[Path, str]:
    """The library `target` in its build folder, and what compiling printed: nothing where nothing had changed.

    Two processes may build at once. Raises EngineError where a program is missing or fails.
    """
    if missing := missing_programs(target):
        raise EngineError(f"{target} cannot be built here. Install {' and '.join(missing)}.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.with_name(f"{folder.name}.lock").touch()
    except OSError as error:
        raise EngineError(f"{target} cannot be built: {folder.parent} cannot be written ({error}).") from None
    cmake, printed = str(find_program("cmake")), ""
    parallel = str(min(4, os.cpu_count() or 1))
    with FileLock(f"{folder}.lock"):
        for command in (
            [cmake, "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release", *options],
            [cmake, "--build", str(folder), "--config", "Release", "--target", target, "--parallel", parallel],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            printed = done.stdout + done.stderr
            if done.returncode:
                raise EngineError(f"`{' '.join(command)}` failed:\n{printed[-4000:]}")
    return libraries(folder, target)[0], printed


def native() -> str:
    """CMAKE_CUDA_ARCHITECTURES of the cards that are here, by number: for CMake's own "native" another card that has
    taken this one's place is no reason to compile again."""
    return ";".join(sorted({gpu.target.removeprefix("sm") for gpu in find_gpus()})) or "native"


def build_for(device: str) -> Path:
    """The library that runs on "cuda" or "cpu", where `runtime.kernels.find_library` looks for it."""
    if device == "cuda":
        return build_library(CUDA, BUILD / CUDA, f"-DCMAKE_CUDA_ARCHITECTURES={native()}")[0]
    return build_library(REFERENCE, BUILD / REFERENCE, _NO_CUDA)[0]
