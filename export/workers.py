"""Engines built side by side, each in a process, as memory and processors allow; and a bar that shows how far."""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import accumulate
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from engines.errors import BundleError
from engines.limits import available_memory, processors
from engines.manifest import EngineEntry
from engines.memory import GIB
from engines.store import BundleWriter
from export.job import Job, build_engine

_BAR = "{percentage:3.0f}%|{bar:30}| {elapsed}, {remaining} left | {desc}"

_messages: Any = None  # a worker's queue to the process that shows progress


def _start_worker(messages: Any, threads: int) -> None:
    global _messages
    _messages = messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it ends its workers
    torch.set_num_threads(threads)
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        # Else every engine has as many processes for generated code as there are processors. Twice its share, for most
        # of a build is torch's own Python, in one process.
        torch._inductor.config.compile_threads = 2 * threads
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Also where that was killed and could end nobody: jobs would go on for minutes, on the card too."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _report(name: str, message: str) -> None:
    if _messages is not None:
        _messages.put((name, message))


def _run_job(job: Job, folder: Path) -> tuple[EngineEntry, float]:
    start = time.perf_counter()
    try:
        folder.mkdir()
        entry = build_engine(job, folder, partial(_report, job.name))
    except OSError as error:
        raise BundleError(
            f"{job.name}: cannot be written ({error.strerror or error}). Nothing of it was kept; finished engines "
            "were. Make room or choose another --out, then run this again."
        ) from None
    return entry, time.perf_counter() - start


def build_all(bundle: BundleWriter, pending: list[Job], most: int | None) -> None:
    """Build engines side by side: at most `most`, and never more than processors and memory allow.

    The longest go first. Large engines have a process each, which takes its memory along when it ends.
    """
    if not pending:
        return
    waiting = sorted(pending, key=lambda job: -job.seconds)
    available = available_memory()
    most = min(most or processors(), len(pending))
    for job in waiting:
        if job.memory > available:
            print(
                f"warning: {job.name} needs about {job.memory / GIB:.0f} GiB of memory, {available / GIB:.0f} GiB "
                "are available: close other programs if it fails",
                file=sys.stderr,
            )
    large = max(job.weight_bytes for job in pending) > GIB
    context = get_context("spawn")
    messages = context.Queue()
    fitting_at_once = sum(total <= available for total in accumulate(sorted(job.memory for job in waiting)))
    threads = max(1, processors() // min(most, max(1, fitting_at_once)))
    running: dict[Future[tuple[EngineEntry, float]], Job] = {}
    with (
        bundle.scratch() as scratch,
        ProcessPoolExecutor(
            most,
            mp_context=context,
            initializer=_start_worker,
            initargs=(messages, threads),
            max_tasks_per_child=1 if large else None,
        ) as pool,
        _Progress(waiting, messages) as progress,
    ):
        try:
            while waiting or running:
                while fitting := _next(waiting, running.values(), most, available):
                    waiting.remove(fitting)
                    progress.start(fitting)
                    running[pool.submit(_run_job, fitting, scratch / fitting.name)] = fitting
                # Not for longer: on Windows Ctrl-C waits for it.
                for future in sorted(wait(running, timeout=1, return_when=FIRST_COMPLETED).done, key=_failed):
                    running.pop(future)
                    entry, seconds = future.result()
                    bundle.install(scratch / entry.name, entry)
                    progress.finish(entry, seconds)
        except BrokenProcessPool:
            raise BundleError(
                "a build process was killed, most likely for want of memory. Finished engines are kept; run this again "
                "when more memory is free, with --jobs 1 to build one engine at a time."
            ) from None
        except BaseException:
            workers = list((pool._processes or {}).values())  # before `shutdown`, which forgets them
            pool.shutdown(wait=False, cancel_futures=True)
            for process in workers:
                process.terminate()
            for process in workers:  # gone before what they write to is, and the bundle's lock
                process.join()
            raise


def _failed(future: Future[Any]) -> bool:
    return future.exception() is not None


def _next(waiting: list[Job], running: Iterable[Job], most: int, available: float) -> Job | None:
    """The first job that fits beside those running; the first of all when none are."""
    running = list(running)
    if not running:
        return waiting[0] if waiting else None
    if len(running) >= most:
        return None
    left = available - sum(job.memory for job in running)
    return next((job for job in waiting if job.memory <= left), None)


class _Progress:
    """One bar in seconds of work. What workers report names the phase; within a job the bar goes by the clock.

    TensorRT's builder does count steps, but spends nine tenths of its time in one of them.
    """

    def __init__(self, jobs: Iterable[Job], messages: Any):
        self._messages = messages
        self._seconds = {job.name: job.seconds for job in jobs}
        self._started: dict[str, float] = {}
        self._done = 0.0
        self._state: dict[str, str] = {}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._bar = tqdm(total=math.ceil(sum(self._seconds.values())), desc="building", bar_format=_BAR, disable=None)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self, job: Job) -> None:
        with self._lock:
            self._started[job.name] = time.perf_counter()

    def finish(self, entry: EngineEntry, seconds: float) -> None:
        with self._lock:
            del self._started[entry.name]
            self._state.pop(entry.name, None)
            self._done += self._seconds[entry.name]
        rows = [row for graph in entry.graphs.values() for row in graph.parity]
        worst = max(rows, key=lambda row: row["max_error"] / row["tolerance"])
        differs = f"differs from torch by {worst['max_error']:.1e} of {worst['tolerance']:.1e} allowed"
        self._bar.write(f"{entry.name}: built in {seconds:.0f} s, {differs}", file=sys.stderr)
        self._show()

    def _show(self) -> None:
        now = time.perf_counter()
        with self._lock:
            running = sum(min(now - at, 0.95 * self._seconds[name]) for name, at in self._started.items())
            state = ", ".join(f"{name} {what}" for name, what in self._state.items())
        self._bar.set_description_str(state or "building", refresh=False)
        if not self._bar.disable:
            self._bar.n = max(self._bar.n, self._done + running)
            self._bar.refresh()

    def _run(self) -> None:
        while not self._stop.wait(1):
            while not self._messages.empty():
                name, message = self._messages.get()
                with self._lock:
                    if name in self._started:
                        self._state[name] = message
            self._show()

    def __enter__(self) -> "_Progress":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._bar.close()
