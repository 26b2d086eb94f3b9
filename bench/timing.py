"""Timing shared by every benchmark: warm-up, the list of all times, median and the 10th and 90th percentile."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from engines.errors import Show1Error

T = TypeVar("T")


class TimeIsUp(Show1Error):
    """A part met the end of the run's time; what it had saved stays."""


class Clock:
    """The time that a whole run may take."""

    def __init__(self, minutes: float):
        self._end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def check(self) -> None:
        if self.left() <= 0:
            raise TimeIsUp("the time was up: --minutes N gives more, --parts and --stages ask for less.")


@dataclass(frozen=True)
class Timed(Generic[T]):
    """One measured call: when it began and ended (`time.perf_counter`, s) and what it returned."""

    start: float
    end: float
    result: T

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Summary:
    """What a table shows of `n` times, in their unit."""

    n: int
    median: float
    p10: float
    p90: float


def measure(call: Callable[[], T], warmup: int, repeats: int) -> list[Timed[T]]:
    """Call `warmup` times without a look at the clock, then `repeats` times with one."""
    for _ in range(warmup):
        call()
    timed = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        timed.append(Timed(start, time.perf_counter(), result))
    return timed


def measure_gpu(call: Callable[[], Any], warmup: int, repeats: int, graph: bool) -> list[float]:
    """Seconds that the GPU takes for each of `repeats` calls, by CUDA events, the L2 swept before every one.

    With `graph` the call is captured once and replayed. Without, gaps between its launches count, unless the sweep
    (which the CPU does not wait for) hides them.
    """
    import torch

    call()
    if graph:
        captured = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(captured):
            call()
        call = captured.replay
    # Read, not written: dirty lines would be written back in the measured time.
    sweep = torch.ones(4 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.int8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for index in range(warmup + repeats):
        sweep.view(torch.int64).sum()
        start.record()
        call()
        end.record()
        end.synchronize()
        if index >= warmup:
            times.append(start.elapsed_time(end) / 1e3)
    return times


def summarize(times: Sequence[float]) -> Summary | None:
    """None where there is nothing to summarize. Percentiles are interpolated: of few times they are rough."""
    if not times:
        return None
    p10, median, p90 = np.percentile(times, [10, 50, 90]).tolist()
    return Summary(len(times), median, p10, p90)
