"""What the project's command lines share: how a command is run and ends, and options that several have."""

import argparse
import contextlib
import errno
import faulthandler
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count
from pathlib import Path

from engines.errors import Show1Error, install
from runtime.config import DIFFUSION_STAGES, STAGE_OPTIONS

DEMO = "demo"


def path(text: str) -> Path:
    """An option's file or folder; shells leave the ~ of `--option=~/x` as it is, and unset variables are empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give the name of a file or folder")
    return Path(os.path.expanduser(text) if re.match(r"~([/\\]|$)", text) else text)  # ~draft is a name


def checkpoint_path(text: str) -> Path | str:
    """As `path`, but for the word `demo`: the checkpoint that the repository keeps. ./demo is a folder."""
    return text if text == DEMO else path(text)


def add_stage_options(add: Callable[..., object]) -> None:
    """`STAGE_OPTIONS`, by a parser's `add_argument`."""
    steps = f"instead of the preset's, of {', '.join(DIFFUSION_STAGES)}, e.g. base=75,sr1=125"
    add("--steps", metavar="STAGE=N,...", help=steps)
    add("--guidance", metavar="STAGE=X,...", help="e.g. base=9,sr2=15; 1 is none")
    guided = "part of the steps that is guided, e.g. base=0.5 (the first half), sr1=0.1-0.6"
    add("--guided", metavar="STAGE=PART,...", help=guided)
    spacing = "of the steps: linspace, leading, trailing or logsnr, e.g. sr1=logsnr"
    add("--spacing", metavar="STAGE=S,...", help=spacing)
    cache = "run the whole network every N steps, between them its finest level, e.g. sr1=2"
    add("--cache", metavar="STAGE=N,...", help=cache)


def stage_options(arguments: argparse.Namespace) -> dict[str, str | None]:
    """What was said by `add_stage_options`, for `Settings.with_options`."""
    return {option: getattr(arguments, option) for option in STAGE_OPTIONS}


def unused(file: Path) -> Path:
    """The file, its name numbered where there is one of that name already."""
    numbered = (file.with_stem(f"{file.stem}-{number}") for number in count(2))
    return next(free for free in chain([file], numbered) if not os.path.exists(free))


@contextlib.contextmanager
def _orderly_termination() -> Iterator[None]:
    """SIGTERM ends what runs like Ctrl-C, so that no temporary file stays; exit status 143."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _drop_output() -> None:
    """Else Python complains when it flushes what is left of it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _failed(message: str, status: int = 1) -> int:
    print(message, file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
    return status


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None, interrupted: str, extras: str = "") -> int:
    """Run the command that `argv` names (its parser's default `run`) and return the exit status: errors in one line.

    `extras` are those of this project that bring what the commands import.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, or of a program without a console
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    arguments = parser.parse_args(argv)
    try:
        os.getcwd()
    except FileNotFoundError:
        return _failed("error: the folder that this was started in has been removed. Change into one that is there.")
    if sys.__stderr__ and not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)  # engines and kernels are machine code: a crash there says where it was
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that cannot be printed is no reason to fail
    try:
        with _orderly_termination():
            arguments.run(arguments)
            sys.stdout.flush()
    except BrokenPipeError:  # who reads the output has gone: `| head`
        _drop_output()
        return 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1
    except OSError as error:
        if error.errno == errno.EACCES and error.filename is not None:
            return _failed(f"error: {error.filename}: {error.strerror}. Mend that, or give another file or folder.")
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        _drop_output()  # which it may have been
        return _failed(f"error: a file, or what was to be printed, cannot be written ({error.strerror}).")
    except Show1Error as error:
        return _failed(f"error: {error}")
    except ModuleNotFoundError as error:
        return _failed(f"error: {error}. Install what this command needs: {install(extras)}.")
    except MemoryError as error:
        return _failed(f"error: too little memory ({error}). Close what else uses it, or ask for less.")
    except KeyboardInterrupt:
        return _failed(f"interrupted: {interrupted}", 130)
    return 0
