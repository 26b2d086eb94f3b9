"""`show1-rt`: a prompt in, a video out."""

import argparse
import contextlib
import io
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from engines.errors import OutputError
from engines.tensorrt import installed_version
from runtime.command import add_stage_options, path, run_command, stage_options, unused
from runtime.config import DIFFUSION_STAGES, NEGATIVE_PROMPT, PRESETS, SEED

EXAMPLES = """examples:
  show1-rt generate "a panda taking a selfie"
  show1-rt generate "toad practicing karate" --preset quick --seed 7 --out toad.mp4
  show1-rt generate "a burning lamborghini" --steps base=50,sr1=60 --guidance base=12 --save-stages stages
"""


def _output(text: str) -> str:
    """As `path`, with a / at its end if it has one."""
    return f"{path(text)}{text[-1:] if text[-1:] in (os.sep, os.altsep) else ''}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="show1-rt", description="Text-to-video with the Show-1 cascade.")
    parser.add_argument("--version", action="version", version=_software())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="what this machine can build and run, and what mends the rest")
    doctor.set_defaults(run=_doctor)
    generate = commands.add_parser(
        "generate",
        help="make a video of a prompt",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    generate.set_defaults(run=_generate)
    add = generate.add_argument
    add("prompt", nargs="+", help="what the video should show; in quotes where the shell would read it otherwise")
    add(
        "--bundle", type=path, default=Path("bundle"), help="engines made by `python -m export build` (default: bundle)"
    )
    add(
        "--out",
        type=_output,
        help="x.mp4, x.gif, x.webp or a folder for PNG frames; a file there is replaced (default: a new .mp4 named "
        "after the prompt)",
    )
    add("--seed", type=int, default=SEED, help="default: %(default)s, the authors' script's")
    add(
        "--negative-prompt",
        default=NEGATIVE_PROMPT,
        help="for the last stage; the others have the empty one, as in the reference (default: %(default)r)",
    )
    add(
        "--preset",
        choices=PRESETS,
        default="reference",
        help="reference, as the bundle says: the authors' script (default); quick: half the work; fast: an eighth; "
        "draft: a few steps, to look",
    )
    add_stage_options(add)
    add("--keyframes", type=int, metavar="N", help="N of them give 4(N-1)+1 frames (default: 8, so 29)")
    add("--size", metavar="WxH", help="of the video, multiples of 8 (default: the bundle's, 576x320)")
    add("--save-stages", type=path, metavar="FOLDER", help="keep what every stage made, as .mp4 and as .npy")
    add("--json", action="store_true", help="print settings, times and the file's name as JSON")
    return parser


def _doctor(_: argparse.Namespace) -> None:
    from runtime.doctor import diagnose, report

    report(diagnose())


def _generate(arguments: argparse.Namespace) -> None:
    # Heavy imports wait until arguments have been read: --help and a typing error answer at once.
    from runtime.noise import NoiseStream
    from runtime.ops import clip_to_frames
    from runtime.pipeline import Show1Pipeline, check_prompt, check_run
    from runtime.video import check_output, save_video

    prompt = " ".join(arguments.prompt)
    check_prompt(prompt, arguments.negative_prompt)
    if arguments.save_stages and arguments.out:
        _check_apart(arguments.out, arguments.save_stages)
    pipeline = Show1Pipeline.from_bundle(arguments.bundle)
    settings = pipeline.settings.with_options(
        preset=arguments.preset,
        keyframes=arguments.keyframes,
        size=arguments.size,
        **stage_options(arguments),
    )
    bundle = pipeline.engines.bundle
    made_by = f"{bundle.root.resolve().name} {bundle.id}"  # now: the current folder may go meanwhile
    check_run(bundle, settings)
    NoiseStream(arguments.seed)  # raises for one out of range
    if arguments.save_stages:
        _prepare_stages(arguments.save_stages)
    check_output(arguments.out or _free_name(prompt, arguments.seed))

    seconds: dict[str, float] = {}
    start = last = time.perf_counter()
    unsaved: list[OutputError] = []  # told at the end: a full disk there must not cost the video

    def save_stage(stage: str, clip: Any) -> None:
        nonlocal last
        seconds[stage] = time.perf_counter() - last
        if arguments.save_stages and not unsaved:
            try:
                if stage == "base":
                    _remove_stages(arguments.save_stages)
                about = {"software": _software()}
                save_video(clip_to_frames(clip), arguments.save_stages / f"{stage}.mp4", settings.fps, about)
                _save_array(clip, arguments.save_stages / f"{stage}.npy")
            except OutputError as error:
                unsaved.append(error)
        last = time.perf_counter()

    def say_cut(reader: str, text: str) -> None:
        end = text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"
        with contextlib.suppress(OSError, ValueError):  # nobody reads it: no reason to stop
            print(f"warning: {reader}: 77 tokens are read at most; this end was cut off: {end!r}", file=sys.stderr)

    with pipeline, _Bars() as bars:
        video = pipeline(
            prompt,
            negative_prompt=arguments.negative_prompt,
            seed=arguments.seed,
            settings=settings,
            progress=bars,
            on_cut=say_cut,
            on_clip=save_stage,
        )
    about = {**video.metadata(), "bundle": made_by, "software": _software()}
    out = _save(video.frames, arguments.out, partial(_free_name, prompt, arguments.seed), settings.fps, about)
    if arguments.json:
        times = {"seconds": time.perf_counter() - start, "stage_seconds": seconds}
        print(json.dumps({"out": str(out), "frames": len(video.frames), "cut": video.cut, **about, **times}, indent=1))
    else:
        print(out)
    if unsaved:
        raise OutputError(f"{out} is complete, but not all stages were saved: {unsaved[0]}")


def _software() -> str:
    return f"show1-rt {installed_version('show1-rt') or '(not installed)'}"


def _save(frames: Any, asked: str | None, free_name: Callable[[], str], fps: float, about: Mapping[str, Any]) -> str:
    """Where the video is: where it was asked for or, where that is now impossible, in an error that names the place."""
    from runtime.video import Kept, Taken, save_video

    out = asked or free_name()
    try:
        save_video(frames, out, fps, about, replace=asked is not None)
    except Taken:  # by a run that ended meanwhile
        return _save(frames, asked, free_name, fps, about)
    except Kept:
        raise
    except OutputError as error:
        name = out.rstrip("/\\")
        try:
            place = os.path.join(tempfile.mkdtemp(prefix="show1-rt-"), os.path.basename(name))
            save_video(frames, place + out[len(name) :], fps, about)
        except (OutputError, OSError):
            raise error from None
        raise OutputError(f"{error} The finished video is {place}.") from None
    return out


def _check_apart(out: str, stages: Path) -> None:
    """A video may lie among the stages' files; it cannot be one of them, their folder or one around it."""
    target, folder = Path(out).resolve(), stages.resolve()
    if target in (folder, *folder.parents):
        raise OutputError(f"--out {out} holds --save-stages {stages}. Choose another place for one of them.")
    if target.parent == folder and target.stem.lower() in DIFFUSION_STAGES:  # on some disks case is no difference
        raise OutputError(f"--out {out} is where --save-stages keeps what {target.stem} made. Choose another name.")


def _free_name(prompt: str, seed: int) -> str:
    """Named after the prompt, in any script; numbered where a video has that name already."""
    words = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:60].strip("-")
    name = f"{words.encode()[:200].decode(errors='ignore') or 'video'}-{seed}"  # file systems count bytes
    return str(unused(Path(f"{name}.mp4")))


