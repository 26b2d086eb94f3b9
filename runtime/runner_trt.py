"""Plans on TensorRT, either flavour, through Polygraphy's runner: arrays go to the card and back in every call.

Not run yet, for want of a card that TensorRT-RTX serves.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import BundleError, EngineError
from engines.tensorrt import polygraphy


class TrtRunner:
    def __init__(self, plan: Path, flavour: str):
        backend = polygraphy(flavour)
        # Memory for the shapes of the call, not for the largest of the profile.
        self._runner = backend.TrtRunner(backend.EngineFromPath(str(plan)), allocation_strategy="runtime")
        try:
            self._runner.activate()
        except Exception as error:  # its exceptions share no base class
            raise BundleError(
                f"{plan}: {flavour} cannot load it ({error}). `show1-rt doctor` says what this machine can run."
            ) from None

    def infer(self, feeds: Mapping[str, NDArray[Any]], wanted: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        try:
            outputs = self._runner.infer(dict(feeds))
        except Exception as error:
            raise EngineError(f"TensorRT failed: {error}") from None
        # Copied: its buffers serve the next call.
        return {name: np.array(array) for name, array in outputs.items() if wanted is None or name in wanted}

    def close(self) -> None:
        self._runner.deactivate()
