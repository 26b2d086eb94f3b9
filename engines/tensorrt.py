"""TensorRT's two flavours: one Python API, told apart by the module that is imported.

`tensorrt-rtx` is for RTX cards and builds for cards that are not there; `tensorrt` builds for the GPU it runs on.
"""

import importlib
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from engines.catalog import CATALOG
from engines.errors import EngineError, SettingsError
from engines.gpu import find_gpus
from engines.manifest import EngineEntry

FLAVOURS = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
DEFAULT_TARGETS = ("sm80", "sm86", "sm89", "sm120")  # what TensorRT-RTX takes itself: Ampere, Ada, Blackwell


def installed_version(flavour: str) -> str | None:
    """The flavour's version, without loading its libraries."""
    try:
        return version(flavour)
    except PackageNotFoundError:
        return None


def load(flavour: str) -> Any:
    """The flavour's module. Raises EngineError when it is not installed or its libraries do not load."""
    try:
        return importlib.import_module(FLAVOURS[flavour])
    except ImportError as error:
        raise EngineError(f"{flavour} is not usable ({error}). Install it: `pip install -e '.[{flavour}]'`.") from None


def check_targets(flavour: str, targets: Sequence[str], precision: str) -> tuple[str, ...]:
    """The targets to build for, the flavour's own where none are given. Raises SettingsError for impossible ones."""
    if flavour == "tensorrt":
        gpus = find_gpus()
        if not gpus:
            raise SettingsError("tensorrt builds on the GPU it builds for, and there is none here. Use tensorrt-rtx.")
        if list(targets) not in ([], [gpus[0].target]):
            raise SettingsError(f"tensorrt builds for the GPU it runs on, {gpus[0].target}; leave --target out.")
        return (gpus[0].target,)
    targets = tuple(dict.fromkeys(targets)) or DEFAULT_TARGETS
    if unknown := [target for target in targets if target not in TARGETS]:
        raise SettingsError(f"unknown target {', '.join(unknown)}; allowed: {', '.join(TARGETS)}.")
    if "sm75" in targets and len(targets) > 1:
        raise SettingsError("TensorRT-RTX builds for Turing (sm75) alone: give --target sm75, and another bundle.")
    if "sm75" in targets and precision == "bf16":
        raise SettingsError("Turing (sm75) does not compute in bf16: use --precision fp16.")
    return targets


def serves(targets: Sequence[str], gpu: str) -> bool:
    """Whether an engine for `targets` runs on a GPU; sm120 stands for all of 12.x."""
    return gpu in targets or ("sm120" in targets and gpu.startswith("sm12"))


def why_unusable(entry: EngineEntry) -> str | None:
    """Why a plan cannot run here, told from the manifest alone and with what mends it; None if it can.

    A plan is read by the version that wrote it, on the cards that it was written for.
    """
    return version_mismatch(entry) or _card_mismatch(entry)


def version_mismatch(entry: EngineEntry) -> str | None:
    have = installed_version(entry.backend)
    install = f"`pip install '{entry.backend}=={entry.backend_version}'`"
    if have is None:
        return f"needs {entry.backend} {entry.backend_version}: {install}"
    if have != entry.backend_version:
        by = f"{entry.backend} {entry.backend_version}"
        return f"built by {by}, {have} is installed: rebuild it ({_rebuild(entry)}) or {install}"
    return None


def _card_mismatch(entry: EngineEntry) -> str | None:
    gpus = find_gpus()
    if not gpus:
        return "needs an NVIDIA GPU, and this machine shows none; build for the CPU with `--engine onnxruntime`"
    if not serves(entry.targets, gpus[0].target):
        rebuild = _rebuild(entry, f" --target {gpus[0].target}" if entry.backend == "tensorrt-rtx" else "")
        return (
            f"built for {', '.join(entry.targets)}, this is {gpus[0].name} ({gpus[0].target}): rebuild it ({rebuild})"
        )
    return None


def _rebuild(entry: EngineEntry, more: str = "") -> str:
    stage = CATALOG[entry.name].stage
    return f"`python -m export build --stage {stage} --engine {entry.backend} --precision {entry.precision}{more}`"


def choose_backend() -> tuple[str, str]:
    """What `--engine auto` takes, and why: TensorRT where a card and a flavour are there, else ONNX Runtime."""
    gpus = find_gpus()
    if not gpus:
        return "onnxruntime", "no NVIDIA GPU here"
    if installed_version("tensorrt-rtx") and serves(TARGETS, gpus[0].target):
        return "tensorrt-rtx", f"{gpus[0].name}, tensorrt-rtx {installed_version('tensorrt-rtx')}"
    if installed_version("tensorrt"):
        return "tensorrt", f"{gpus[0].name}, tensorrt {installed_version('tensorrt')}"
    return "onnxruntime", f"{gpus[0].name}, but neither tensorrt-rtx for it nor tensorrt is installed"


def polygraphy(flavour: str) -> Any:
    """Polygraphy's TensorRT backend on a flavour, which it chooses when it is first imported."""
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(flavour == "tensorrt-rtx"))
    try:
        return importlib.import_module("polygraphy.backend.trt")
    except ImportError as error:
        raise EngineError(f"polygraphy is not usable ({error}): `pip install -e '.[{flavour}]'`.") from None
