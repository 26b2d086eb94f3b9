"""Memory of `generate` over time: sampled by a thread while the pipeline makes a video, engines loaded one by one.

Resident set of this process; on a machine with an NVIDIA card also the card's used memory, asked of the driver's
management library. The card's counts every process on it, so what was used before the run is told apart.
"""

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.latency import PROMPT
from bench.plots import Axis, Chart
from bench.report import NOTHING, Table, number
from engines.gpu import find_gpus
from engines.memory import GIB, peak_memory
from engines.store import Bundle
from runtime.config import DIFFUSION_STAGES, Settings
from runtime.engine import EnginePool
from runtime.pipeline import Show1Pipeline, check_run

INTERVAL = 0.02  # s between samples
_PLOTTED = 600  # samples at most: a plot has no more columns
_NVML = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"


@dataclass(frozen=True)
class Sample:
    """`seconds` since the run began, bytes; `device` is None without a card."""

    seconds: float
    resident: int
    device: int | None


class _MemoryInfo(ctypes.Structure):  # nvmlMemory_t
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


def device_memory() -> Callable[[], int] | None:
    """Asks for the first card's used bytes; None where no NVIDIA driver is."""
    try:
        nvml = ctypes.CDLL(_NVML)
    except OSError:
        return None
    card, info = ctypes.c_void_p(), _MemoryInfo()
    gpus = find_gpus()  # in CUDA's order, and less what it hides
    if not gpus or nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByPciBusId_v2(gpus[0].bus_id, ctypes.byref(card)):
        return None
    if nvml.nvmlDeviceGetMemoryInfo(card, ctypes.byref(info)):  # a card on the machine's own memory has none to tell
        return None

    def used() -> int:
        nvml.nvmlDeviceGetMemoryInfo(card, ctypes.byref(info))
        return info.used

    return used


class Sampler:
    """Samples from its start to its end: `with Sampler() as sampler: ...`, then `sampler.samples`."""

    def __init__(self, interval: float = INTERVAL):
        import psutil

        self.samples: list[Sample] = []
        self._interval = interval
        self._process, self._device = psutil.Process(), device_memory()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.start = 0.0

    def take(self) -> None:
        device = self._device() if self._device else None
        self.samples.append(Sample(self.now(), self._process.memory_info().rss, device))

    def now(self) -> float:
        return time.perf_counter() - self.start

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self.take()

    def __enter__(self) -> "Sampler":
        self.start = time.perf_counter()
        self.take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.take()


@dataclass(frozen=True)
class Result:
    """`ends`: when each stage was finished, s; text counts to the stages that it precedes."""

    samples: Sequence[Sample]
    ends: dict[str, float]
    peak: int  # of the process by the system's own count, which may lag by some pages

    def of(self, stage: str) -> list[Sample]:
        stages = list(self.ends)
        index = stages.index(stage)
        start = self.ends[stages[index - 1]] if index else 0.0
        return [s for s in self.samples if start <= s.seconds <= self.ends[stage]] or [self.samples[-1]]

    def table(self) -> Table:
        first = self.samples[0]
        rows = []
        for name, samples in (*((stage, self.of(stage)) for stage in self.ends), ("whole run", list(self.samples))):
            resident = max(s.resident for s in samples)
            device = max((s.device for s in samples if s.device is not None), default=None)
            before = first.device or 0
            rows.append(
                [
                    name,
                    number(samples[-1].seconds - samples[0].seconds),
                    number(resident / GIB),
                    number((resident - first.resident) / GIB),
                    number(samples[-1].resident / GIB),
                    number(device / GIB) if device is not None else NOTHING,
                    number((device - before) / GIB) if device is not None else NOTHING,
                ]
            )
        headers = ["stage", "s", "peak GiB", "above start", "at end", "card's peak GiB", "above start"]
        return Table(f"Memory: resident set, {len(self.samples)} samples", headers, rows)

    def plot(self) -> Chart:
        kept = self.thinned()
        lines = {"resident set": [(s.seconds, s.resident / GIB) for s in kept]}
        if kept[0].device is not None:
            lines["card"] = [(s.seconds, (s.device or 0) / GIB) for s in kept]
        starts = [0.0, *self.ends.values()]
        marks = list(zip(starts, self.ends, strict=False))
        return Chart("Memory over one video", Axis("s"), Axis("GiB"), lines, marks=marks)

    def thinned(self) -> list[Sample]:
        """The largest of every few neighbours, of either memory, so that no peak is lost."""
        few = -(-len(self.samples) // _PLOTTED)
        groups = [self.samples[i : i + few] for i in range(0, len(self.samples), few)]
        largest = []
        for group in groups:
            device = max((s.device for s in group if s.device is not None), default=None)
            largest.append(Sample(group[0].seconds, max(s.resident for s in group), device))
        return largest

    def to_json(self) -> dict[str, Any]:
        """Seconds and MiB: of every few samples the largest."""
        return {
            "stage_ends_s": {stage: round(end, 3) for stage, end in self.ends.items()},
            "peak_resident_bytes": max(self.peak, *(s.resident for s in self.samples)),
            "stage_peak_resident_bytes": {stage: max(s.resident for s in self.of(stage)) for stage in self.ends},
            "stage_peak_device_bytes": {
                stage: max((s.device for s in self.of(stage) if s.device is not None), default=None)
                for stage in self.ends
            },
            "device_bytes_before": self.samples[0].device,
            "samples": [
                [round(s.seconds, 2), round(s.resident / 2**20, 1), s.device and round(s.device / 2**20, 1)]
                for s in self.thinned()
            ],
        }


def run_memory(bundle: Bundle, settings: Settings, seed: int) -> Result:
    """Make one video as `show1-rt generate` does and watch."""
    check_run(bundle, settings)
    before = peak_memory()
    ends: dict[str, float] = {}
    with Show1Pipeline(EnginePool(bundle)) as pipeline, Sampler() as sampler:
        pipeline(PROMPT, seed=seed, settings=settings, on_clip=lambda stage, _: ends.update({stage: sampler.now()}))
    assert tuple(ends) == DIFFUSION_STAGES
    peak = peak_memory()
    return Result(sampler.samples, ends, peak if peak > before else 0)  # else the peak is of what ran here earlier
