"""The memory of this process."""

import sys


def peak_memory() -> int:
    """The most bytes it has held so far: resident set, with pages of files that it has mapped; on Windows, working set.

    It never falls.
    """
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB
