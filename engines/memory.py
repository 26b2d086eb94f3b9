"""The memory of this process, and what libraries say where they get none."""

import contextlib
import ctypes
import re
import sys
from pathlib import Path

GIB = 2**30  # bytes

# ONNX Runtime, torch, the C++ libraries of GNU and Microsoft, Windows by number: its text is in the user's language.
_SHORT = re.compile(
    r"out ?of ?memory|not enough memory|failed to allocate|allocate memory|bad.alloc|alloc(ation)?_failed|"
    r"smaller than requested bytes|CUDA Error: 2\b|(os error|WinError|<)\s?1455",
    re.IGNORECASE,
)


def is_short_of_memory(error: BaseException) -> bool:
    """Whether an error of whatever library says that it got no memory, the machine's or the card's."""
    return isinstance(error, MemoryError) or _SHORT.search(str(error)) is not None


def peak_memory() -> int:
    """The most bytes it has held so far: resident set, with pages of files that it has mapped; on Windows, working set.

    It never falls.
    """
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    with contextlib.suppress(OSError, StopIteration):  # what getrusage counts on Linux begins with the parent's
        lines = Path("/proc/self/status").read_bytes().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(b"VmHWM:")).split()[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def return_memory() -> None:
    """Give pages that nothing uses back to the system, where the C library (glibc) would keep them.

    Blocks freed between others stay with the process: of an engine of 1.7 billion parameters that was loaded and
    dropped 3 to 7 GiB, beside which the next one is loaded.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # musl, which keeps little
            ctypes.CDLL(None).malloc_trim(0)
