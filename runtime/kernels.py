"""The kernels' C functions (kernels/include/show1) for Python: structures and signatures, pointers in, errors out.

The same calls serve the GPU library (device pointers) and the references (host pointers); nothing is copied.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import EngineError
from engines.gpu import CUDA as CUDA_VERSION
from engines.gpu import wheel_folders
from runtime.schedulers import Schedule

DTYPES = {"float16": 0, "bfloat16": 1, "float32": 2}
VARIANCES = {"learned_range": 1, "learned": 2}  # every other is fixed: 0
LIMITS = {"clip": 1, "dynamic": 2}  # 0: x0 is left as it is
ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2}
NORM_PARTS = 64  # SHOW1_NORM_PARTS
INVALID = 1
ABI = 2  # SHOW1_ABI

CUDA, REFERENCE = "show1_kernels", "show1_kernels_ref"  # the libraries
BUILD = Path(__file__).resolve().parent.parent / "build" / "kernels"
_BUILD_IT = (
    "Build it in the repository's root: `cmake -S . -B build/kernels && cmake --build build/kernels --config Release`, "
    "or let SHOW1_KERNELS name the folder of one (kernels/README.md)."
)
_TOOLKIT = "/usr/local/cuda"  # where NVIDIA's packages install it
_COMPILERS = ("c++", "g++", "clang++", "cl")
_SUFFIXES = (".so", ".dll", ".dylib")

_WEIGHTS = ("pred_weight", "divisor", "sample_weight", "x0_weight", "previous_x0_weight")
_COEFFICIENTS = (*_WEIGHTS, "min_log_var", "max_log_var")
# show1_step: a row per step of the denoising loop.
STEP = np.dtype([(name, np.float32) for name in ("timestep", "guidance_scale", *_COEFFICIENTS)])
# show1_step_counter
COUNTER = np.dtype([("step", np.int32), ("steps", np.int32), ("finished_blocks", np.uint32)])


class Heads(Structure):
    """show1_heads: a half-precision tensor [batch, frame, pixel, head, channel]; strides count elements."""

    _fields_ = (("data", c_void_p), ("batch", c_int64), ("frame", c_int64), ("pixel", c_int64), ("head", c_int64))


class Planes(Structure):
    """show1_planes: where the planes of adjacent pixels of a clip begin; strides count elements."""

    _fields_ = (("data", c_void_p), ("batch", c_int64), ("channel", c_int64), ("frame", c_int64))


class GroupNormArgs(Structure):
    """show1_group_norm_args."""

    _fields_ = (
        *((name, c_int) for name in ("dtype", "batch", "rows", "channels", "groups", "repeat", "activation")),
        ("eps", c_float),
        *((name, c_void_p) for name in ("x", "out", "weight", "bias", "add", "scale", "shift")),
        ("add_row", c_int64),
        ("modulation_row", c_int64),
        ("partials", c_void_p),
    )


class DenoiseArgs(Structure):
    """show1_denoise_args."""

    _fields_ = (
        *((name, c_int) for name in ("dtype", "batch", "channels", "frames", "pixels", "guided", "variance", "limit")),
        ("limit_ratio", c_float),
        ("limit_max", c_float),
        *((name, c_void_p) for name in ("table", "counter", "sample", "x0")),
        *((name, Planes) for name in ("noise_pred", "variance_frac", "noise", "network_input")),
        ("timesteps", c_void_p),
    )


def step_table(schedule: Schedule, guidance: NDArray[np.float32] | float) -> NDArray[Any]:
    """The schedule as the denoising kernel reads it, STEP [N]; `guidance` is every step's scale, or [N]."""
    table = np.zeros(len(schedule), STEP)
    table["timestep"], table["guidance_scale"] = schedule.timesteps, guidance
    for name in _COEFFICIENTS:
        table[name] = getattr(schedule, name)
    return table


def step_modes(schedule: Schedule) -> dict[str, int | float]:
    """How the kernel treats variance and x0, as fields of DenoiseArgs; those left out are 0."""
    config = schedule.config
    modes: dict[str, int | float] = {}
    if config.learned_variance:
        modes["variance"] = VARIANCES[str(config.variance_type)]
    if config.thresholding:
        ratio, most = config.dynamic_thresholding_ratio, config.sample_max_value
        modes |= {"limit": LIMITS["dynamic"], "limit_ratio": ratio, "limit_max": most}
    elif config.clip_sample:
        modes |= {"limit": LIMITS["clip"], "limit_max": config.clip_sample_range}
    return modes


def find_library(name: str) -> Path:
    """The newest build of the library CUDA or REFERENCE below build/kernels, or SHOW1_KERNELS."""
    folder = Path(os.environ.get("SHOW1_KERNELS") or BUILD)
    if found := libraries(folder, name):
        return max(found, key=lambda path: path.stat().st_mtime)
    raise EngineError(f"{folder} holds no {name}. {_BUILD_IT}")


