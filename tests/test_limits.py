"""What a container or a job scheduler leaves of a machine; the cgroups are files here."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from engines import limits
from engines.memory import GIB

Write = Callable[[dict[str, str]], None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """64 processors and 512 GiB, of which files say what may be used."""
    monkeypatch.setattr(limits, "_GROUPS", tmp_path / "proc")
    monkeypatch.setattr(limits, "_MOUNTED", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=512 * GIB))

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return write


def allowed() -> tuple[int, float]:
    return limits.processors(), limits.available_memory() / GIB


def memory(folder: str, limit: int, used: int, cache: int) -> dict[str, str]:
    stat = f"anon 5\ninactive_file {cache * GIB}\nactive_file 7\n"
    values = {"memory.max": limit * GIB, "memory.current": used * GIB, "memory.stat": stat}
    return {f"cgroup/{folder}{name}": str(value) for name, value in values.items()}


def test_a_machine_without_limits_is_all_there(machine: Write) -> None:
    assert allowed() == (64, 512)  # nor any cgroups: macOS, Windows
    machine({"proc": "0::/user.slice\n", "cgroup/user.slice/cpu.max": "max 100000\n"})
    machine({"cgroup/user.slice/memory.max": "max\n", "cgroup/user.slice/memory.current": "5\n"})
    assert allowed() == (64, 512)


def test_a_container_leaves_what_its_cgroup_does(machine: Write) -> None:
    machine({"proc": "0::/\n", "cgroup/cpu.max": "250000 100000\n", **memory("", limit=32, used=10, cache=4)})
    assert allowed() == (2, 26)  # two and a half processors; pages of files can go
    machine({"cgroup/cpu.max": "50000 100000\n", **memory("", limit=32, used=33, cache=0)})
    assert allowed() == (1, 0)


def test_the_strictest_of_nested_groups_counts(machine: Write) -> None:
    machine({"proc": "0::/job/step\n", "cgroup/job/cpu.max": "400000 100000", "cgroup/job/step/cpu.max": "max 100000"})
    machine(memory("job/", limit=16, used=6, cache=0) | memory("job/step/", limit=64, used=6, cache=0))
    assert allowed() == (4, 10)


def test_version_1_is_read_where_a_container_sees_it(machine: Write) -> None:
    machine({"proc": "9:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/docker/abc\n"})  # the host's path
    machine({"cgroup/cpu/cpu.cfs_quota_us": "800000\n", "cgroup/cpu/cpu.cfs_period_us": "100000\n"})
    assert allowed() == (8, 512)
    stat = f"cache 1\ntotal_inactive_file {GIB}\n"
    machine({"cgroup/memory/memory.limit_in_bytes": f"{8 * GIB}", "cgroup/memory/memory.stat": stat})
    machine({"cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}", "cgroup/cpu/cpu.cfs_quota_us": "-1"})
    assert allowed() == (64, 6)


def test_version_2_beside_version_1_is_read_where_it_is_mounted(machine: Write) -> None:
    machine(
        {"proc": "3:cpu:/\n0::/\n", "cgroup/cpu/cpu.cfs_quota_us": "800000", "cgroup/cpu/cpu.cfs_period_us": "100000"}
    )
    machine(memory("unified/", limit=16, used=6, cache=0))
    assert allowed() == (8, 10)


def test_an_affinity_mask_counts(machine: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 9})
    assert limits.processors() == 3
