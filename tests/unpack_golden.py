"""Unpack the golden fixtures, once: `python tests/unpack_golden.py TARGET [--only models]`."""

from __future__ import annotations

import argparse
import hashlib
import io
import lzma
import os
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

ARCHIVE = Path(__file__).resolve().parent / "golden" / "golden.tar.xz"
STAMP = ".golden-stamp"


class GoldenError(RuntimeError):
    """The fixtures cannot be unpacked; the message says what to do."""


def unpack(target: Path, only: str | None = None, archive: Path = ARCHIVE) -> Path:
    """Make `target` hold the content of `archive` (or its top-level entry `only`) and return it.

    Nothing is done when the target's stamp names this very archive. The content appears with one rename, so it is
    never seen half-written; a second process waits for the first and then reuses its work.
    """
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{target.name}.lock"):
        packed = archive.read_bytes()
        digest = hashlib.sha256(packed).hexdigest()
        stamp = target / STAMP
        held = stamp.read_text(encoding="utf-8").split() if stamp.is_file() else []
        if held in ([digest, "all"], [digest, only or "all"]):
            return target
        if not held and target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise GoldenError(f"{target} exists and was not unpacked from {archive.name}. Name a new or empty folder.")

        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
            content = Path(temporary) / "content"
            content.mkdir()
            _extract(packed, archive, content, only)
            (content / STAMP).write_text(f"{digest} {only or 'all'}\n", encoding="utf-8")
            if target.exists():
                os.rename(target, Path(temporary) / "replaced")
            os.rename(content, target)
    return target


def _extract(packed: bytes, archive: Path, folder: Path, only: str | None) -> None:
    try:
        # Decompressed to the end before anything is written: a missing tail shows here, checksums included.
        plain = lzma.decompress(packed, format=lzma.FORMAT_XZ)
        with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as tar:
            members = tar.getmembers()
            top_level = {PurePosixPath(member.name).parts[0] for member in members}
            if only is not None and only not in top_level:
                raise GoldenError(f"{archive.name} has no {only!r}; it has {', '.join(sorted(top_level))}.")
            wanted = [m for m in members if only is None or PurePosixPath(m.name).parts[0] == only]
            for member in wanted:
                _check_member(member, archive)
            # Python 3.11.0 to 3.11.3 know no filters; _check_member makes plain extraction safe there.
            options: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            tar.extractall(folder, members=wanted, **options)
    except (lzma.LZMAError, EOFError, tarfile.TarError) as error:
        raise GoldenError(f"{archive} is damaged or incomplete ({error}). Check the file out again.") from error


def _check_member(member: tarfile.TarInfo, archive: Path) -> None:
    path = PurePosixPath(member.name)
    inside = not path.is_absolute() and ".." not in path.parts and not set(member.name) & {"\\", ":"}
    if not inside or not (member.isfile() or member.isdir()):
        raise GoldenError(
            f"{archive} holds {member.name!r}: only plain files and folders below the target may be there."
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Unpack the golden fixtures of the tests.")
    parser.add_argument("target", type=Path, help="folder to unpack into; new, empty or unpacked before")
    parser.add_argument("--only", metavar="NAME", help="just this top-level entry, e.g. models (the tiny checkpoint)")
    arguments = parser.parse_args(argv)
    try:
        print(unpack(arguments.target, arguments.only))
    except GoldenError as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
