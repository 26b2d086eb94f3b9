"""TensorRT's two flavours: one Python API, told apart by the module that is imported.

`tensorrt-rtx` is for RTX cards and builds for cards that are not there; `tensorrt` builds for the GPU it runs on.
"""

import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from engines.errors import EngineError, SettingsError, install
from engines.gpu import NO_BF16, NO_ONNXRUNTIME, OLDEST, TURING, Gpu, find_gpus, old_driver, wheel_folders
from engines.limits import is_arm
from engines.manifest import EngineEntry
from engines.spec import INT8
from engines.store import Bundle

FLAVOURS = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
TARGETS = (TURING, "sm80", "sm86", "sm89", "sm120", "sm121")
DEFAULT_TARGETS = ("sm80", "sm86", "sm89", "sm120")  # what TensorRT-RTX takes itself: Ampere, Ada, Blackwell


def installed_version(package: str) -> str | None:
    """A package's version, a flavour's among them, without loading its libraries."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def load(flavour: str) -> Any:
    """The flavour's module. Raises EngineError when it is not installed or its libraries do not load."""
    try:
        return importlib.import_module(FLAVOURS[flavour])
    except ImportError as error:
        raise EngineError(f"{flavour} is not usable ({error}). {_install(flavour)}") from None


def _install(flavour: str) -> str:
    if flavour == "tensorrt-rtx" and (sys.version_info >= (3, 15) or sys.platform == "darwin"):
        return "Its wheels are for Linux and Windows, Python 3.11 to 3.14: use one of these."
    return f"Install it: {install(flavour)}."


def check_targets(flavour: str, targets: Sequence[str], precision: str) -> tuple[str, ...]:
    """The targets to build for, the flavour's own where none are given. Raises SettingsError for impossible ones."""
    if flavour == "tensorrt":
        gpus = find_gpus()
        if not gpus:
            raise SettingsError("tensorrt builds on the GPU it builds for, and there is none here. Use tensorrt-rtx.")
        if list(targets) not in ([], [gpus[0].target]):
            raise SettingsError(f"tensorrt builds for the GPU it runs on, {gpus[0].target}; leave --target out.")
        targets = (gpus[0].target,)
    else:
        targets = tuple(dict.fromkeys(targets)) or _default_targets()
        if unknown := [target for target in targets if target not in TARGETS]:
            raise SettingsError(f"unknown target {', '.join(unknown)}; allowed: {', '.join(TARGETS)}.")
    if TURING in targets and len(targets) > 1:
        raise SettingsError(
            f"TensorRT-RTX builds for Turing ({TURING}) alone: give --target {TURING}, and another bundle."
        )
    if TURING in targets and precision == "bf16":
        raise SettingsError(NO_BF16)
    return targets


def _default_targets() -> tuple[str, ...]:
    """The flavour's own, but a card that is here must be among them: Turing builds alone."""
    gpus = find_gpus()
    return (TURING,) if gpus and gpus[0].target == TURING else DEFAULT_TARGETS


def serves(targets: Sequence[str], gpu: str) -> bool:
    """Whether an engine for `targets` runs on a GPU; sm120 stands for all of 12.x."""
    return gpu in targets or ("sm120" in targets and gpu.startswith("sm12"))


def why_unusable(bundle: Bundle, entry: EngineEntry) -> str | None:
    """Why a plan cannot run here, told from the manifest alone and with what mends it; None if it can.

    A plan is read by the version that wrote it, on the cards that it was written for.
    """
    return version_mismatch(bundle, entry) or _card_mismatch(bundle, entry)


def version_mismatch(bundle: Bundle, entry: EngineEntry) -> str | None:
    have, by = installed_version(entry.backend), f"{entry.backend} {entry.backend_version}"
    install = f"`pip install {shlex.quote(f'{entry.backend}=={entry.backend_version}')}`"
    if have is None:
        return f"needs {by}: {install}"
    if have != entry.backend_version:
        return f"built by {by}, {have} is installed: {install}, or {bundle.rebuild_command(entry.name)}"
    return None


