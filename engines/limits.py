"""What this process may use of its machine: affinity masks and cgroups (containers, Slurm) allow less than there is."""

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/proc/self/cgroup")
_MOUNTED = Path("/sys/fs/cgroup")


def is_arm() -> bool:
    return platform.machine().lower() in ("aarch64", "arm64")


def processors() -> int:
    """Logical processors that this process may keep busy, whole ones; one at least."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups("cpu"):
        with contextlib.suppress(OSError, ValueError):
            if (group / "cpu.max").exists():
                quota, period = (group / "cpu.max").read_text().split()
            else:
                quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0:  # version 2 says "max", a ValueError
                allowed = min(allowed, int(quota) // int(period))
    return max(1, allowed)


def available_memory() -> int:
    """Bytes that can be taken without swapping, as far as the machine has them and the cgroups allow."""
    import psutil  # type: ignore[import-untyped]

    available: int = psutil.virtual_memory().available
    for group in _groups("memory"):
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with contextlib.suppress(OSError, ValueError):  # not there, or "max"
                room = int((group / limit).read_text()) - int((group / used).read_text())
                lines = (group / "memory.stat").read_text().splitlines()
                # Pages of files that go when there is need.
                room += next((int(line.split()[1]) for line in lines if line.startswith(f"{cache} ")), 0)
                available = min(available, max(0, room))
    return available


def _groups(controller: str) -> Iterator[Path]:
    """This process's cgroup of a controller, version 1 or 2, and those around it.

    What a container sees as the root is its own; the path in /proc may then be one that it does not see.
    """
    try:
        lines = _GROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root = _MOUNTED / "unified" if (_MOUNTED / "unified").is_dir() else _MOUNTED
        elif controller in controllers.split(","):
            root = _MOUNTED / controller
        else:
            continue
        own = root / path.lstrip("/")
        yield own
        yield from (group for group in own.parents if group.is_relative_to(root))
