"""Checkpoints and bundles that a benchmark takes where it is given none, made in build/.

The exporter runs in a process of its own: what measures shall not hold its libraries and memory, on a card neither.
"""

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

from bench.machine import ROOT
from bench.timing import Clock
from engines.errors import EngineError
from engines.gpu import find_gpus
from runtime.command import DEMO


def random_folder(size: str) -> Path:
    return ROOT / "build" / f"random-{size}"


def random_checkpoint(size: str, clock: Clock | None = None) -> Path:
    """Random weights of networks of this size, made where they are not there yet or of an older version's networks."""
    run_export("random-checkpoint", "--size", size, "--out", random_folder(size), "--renew", clock=clock)
    return random_folder(size)


def random_bundle(size: str) -> Path:
    """A bundle of random networks of this size by what runs best here, built or brought up to date."""
    bundle = ROOT / "build" / f"bench-{size}"
    precision = "fp16" if size == "published" or find_gpus() else "fp32"
    checkpoint = random_checkpoint(size)
    run_export("build", "--checkpoint", checkpoint, "--engine", "auto", "--precision", precision, "--out", bundle)
    return bundle


def bundle_of(checkpoint: Path | str) -> Path:
    """A bundle of this checkpoint, built or brought up to date."""
    bundle = ROOT / "build" / f"quality-{Path(checkpoint).name}"
    given = DEMO if checkpoint == DEMO else Path(checkpoint).absolute()
    run_export("build", "--checkpoint", given, "--out", bundle)
    return bundle


def run_export(*words: str | Path, clock: Clock | None = None, **environment: str) -> None:
    """`python -m export WORDS`. Raises EngineError where it fails, TimeIsUp where the clock's time is up before.

    With a clock, whose report tells why a part was not done, what it says is passed on and the error has its own words;
    else it has the terminal, where it draws bars.
    """
    if clock:
        clock.check()
    said = [f"`python -m export {words[0]}` failed; see above."]
    process = subprocess.Popen(
        [sys.executable, "-m", "export", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE if clock else None,
        text=True,
        errors="replace",
    )

    def pass_on() -> None:
        for line in process.stderr or ():
            said.append(line)
            print(line, end="", file=sys.stderr, flush=True)

    reader = threading.Thread(target=pass_on, daemon=True)  # what it began may hold the pipe after its end
    reader.start()
    try:
        process.wait(max(0.0, clock.left()) if clock else None)
    except BaseException:
        process.terminate()  # it ends what it began
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        if clock:
            clock.check()
        raise
    reader.join(5)
    if process.returncode:
        errors = [line for line in said if line.startswith("error: ")]
        raise EngineError((errors or [line for line in said if line.strip()])[-1].removeprefix("error: ").strip())