def libraries(folder: Path, name: str) -> list[Path]:
    return [path for path in folder.rglob(f"*{name}.*") if path.suffix in _SUFFIXES]


def find_program(name: str) -> str | None:
    """From this Python's environment, where pip may have put it, or from PATH."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


@cache
def find_nvcc() -> tuple[str, int] | None:
    """nvcc and its major version: the newest of those on PATH, in CUDA_HOME, in CUDA_PATH, where NVIDIA's packages
    install it and where pip does; of several of one version the first."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), _TOOLKIT]
    folders = [os.environ.get("PATH", ""), *(f"{root}/bin" for root in roots if root), *wheel_folders("bin")]
    found = []
    for nvcc in dict.fromkeys(filter(None, (shutil.which("nvcc", path=folder) for folder in folders))):
        try:
            printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True, errors="replace").stdout
        except OSError:  # another machine's
            continue
        if release := re.search(r"release (\d+)\.", printed):
            found.append((Path(nvcc).as_posix(), int(release[1])))
    return max(found, key=lambda program: program[1], default=None)


def missing_programs(library: str) -> list[str]:
    """What has to be installed before a library can be built."""
    missing = [] if find_program("cmake") else ["CMake (`pip install cmake`)"]
    if not (BUILD.parents[1] / "CMakeLists.txt").is_file():  # a wheel has none
        missing.append("the sources of the kernels (clone the repository and `pip install -e` it there)")
    if not any(map(shutil.which, (*os.environ.get("CXX", "").split()[:1], *_COMPILERS))):
        missing.append("a C++ compiler")
    if library == CUDA and ((nvcc := find_nvcc()) is None or nvcc[1] < CUDA_VERSION[0]):
        pip = "`pip install 'nvidia-cuda-nvcc<14' 'nvidia-cuda-cccl<14'`"
        here = f"; {nvcc[0]} is of {nvcc[1]}" if nvcc else ""
        missing.append(f"nvcc {CUDA_VERSION[0]} (of the CUDA toolkit, or {pip}{here})")
    return missing


def missing_headers(device: str) -> list[str]:
    """Python's headers, where inductor's compiler for "cuda", triton, does not find them."""
    there = device != "cuda" or Path(sysconfig.get_path("include"), "Python.h").is_file()
    return [] if there else ["Python's headers (of Debian's and Ubuntu's Python: `apt install python3-dev`)"]


class Kernels:
    """One library of kernels: libshow1_kernels, or with suffix "_ref" the references in libshow1_kernels_ref.

    Raises EngineError for one that does not load or is of another version.
    """

    def __init__(self, library: Path, suffix: str = ""):
        try:
            loaded = ctypes.CDLL(str(library))
        except OSError as error:
            raise EngineError(f"{library} cannot be loaded ({error}). {_BUILD_IT}") from None
        if not hasattr(loaded, "show1_abi") or loaded.show1_abi() != ABI:
            raise EngineError(f"{library} was built from another version's headers. {_BUILD_IT}")
        signatures = {
            "temporal_attention": [c_int, *[POINTER(Heads)] * 4, *[c_int] * 5, c_float, c_void_p],
            "group_norm": [POINTER(GroupNormArgs), c_void_p],
            "denoise_step": [POINTER(DenoiseArgs), c_void_p],
        }
        self._functions = {}
        for name, argtypes in signatures.items():
            function = getattr(loaded, f"show1_{name}{suffix}")
            function.argtypes, function.restype = argtypes, c_int
            self._functions[name] = function

    def temporal_attention(
        self,
        dtype: str,
        q: Heads,
        k: Heads,
        v: Heads,
        out: Heads,
        *,
        batch: int,
        frames: int,
        pixels: int,
        heads: int,
        head_dim: int,
        scale: float | None = None,
        stream: int | None = None,
    ) -> None:
        """out = softmax(q k^T * scale) v over the frames of every pixel and head; scale is head_dim^-0.5 if None."""
        tensors = [byref(tensor) for tensor in (q, k, v, out)]
        scale = head_dim**-0.5 if scale is None and head_dim > 0 else scale
        self._call(
            "temporal_attention", DTYPES[dtype], *tensors, batch, frames, pixels, heads, head_dim, scale or 0.0, stream
        )

    def group_norm(self, args: GroupNormArgs, stream: int | None = None) -> None:
        self._call("group_norm", byref(args), stream)

    def denoise_step(self, args: DenoiseArgs, stream: int | None = None) -> None:
        self._call("denoise_step", byref(args), stream)

    def _call(self, name: str, *arguments: Any) -> None:
        status = self._functions[name](*arguments)
        if status == INVALID:
            raise EngineError(f"{name}: an argument is outside what kernels/include/show1/{name}.h allows.")
        if status != 0:
            raise EngineError(f"{name}: CUDA could not start the kernel (cudaError_t {status}).")