def _card_mismatch(bundle: Bundle, entry: EngineEntry) -> str | None:
    other = {"engine": "onnxruntime", "target": None, "attention": None}
    gpus = find_gpus()
    if not gpus or gpus[0].capability < OLDEST:
        int8 = any(e.precision == INT8 and e.backend == entry.backend for e in bundle.manifest.engines.values())
        if entry.precision == "bf16" or (entry.precision == "fp16" and is_arm() and not int8):
            other["precision"] = "fp32"
        command = bundle.rebuild_command(entry.name, **other, stage="all", out="NEW")
        shows = f"{gpus[0].name} ({gpus[0].target}), which is older than Turing" if gpus else "none"
        return f"needs an NVIDIA GPU, and this machine shows {shows}. For the CPU: {command}"
    if serves(entry.targets, gpus[0].target):
        return old_driver(gpus[0], entry.backend)
    there = f"built for {', '.join(entry.targets)}, this is {gpus[0].name} ({gpus[0].target})"
    if entry.backend == "tensorrt" or gpus[0].target in TARGETS:
        changes = {"target": gpus[0].target}
        if gpus[0].target == TURING and entry.precision == "bf16":
            changes["precision"] = "fp16"
        return f"{there}: {bundle.rebuild_command(entry.name, **changes)}"
    other["precision"] = "fp32" if entry.precision == "fp32" else "fp16"  # on cards neither bf16 nor int8
    if gpus[0].capability[0] in NO_ONNXRUNTIME:
        other["engine"] = "inductor"
    return f"{there}, which TensorRT-RTX does not serve: {bundle.rebuild_command(entry.name, **other)}"


def why_not_here(flavour: str, gpu: Gpu) -> str | None:
    """Why a flavour cannot run on a card, or None."""
    if installed_version(flavour) is None:
        return f"{flavour} is not installed. {_install(flavour)}"
    if flavour == "tensorrt-rtx" and not serves(TARGETS, gpu.target):
        return f"tensorrt-rtx does not serve {gpu.name} ({gpu.target})"
    return old_driver(gpu, flavour)


def choose_backend() -> tuple[str, str]:
    """What `--engine auto` takes, and why: TensorRT where a card and a flavour are there, else ONNX Runtime."""
    gpus = find_gpus()
    if not gpus:
        return "onnxruntime", "no NVIDIA GPU here"
    reasons = []
    for flavour in FLAVOURS:
        reason = why_not_here(flavour, gpus[0])
        if reason is None:
            return flavour, f"{gpus[0].name}, {flavour} {installed_version(flavour)}"
        reasons.append(reason)
    return "onnxruntime", "; ".join(reasons)


def polygraphy(flavour: str) -> Any:
    """Polygraphy's TensorRT backend on a flavour, which it chooses once, when it is first imported.

    Raises EngineError when it is not installed, or has chosen the other flavour.
    """
    rtx = flavour == "tensorrt-rtx"
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(rtx))
    try:
        logger = importlib.import_module("polygraphy.logger").G_LOGGER
        # By itself it writes to stdout, where `--json` writes its result.
        logger.use_python_logging_system, logger.colors = True, False
        backend = importlib.import_module("polygraphy.backend.trt")
        chosen = importlib.import_module("polygraphy.config").USE_TENSORRT_RTX
    except ImportError as error:
        raise EngineError(f"polygraphy is not usable ({error}): {install(flavour)}.") from None
    if chosen != rtx:
        raise EngineError(f"polygraphy serves one flavour of TensorRT per process: run {flavour} in a new one.")
    return backend


def load_cuda_runtime() -> None:
    """Load the libcudart that Polygraphy copies arrays with; NVIDIA's wheel of CUDA 13 is enough.

    That wheel has it in a folder where Polygraphy (0.53) does not look. Raises EngineError where there is none.
    """
    windows = sys.platform == "win32"
    variable, folder = ("PATH", "bin/x86_64") if windows else ("LD_LIBRARY_PATH", "lib")
    path = os.environ.get(variable)
    os.environ[variable] = os.pathsep.join(filter(None, [path, *wheel_folders(folder)]))
    try:
        importlib.import_module("polygraphy.cuda").wrapper()
    except Exception as error:  # its exceptions share no base class
        raise EngineError(
            f"the CUDA runtime library of CUDA 13 is not found ({error}): `pip install 'nvidia-cuda-runtime>=13,<14'`"
        ) from None
    finally:
        del os.environ[variable]
        if path is not None:
            os.environ[variable] = path
