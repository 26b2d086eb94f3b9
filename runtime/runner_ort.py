"""Plans on ONNX Runtime: the embedded default, on any CPU and, with onnxruntime-gpu, on NVIDIA cards."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from engines.errors import BundleError, EngineError

try:
    import onnxruntime as ort
except ImportError:
    raise EngineError(
        "ONNX Runtime is not installed. Install one flavour: `pip install -e '.[cpu]'`, or for an NVIDIA card "
        "`pip install -e '.[cuda]'`."
    ) from None

_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")  # best first


class OrtRunner:
    def __init__(self, plan: Path):
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors; warnings repeat for every node moved between providers
        available = ort.get_available_providers()
        try:
            self._session = ort.InferenceSession(
                str(plan), options, providers=[provider for provider in _PROVIDERS if provider in available]
            )
        except Exception as error:  # its exceptions share no base class
            raise BundleError(
                f"{plan}: ONNX Runtime {ort.__version__} cannot load it ({error}). "
                "Build it again with `python -m export build --force`."
            ) from None
        self._outputs = [output.name for output in self._session.get_outputs()]

    def infer(self, feeds: Mapping[str, NDArray[Any]], wanted: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        wanted = list(wanted or self._outputs)
        try:
            return dict(zip(wanted, self._session.run(wanted, dict(feeds)), strict=True))
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed: {error}") from None

    def close(self) -> None:
        del self._session
