"""The NVIDIA GPUs of this machine, asked of the driver itself: no CUDA toolkit and no framework needed."""

import ctypes
import sys
from dataclasses import dataclass
from importlib.util import find_spec

_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
CUDA = (13, 0)  # what the libraries of TensorRT's flavours and of ONNX Runtime are built with, and our kernels
TURING, OLDEST = "sm75", (7, 5)  # the oldest target, and its compute capability
NO_ONNXRUNTIME = (10, 11)  # onnxruntime-gpu (1.31) has kernels for 7.5, 8.x, 9.0 and 12.x, and no PTX
NO_BF16 = f"Turing ({TURING}) does not compute in bf16: use --precision fp16."


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    memory: int  # bytes
    driver: tuple[int, int]  # newest CUDA version that the driver runs
    bus_id: bytes = b""  # its place, as NVML reads it

    @property
    def target(self) -> str:
        """As TensorRT's targets are written: sm89."""
        return "sm{}{}".format(*self.capability)


def find_gpus() -> list[Gpu]:
    """Every GPU that the driver shows (CUDA_VISIBLE_DEVICES applies); none without a driver."""
    try:
        cuda = ctypes.CDLL(_DRIVER)
    except OSError:
        return []
    count, driver = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or cuda.cuDriverGetVersion(ctypes.byref(driver)):
        return []
    gpus = []
    for index in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        memory, name, place = ctypes.c_size_t(), ctypes.create_string_buffer(256), ctypes.create_string_buffer(32)
        failed = (
            cuda.cuDeviceGet(ctypes.byref(device), index)
            or cuda.cuDeviceGetName(name, len(name), device)
            or cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
            or cuda.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
            or cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
        )
        if not failed:
            cuda.cuDeviceGetPCIBusId(place, len(place), device)
            version, capability = divmod(driver.value, 1000), (major.value, minor.value)
            newest = (version[0], version[1] // 10)
            gpus.append(Gpu(name.value.decode(), capability, memory.value, newest, place.value))
    return gpus


def wheel_folders(name: str) -> list[str]:
    """Where NVIDIA's wheels of CUDA 13 have a folder ("lib", "bin"), whether or not they are installed."""
    spec = find_spec("nvidia")
    return [f"{home}/cu{CUDA[0]}/{name}" for home in (spec.submodule_search_locations if spec else None) or ()]


def why_no_onnxruntime(gpu: Gpu) -> str | None:
    """Why onnxruntime-gpu does not run on a card, or None."""
    no_kernels = f"onnxruntime-gpu has no kernels for {gpu.name} ({gpu.target})"
    if gpu.capability[0] in NO_ONNXRUNTIME:
        return f"{no_kernels}: build with --engine inductor"
    if gpu.capability < OLDEST:
        return no_kernels
    return old_driver(gpu, "onnxruntime-gpu")


def old_driver(gpu: Gpu, library: str, built_with: tuple[int, int] = CUDA) -> str | None:
    """Why a library built with a version of CUDA does not run by a card's driver, or None."""
    if gpu.driver >= (built_with[0], 0):  # minor versions run each other's
        return None
    needs, has = ("{}.{}".format(*version) for version in (built_with, gpu.driver))
    return f"the driver is for CUDA {has}, {library} needs {needs}: install a newer NVIDIA driver"
