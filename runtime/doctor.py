"""`show1-rt doctor`: what this machine can build and run, what is missing or in conflict, and what mends it."""

import importlib
import platform
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec

from engines.errors import Show1Error, install
from engines.gpu import TURING, Gpu, find_gpus, why_no_onnxruntime
from engines.memory import GIB
from engines.tensorrt import (
    FLAVOURS,
    TARGETS,
    installed_version,
    load,
    load_cuda_runtime,
    serves,
    why_not_here,
)
from runtime.engine import why_not_half
from runtime.kernels import CUDA, REFERENCE, missing_headers, missing_programs

_EXPORT = ("torch", "onnx", "onnxscript", "safetensors", "sentencepiece")


@dataclass
class Diagnosis:
    """Lines to print, and what is wrong: each problem with the command that mends it."""

    found: dict[str, str] = field(default_factory=dict)
    builds: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)


def diagnose() -> Diagnosis:
    result = Diagnosis()
    result.found["Python"] = f"{platform.python_version()} on {platform.platform()}"
    gpus = find_gpus()
    for index, gpu in enumerate(gpus):
        driver = "{}.{}".format(*gpu.driver)
        result.found[f"GPU {index}"] = (
            f"{gpu.name}, {gpu.target}, {gpu.memory / GIB:.0f} GiB, driver for CUDA up to {driver}"
        )
    if not gpus:
        result.found["GPU"] = "none that an NVIDIA driver shows"
    exports = _onnxruntime(result, gpus)
    _tensorrt(result, gpus, exports)
    _inductor(result, gpus, exports)
    return result


def _onnxruntime(result: Diagnosis, gpus: list[Gpu]) -> bool:
    """Whether there is what every build needs."""
    cpu, gpu = installed_version("onnxruntime"), installed_version("onnxruntime-gpu")
    if cpu and gpu:
        result.problems.append(
            f"onnxruntime {cpu} and onnxruntime-gpu {gpu} share one folder, and the one installed last wins. "
            "Keep one: `pip uninstall -y onnxruntime onnxruntime-gpu`, then "
            f"{install('cuda' if gpus else 'cpu')}."
        )
    try:
        ort = importlib.import_module("onnxruntime")
    except ImportError as error:
        result.found["ONNX Runtime"] = "none"
        result.hints.append(f"ONNX Runtime is not usable ({error}): {install('cuda' if gpus else 'cpu')}.")
        return False
    providers = [name.removesuffix("ExecutionProvider") for name in ort.get_available_providers()]
    result.found["ONNX Runtime"] = f"{ort.__version__} ({', '.join(providers)})"
    on_gpu = "CUDA" in providers and bool(gpus)
    reason = why_no_onnxruntime(gpus[0]) if on_gpu else None
    if reason:
        result.problems.append(
            f"{reason}. Or run on the CPU: `pip uninstall -y onnxruntime-gpu`, then {install('cpu')}."
        )
    else:
        result.runs.append(f"onnxruntime ({'CUDA' if on_gpu else 'CPU'})")
    if gpus and "CUDA" not in providers:
        result.hints.append(f"{onnxruntime_idle(gpus[0])}.")
    missing = [package for package in _EXPORT if find_spec(package) is None]
    if missing:
        result.hints.append(f"building needs {', '.join(missing)}: {install('export')}.")
    elif not reason:
        precisions = ["fp32", *([] if why_not_half() else ["fp16"]), *([] if on_gpu else ["int8"])]
        result.builds.append(f"onnxruntime ({', '.join(precisions)})")
    return not missing


def onnxruntime_idle(gpu: Gpu) -> str:
    """What mends the wheel for CPUs on a machine with a card, or why nothing does."""
    idle = f"ONNX Runtime here leaves the GPU idle: `pip uninstall -y onnxruntime`, then {install('cuda')}"
    return why_no_onnxruntime(gpu) or idle


def _tensorrt(result: Diagnosis, gpus: list[Gpu], exports: bool) -> None:
    for flavour in FLAVOURS:
        installed = installed_version(flavour)
        result.found[flavour] = installed or "none"
        if not installed:
            continue
        try:
            load(flavour)
        except Show1Error as error:
            result.problems.append(str(error))
            continue
        rtx = flavour == "tensorrt-rtx"
        if exports and (rtx or gpus):
            targets = f" for {', '.join(TARGETS)} ({TURING} alone, and not in bf16)" if rtx else ""
            bf16 = ", bf16" if rtx or gpus[0].target != TURING else ""
            result.builds.append(f"{flavour} (fp16{bf16}, fp32, int8){targets}")
        if find_spec("polygraphy") is None:
            result.problems.append(f"{flavour} runs through polygraphy, which is missing: {install(flavour)}.")
        elif gpus:
            reason = why_not_here(flavour, gpus[0]) or _no_cuda_runtime()
            if reason:
                result.hints.append(f"{reason}.")
            else:
                result.runs.append(flavour)
    if gpus and serves(TARGETS, gpus[0].target) and not installed_version("tensorrt-rtx"):
        result.hints.append(f"for this card there is TensorRT-RTX, but {why_not_here('tensorrt-rtx', gpus[0])}")


def _inductor(result: Diagnosis, gpus: list[Gpu], exports: bool) -> None:
    if find_spec("torch") is None:
        result.found["torch"] = "none"
        return
    try:
        version, target, no_kernels, idle = _torch(gpus)
    except Show1Error as error:
        result.problems.append(str(error))
        return
    on_gpu = target.startswith("sm")
    result.found["torch"] = f"{version}, compiles for {target}"
    if no_kernels:
        result.hints.append(f"inductor's UNets do not run yet: {no_kernels}; building such engines does it too.")
    else:
        result.runs.append(f"inductor ({'CUDA' if on_gpu else 'CPU'})")
    missing = missing_programs(CUDA if on_gpu else REFERENCE) + missing_headers("cuda" if on_gpu else "cpu")
    if exports and missing:
        result.hints.append(f"building inductor's engines needs {' and '.join(missing)}.")
    elif exports:
        result.builds.append(f"inductor (fp32, fp16{'' if target == TURING else ', bf16'}) for {target}")
    if idle:
        result.hints.append(f"{idle}.")


def _torch(gpus: list[Gpu]) -> tuple[str, str, str | None, str | None]:
    """torch's version, what it compiles for here, why there are no kernels for that, and why it leaves a card idle."""
    from runtime.runner_inductor import target, torch_version, why_idle, why_no_kernels

    here = target()
    no_kernels = why_no_kernels("cuda" if here.startswith("sm") else "cpu")
    return torch_version(), here, no_kernels, why_idle(gpus[0]) if gpus else None


def _no_cuda_runtime() -> str | None:
    try:
        load_cuda_runtime()
    except Show1Error as error:
        return str(error)
    return None


def report(result: Diagnosis) -> None:
    """Print it; raises Show1Error when something is wrong or nothing can be run here."""
    for name, what in result.found.items():
        print(f"{name + ':':14} {what}")
    print(f"{'can run:':14} {'; '.join(result.runs) or 'nothing'}")
    print(f"{'can build:':14} {'; '.join(result.builds) or 'nothing'}")
    for hint in result.hints:
        print(f"hint: {hint}")
    for problem in result.problems:
        print(f"problem: {problem}", file=sys.stderr)
    if result.problems:
        raise Show1Error("this machine needs mending, see above.")
    if not result.runs:
        raise Show1Error("no engine can run here, see the hints above.")
