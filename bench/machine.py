"""The conditions of a measurement: machine, software, bundle, commit. No host names and no paths: it is published."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.gpu import find_gpus
from engines.limits import processors
from engines.memory import GIB
from engines.tensorrt import installed_version
from runtime.engine import INDUCTOR

if TYPE_CHECKING:
    from engines.store import Bundle

try:
    import psutil
except ImportError:
    psutil = None  # the kernels' benchmark does without

ROOT = Path(__file__).resolve().parent.parent
_ORT = "onnxruntime"
_BACKENDS = (_ORT, "onnxruntime-gpu", "torch", "tensorrt-rtx", "tensorrt")  # packages that run engines


def describe_moment() -> dict[str, Any]:
    """What changes while a benchmark runs."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load_average_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def describe_host() -> dict[str, Any]:
    """Hardware and software that every benchmark has, as JSON's types."""
    size: dict[str, Any] = {}
    if psutil is not None:
        size["cores"] = {"physical": psutil.cpu_count(logical=False), "logical": psutil.cpu_count()}
        size["memory_gib"] = round(psutil.virtual_memory().total / GIB, 1)
    return {
        **describe_moment(),
        "cpu": _cpu_model(),
        "usable_cores": processors(),
        **size,
        "gpu": _gpu() if find_gpus() else None,  # which a variable may hide
        "os": _os_name(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "backends": {name: found for name in _BACKENDS if (found := installed_version(name))},
        "commit": git_commit(ROOT),
    }


def describe_machine(bundle: "Bundle") -> dict[str, Any]:
    """The host, and what the bundle's engines depend on there. Raises EngineError where that is not installed."""
    machine = describe_host()
    backends = {entry.backend for entry in bundle.manifest.engines.values()}
    threads = {}
    if _ORT in backends:
        from runtime.runner_ort import ort, session_options  # says what to install where ONNX Runtime is missing

        threads[_ORT] = session_options().intra_op_num_threads or "its default, one per physical core"
        machine["providers_available"] = list(ort.get_available_providers())
    if INDUCTOR in backends:
        from runtime.runner_inductor import torch

        threads[INDUCTOR] = torch.get_num_threads()
    return {**machine, "threads": threads or None}


def describe_torch() -> dict[str, Any]:
    """What the baselines run on."""
    import torch

    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        **{name: installed_version(name) for name in ("diffusers", "transformers", "triton", "xformers")},
    }


def describe_bundle(bundle: "Bundle") -> dict[str, Any]:
    """What the engines are: how they were made and how large the networks are."""
    manifest = bundle.manifest
    engines = manifest.engines.values()
    return {
        "id": bundle.id,
        "backend": sorted({engine.backend for engine in engines}),
        "precision": sorted({engine.precision for engine in engines}),
        "tuned_for": "{}x{}".format(*manifest.size),
        "million_parameters": {
            engine.name: round(engine.cost["parameters"] / 1e6, 1) for engine in engines if "parameters" in engine.cost
        },
        "versions": manifest.versions,
    }


def device(bundle: "Bundle", machine: Mapping[str, Any]) -> str:
    """What the engines run on, in a file's name: where they were compiled for one, or ONNX Runtime has a GPU. Then what
    runs them, unless that is ONNX Runtime alone."""
    entries = bundle.manifest.engines.values()
    on_gpu = any(entry.needs_gpu for entry in entries)
    on_gpu |= bool(machine.get("gpu")) and "CUDAExecutionProvider" in machine.get("providers_available", ())
    others = sorted({entry.backend for entry in entries} - {_ORT})
    return "-".join(["gpu" if on_gpu else "cpu", *others])


def git_commit(root: Path) -> str | None:
    """The checkout's commit, "+ changes" where files differ from it; None where `root` is not a checkout."""
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:
        return None
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    # A result that was written just now is no change.
    changes = _git(root, "status", "--porcelain", "--", ".", ":!bench/results")
    return f"{commit} + changes" if commit and changes else commit


def _git(root: Path, *arguments: str) -> str | None:
    # --no-optional-locks: `status` would rewrite the index otherwise, perhaps under another git's hands.
    return _output("git", "--no-optional-locks", "-C", str(root), *arguments)


def _output(*command: str) -> str | None:
    """What a program prints; None where it is not installed or fails."""
    program = shutil.which(command[0])
    if program is None:
        return None
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, encoding="utf-8", errors="replace")
    return done.stdout.strip() if done.returncode == 0 else None


def _gpu() -> str | None:
    query = "--query-gpu=name,driver_version,memory.total,power.limit"
    cards = _output("nvidia-smi", query, "--format=csv,noheader")
    return (
        "; ".join(f"{name} ({rest})" for name, _, rest in (c.partition(", ") for c in cards.splitlines()))
        if cards
        else None
    )


def _os_name() -> str:
    name = f"{platform.system()} {platform.release().partition('-')[0]}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {name}"
    except (OSError, KeyError):  # not Linux, or one that does not say
        return name


def _cpu_model() -> str:
    if sys.platform == "win32":
        import winreg

        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"HARDWARE\DESCRIPTION\System\CentralProcessor\0") as key:
            return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip()
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    # ARM's is known by numbers, for which lscpu has names.
    for line in (_output("lscpu") or "").splitlines():
        if line.startswith("Model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
