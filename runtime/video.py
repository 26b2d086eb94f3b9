"""Frames to files that people can watch: .mp4, .gif, .webp or a folder of PNGs, each with its settings inside.

A result appears under its name only when complete: it is written beside it under a temporary name, then renamed.
"""

import errno
import json
import os
import re
import secrets
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace
from PIL import Image, PngImagePlugin

from engines.errors import OutputError
from engines.store import move
from runtime.ops import Frames

StrPath = str | os.PathLike[str]

_ALLOWED = ".mp4, .gif, .webp, or a folder of PNG frames (a name without suffix, or one that ends in /)"
_LEAST_FREE = 2**20  # bytes: a short small video takes some hundred thousand
_BT709 = 1  # matrix, primaries and transfer have the same number in H.264
_SOFTWARE = "show1-rt"  # marks the PNG frames that `save_video` may replace
_VIEWERS = (".DS_Store", "Thumbs.db", "desktop.ini")  # what file managers leave in folders that they have shown
_FRAME_NAME = re.compile(r"\d{4,}\.png")
# What Pillow raises for files of others.
_UNREADABLE = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)
_EXIF_DESCRIPTION = 0x010E
_WINDOWS_REFUSES = re.compile(r'[<>:"|?*\x00-\x1f]|[ .]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)


class Kept(OutputError):
    """A finished video could not take its place; the message says where it is."""


class Taken(OutputError):
    """There is a file of that name already."""


def check_output(path: StrPath, for_later: bool = True) -> None:
    """Raise OutputError if `save_video` could not write there; to be called before the long computation.

    `for_later`: nor where hardly any room is left.
    """
    target, suffix = _parse(path)
    if suffix and suffix not in _WRITERS:
        raise OutputError(f"{target}: cannot write {suffix} files. Allowed are {_ALLOWED}.")
    if suffix == ".mp4" and "libx264" not in av.codecs_available:
        raise OutputError(f"{target}: this build of PyAV has no libx264. Install `av` with pip, or choose .webp.")
    if os.name == "nt" and _WINDOWS_REFUSES.search(target.name):
        raise OutputError(f"{target}: Windows does not allow this name. Choose another.")
    probe = _temporary(target)
    with _explain_os_errors(target):
        if not target.parent.is_dir():
            raise OutputError(f"{target}: there is no folder {target.parent}. Create it, or choose another.")
        if not suffix:
            _check_replaceable(target)
        elif target.is_dir():
            raise OutputError(f"{target}: is a folder. Choose another name, or end it in / for PNG frames.")
        elif target.exists() and not target.is_file():
            raise OutputError(f"{target}: is no regular file. Choose another name.")
        usage = shutil.disk_usage(target.parent)
        if for_later and usage.total and usage.free < _LEAST_FREE:  # some file systems say 0 of 0
            raise OSError(errno.ENOSPC, "no space left")
        try:
            probe.touch(exist_ok=False)
            if target.is_file():
                target.open("r+b").close()  # fails if the file is protected or, on Windows, in use
        finally:
            _remove(probe)


def save_video(
    frames: Frames,
    path: StrPath,
    fps: float = 8,
    metadata: Mapping[str, Any] | None = None,
    replace: bool = True,
) -> None:
    """Write frames (uint8 RGB, [F, H, W, 3]) in the format that the suffix of `path` names.

    `metadata` is kept inside, as JSON; `read_metadata` gives it back. Without `replace` an existing file stays, and
    Taken is raised. On any failure what was there before stays and nothing is left behind, but a finished video that
    could not take its place: it is kept under another name.
    Only PNG keeps every pixel; GIF keeps 256 colours per frame, and H.264 shares colour between two rows and columns:
    in an .mp4 an odd height or width gains a copy of its last row or column.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise OutputError(f"{path}: got {frames.dtype} frames of shape {frames.shape}, need uint8 [F, H, W, 3].")
    if not 0.01 <= fps <= 1000:
        raise OutputError(f"{path}: got {fps} frames per second, need 0.01 to 1000.")
    check_output(path, for_later=False)
    target, suffix = _parse(path)
    write = _WRITERS[suffix] if suffix else _write_pngs
    temporary = _temporary(target)
    with _explain_os_errors(target):
        try:
            write(frames, temporary, Fraction(float(fps)).limit_denominator(1001), dict(metadata or {}))
            if replace:
                _move_or_keep(temporary, target)
            else:
                _move_to_new(temporary, target)
        finally:
            _remove(temporary)


def read_metadata(path: StrPath) -> dict[str, Any]:
    """The metadata that `save_video` was given for this file or folder; empty if another program made it."""
    target = Path(path)
    try:
        if target.suffix.lower() == ".mp4" and not target.is_dir():
            with av.open(os.path.abspath(target)) as container:  # FFmpeg takes a:b for a URL
                text = container.metadata.get("comment")
        else:
            with Image.open(target / "0000.png" if target.is_dir() else target) as image:
                info = image.info
                text = info.get("Description") or info.get("comment") or image.getexif().get(_EXIF_DESCRIPTION)
    except (*_UNREADABLE, av.FFmpegError) as error:
        raise OutputError(f"{target}: cannot read it as a video ({error}).") from error
    try:
        metadata = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _write_mp4(frames: Frames, path: Path, fps: Fraction, metadata: dict[str, Any]) -> None:
    _, height, width, _ = frames.shape
    even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    # faststart: the index goes to the front, so that a browser can play while it loads.
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata["comment"] = _pack(metadata)
        if "prompt" in metadata:
            container.metadata["title"] = _utf8(str(metadata["prompt"]))
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18"})
        stream.height, stream.width = even.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # Untagged, a player would guess the matrix from the size.
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        for frame in even:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
        container.mux(stream.encode())


def _write_gif(frames: Frames, path: Path, fps: Fraction, metadata: dict[str, Any]) -> None:
    first, *rest = map(Image.fromarray, frames)
    durations = _durations(len(frames), fps, tick=10)
    comment = _pack(metadata, ascii_only=True).encode()
    first.save(path, "GIF", save_all=True, append_images=rest, duration=durations, loop=0, comment=comment)


def _write_webp(frames: Frames, path: Path, fps: Fraction, metadata: dict[str, Any]) -> None:
    first, *rest = map(Image.fromarray, frames)
    durations = _durations(len(frames), fps, tick=1)
    exif = Image.Exif()
    exif[_EXIF_DESCRIPTION] = _pack(metadata, ascii_only=True)
    first.save(path, "WEBP", save_all=True, append_images=rest, duration=durations, loop=0, quality=90, exif=exif)


def _write_pngs(frames: Frames, path: Path, fps: Fraction, metadata: dict[str, Any]) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("Software", _SOFTWARE)
    chunks.add_itxt("Description", _pack(metadata))
    path.mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"{index:04}.png", pnginfo=chunks)


_WRITERS = {".mp4": _write_mp4, ".gif": _write_gif, ".webp": _write_webp}


def _durations(count: int, fps: Fraction, tick: int) -> list[int]:
    """Milliseconds that each frame is shown, in whole ticks, without drifting from `fps`."""
    ends = [round(index * 1000 / (fps * tick)) * tick for index in range(count + 1)]
    return [end - start for start, end in pairwise(ends)]


def _pack(metadata: dict[str, Any], ascii_only: bool = False) -> str:
    """JSON: survives any character and line end in fields that are made for one line of text."""
    return _utf8(json.dumps(metadata, ensure_ascii=ascii_only))


def _utf8(text: str) -> str:
    """The text with bytes of a command line that were no UTF-8 written as escapes, which JSON reads back."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _parse(path: StrPath) -> tuple[Path, str]:
    """The absolute path, and the suffix that names the format, "" for a folder of PNGs.

    Files are written where links to them lead.
    """
    text = os.fspath(path)
    try:
        target = Path(os.path.abspath(text))
    except OSError as error:
        raise OutputError(f"{text}: the current folder has gone ({error.strerror}). Give a whole path.") from None
    if not target.suffix or text[-1:] in (os.sep, os.altsep):
        return target, ""
    return Path(os.path.realpath(target)), target.suffix.lower()


def _is_current(folder: Path) -> bool:
    try:
        return folder == Path.cwd()
    except OSError:  # it has gone
        return False


def _check_replaceable(folder: Path) -> None:
    """Raise unless there is nothing of that name, or a folder with nothing but frames made here and what shows them."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutputError(f"{folder}: is a file. For a video choose {_ALLOWED}.")
    if folder.is_symlink() or os.path.ismount(folder) or _is_current(folder):  # frames replace it as a whole
        raise OutputError(
            f"{folder}: is a link, a mount point or the current folder, which cannot be replaced. "
            f"Name a new folder below it, e.g. {folder / 'frames'}."
        )
    foreign = [entry.name for entry in folder.iterdir() if entry.name not in _VIEWERS and not _is_own_frame(entry)]
    if foreign:
        raise OutputError(
            f"{folder}: holds files that {_SOFTWARE} did not write, such as {min(foreign)}. "
            "Choose a new or an empty folder."
        )


def _is_own_frame(path: Path) -> bool:
    if not _FRAME_NAME.fullmatch(path.name):
        return False
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == _SOFTWARE
    except _UNREADABLE:
        return False


def _temporary(target: Path) -> Path:
    return target.parent / f".{target.name}.{secrets.token_hex(4)}.part"


def _move_or_keep(temporary: Path, target: Path) -> None:
    """`_move`; where something holds the older one, a player for instance, the finished video gets another name."""
    try:
        _move(temporary, target)
    except OSError as error:
        kept = target.with_name(f"{target.stem}-{secrets.token_hex(2)}{target.suffix}")
        move(temporary, kept)
        raise Kept(f"{target} cannot be replaced ({error.strerror or error}). The finished video is {kept}.") from error


def _move_to_new(temporary: Path, target: Path) -> None:
    """Put a finished file in its place, if nothing has that name."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise Taken(f"{target}: exists.") from None
    except OSError:  # a file system without links
        if target.exists():
            raise Taken(f"{target}: exists.") from None
        move(temporary, target)


def _move(temporary: Path, target: Path) -> None:
    """Put the finished file or folder in its place, over an older one."""
    if not temporary.is_dir() or not target.exists():
        move(temporary, target)
        return
    _check_replaceable(target)
    older = _temporary(target)
    try:
        move(target, older)  # only files can be renamed over one another everywhere
        move(temporary, target)
    except BaseException:
        if target.exists():  # the first move has failed, or Ctrl-C came when both were done
            _remove(older)
        else:
            move(older, target)
        raise
    _remove(older)


def _remove(path: Path) -> None:
    """Delete a file or folder, if it is there; a failure here must not hide the one that led here."""
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def _explain_os_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, av.FFmpegError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            free = shutil.disk_usage(target.parent).free
            reason = f"disk full: more is needed than the {free} bytes free at {target.parent}. Make room there"
        else:
            reason = f"cannot write ({getattr(error, 'strerror', None) or error}). Choose another place"
        raise OutputError(f"{target}: {reason}.") from error
