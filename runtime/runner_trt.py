"""Plans on TensorRT, either flavour, through Polygraphy's runner: arrays go to the card and back in every call.

Not run yet, for want of a card that TensorRT-RTX serves.
"""

import contextlib
import logging
import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from engines.errors import EngineError
from engines.tensorrt import load_cuda_runtime, polygraphy
from runtime.runner import first_line, load_error


class TrtRunner:
    def __init__(self, plan: Path, flavour: str):
        backend = polygraphy(flavour)
        load_cuda_runtime()
        # Polygraphy's loader of files reads RTX plans into memory, of T5 9.5 GB; mapped they take none of their own.
        engine = backend.EngineFromBytes(lambda: _mapped(plan))
        # Memory for the shapes of the call, not for the largest of the profile.
        self._runner = backend.TrtRunner(engine, allocation_strategy="runtime")
        try:
            with _in_its_words():
                self._runner.activate()
        except Exception as error:  # its exceptions share no base class
            raise load_error(plan, flavour, error) from None

    def infer(self, feeds: Mapping[str, NDArray[Any]], wanted: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        try:
            with _in_its_words():
                outputs = self._runner.infer(dict(feeds), copy_outputs_to_host=False)
                # Copied here, and only what is wanted: its buffers serve the next call.
                return {name: outputs[name].numpy() for name in wanted or outputs}
        except Exception as error:
            raise EngineError(f"TensorRT failed: {first_line(error)}") from None

    def close(self) -> None:
        outputs = self._runner.output_allocator.buffers
        self._runner.deactivate()
        for buffer in outputs.values():
            buffer.free()  # `deactivate` leaves these on the card


class _Errors(logging.Handler):
    """What TensorRT logs, instead of on the terminal."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(" ".join(record.getMessage().split()))


@contextlib.contextmanager
def _in_its_words() -> Iterator[None]:
    """TensorRT gives nothing where it fails, a lack of memory for instance, and logs why; Polygraphy says to look."""
    log, errors = logging.getLogger("Polygraphy"), _Errors()
    log.addHandler(errors)
    try:
        yield
    except Exception as error:
        raise EngineError("; ".join(errors.lines) or first_line(error)) from None
    finally:
        log.removeHandler(errors)


def _mapped(plan: Path) -> mmap.mmap:
    with open(plan, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
