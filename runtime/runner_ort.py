"""Plans on ONNX Runtime: the embedded default, on any CPU and, with onnxruntime-gpu, on NVIDIA cards."""

import contextlib
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from engines.errors import EngineError, install
from engines.gpu import find_gpus, why_no_onnxruntime
from engines.limits import available_memory, processors
from engines.spec import INT8
from runtime.runner import first_line, load_error

try:
    import onnxruntime as ort
except ImportError as error:
    raise EngineError(
        f"ONNX Runtime is not usable ({error}). Install one flavour: {install('cpu')}, or for an NVIDIA card "
        f"{install('cuda')}; on Windows Microsoft's Visual C++ runtime, too (vc_redist.x64.exe)."
    ) from None

ort.disable_telemetry_events()  # on Windows, where the variable that `engines` sets says nothing
_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
_HALF = ("fp16", "bf16")
# A sample's frames x pixels from which on it gains nothing to compute others along with it, whose activations take
# room: processors have enough to do.
_POSITIONS = 2**16
# Loading and running a network in float32, in sizes of its weights in half precision: copies in two layouts for a
# while (3.4 at most, measured at published sizes), then one copy and activations.
_WIDENED = 4.5


@cache
def tries_cuda() -> bool:
    """Whether CUDA's provider is to be tried. What the wheel lists it was compiled with; only a session tells the rest.

    Where there is no GPU it is not: every session would say at length what it did not find.
    """
    if _CUDA not in ort.get_available_providers():
        return False
    if not find_gpus():
        if os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):  # who wants none knows
            logging.getLogger(__name__).warning("No NVIDIA GPU is seen here: ONNX Runtime runs on the CPU.")
        return False
    with contextlib.redirect_stdout(sys.stderr):  # where it says what it does not find
        ort.preload_dlls()  # CUDA's libraries from the packages that the extra `cuda` brings
    return True


def check_card() -> None:
    """Raises EngineError where ONNX Runtime is the one for GPUs, and does not run on this machine's."""
    if tries_cuda() and (reason := why_no_onnxruntime(find_gpus()[0])):
        raise _idle(reason)


def _providers(precision: str) -> list[str | tuple[str, dict[str, Any]]]:
    """Best first."""
    if not tries_cuda():
        return [_CPU]
    settings = {
        # float32 means float32. For half precision this switch would forbid the matrix units as well.
        "use_tf32": int(precision in _HALF),
        "arena_extend_strategy": "kSameAsRequested",  # else memory grows by powers of two
    }
    return [(_CUDA, settings), _CPU]


def session_options() -> Any:
    """What every session has: no warnings, and no more threads than this process may use."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors; warnings repeat for every node moved between providers
    if (allowed := processors()) < (os.cpu_count() or 1):
        # By itself it has a thread for every core of the machine, bound to it, whatever limits there are.
        options.intra_op_num_threads = allowed
    return options


class OrtRunner:
    """`once` is for what runs once in a video, and need not be quick at any price in memory.

    On a CPU a session makes itself a copy of all weights, in float32 and as its kernels like them: of T5-XXL 19 GB, by
    reckoning. Where that is not worth it or not to be had, weights stay in the plan's mapped file, and are widened
    operator by operator, which makes a step of the published UNets a tenth to a third slower (measured).
    """

    def __init__(self, plan: Path, precision: str = "fp32", once: bool = False):
        options = session_options()
        # From the second call on a pattern takes one block for all activations, beside what the first call took.
        options.enable_mem_pattern = False
        providers = _providers(precision)
        on_cpu, half = providers == [_CPU], precision in _HALF
        if precision == INT8:  # by itself it rounds what products with int8 weights read to 8 bits, too
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self.positions_at_once = _POSITIONS if on_cpu else math.inf
        if on_cpu and (once or (half and _WIDENED * _weight_bytes(plan) > available_memory())):
            options.add_session_config_entry("session.disable_prepacking", "1")
            if precision != "fp32":
                # A level that makes no copy; an order in which weights are widened when they are needed.
                levels = ort.GraphOptimizationLevel
                options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED if half else levels.ORT_ENABLE_BASIC
                options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
                options.enable_cpu_mem_arena = not once  # it would keep room for the largest
        check_card()
        try:
            # Without its fallback, by which it would go on on the CPU after a failure, and say so on stdout.
            self._session = ort.InferenceSession(str(plan), options, providers=providers, enable_fallback=0)
        except Exception as error:  # its exceptions share no base class
            raise load_error(plan, f"ONNX Runtime {ort.__version__}", error) from None
        if len(providers) > 1 and _CUDA not in self._session.get_providers():
            # It would go on on the CPU, hours instead of minutes.
            raise _idle(
                f"it did not find the CUDA libraries that it needs for this GPU, which {install('cuda')} brings"
            )
        self._outputs = [output.name for output in self._session.get_outputs()]

    def infer(self, feeds: Mapping[str, NDArray[Any]], wanted: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        wanted = list(wanted or self._outputs)
        try:
            return dict(zip(wanted, self._session.run(wanted, dict(feeds)), strict=True))
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed: {first_line(error)}") from None

    def close(self) -> None:
        del self._session


def _idle(why: str) -> EngineError:
    return EngineError(
        f"ONNX Runtime {ort.__version__} does not run on the GPU: {why}. To run on the CPU: `pip uninstall -y "
        f"onnxruntime-gpu`, then {install('cpu')}."
    )


def _weight_bytes(plan: Path) -> int:
    weights = plan.with_suffix(".weights")
    return weights.stat().st_size if weights.exists() else 0  # small ones are in the plan