def _prepare_stages(folder: Path) -> None:
    """Make the folder, or see that the stages that it has are ours to replace."""
    from runtime.video import check_output, read_metadata

    def software(video: Path) -> str:
        with contextlib.suppress(OutputError):  # no video
            return str(read_metadata(video).get("software", ""))
        return ""

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror}). Choose another --save-stages.") from None
    check_output(folder / "base.mp4")
    for stage in DIFFUSION_STAGES:
        video, array = folder / f"{stage}.mp4", folder / f"{stage}.npy"
        ours = video.is_file() and software(video).startswith("show1-rt")
        for file in (video, array):
            if file.exists() and not ours:
                raise OutputError(f"{file}: may be yours, not show1-rt's. Choose another --save-stages, or move it.")


def _remove_stages(folder: Path) -> None:
    """Those of an earlier run, lest an interruption leave some of each. Videos, which say whose they are, last."""
    try:
        for stage, suffix in product(DIFFUSION_STAGES, (".npy", ".mp4")):
            (folder / f"{stage}{suffix}").unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: an earlier run's stages cannot be replaced ({error.strerror}).") from None


def _save_array(clip: Any, path: Path) -> None:
    import numpy as np

    from engines.store import write_atomically

    content = io.BytesIO()
    np.save(content, clip)
    try:
        write_atomically(path, content.getvalue())
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}). Make room, or choose another folder."
        ) from None


class _Bars:
    """One progress bar per stage, with time left; where the output is not a terminal, a line and then one a minute."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage = ""
        self._said = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody can read it: no reason to stop
            self._show(stage, done, total)

    def _show(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            from tqdm import tqdm

            self._close()
            self._stage, self._said, self._bar = stage, time.monotonic(), None
            # The bar is first shown after a step, which is none of its time.
            options = {"total": total, "initial": done, "desc": f"{stage:6}", "unit": "step"}
            self._bar = tqdm(**options, disable=None, dynamic_ncols=True)
            if self._bar.disable:
                print(f"{stage}: {total} steps", file=sys.stderr, flush=True)
        if self._bar is None:  # its output is closed
            return
        if self._bar.disable and time.monotonic() - self._said >= 60:
            self._said = time.monotonic()
            print(f"{stage}: {done} of {total} steps", file=sys.stderr, flush=True)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()  # what comes next, loading for instance, is none of its time either

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(_parser(), argv, "no video was written")


if __name__ == "__main__":
    sys.exit(main())
