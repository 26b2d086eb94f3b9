"""Unpacking the archives that the repository keeps: the demo checkpoint, and the tests' reference data."""

import hashlib
import io
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from engines.errors import CheckpointError
from engines.store import move

STAMP = ".unpacked"
DEMO_ARCHIVE = Path(__file__).parent / "demo_checkpoint.tar.xz"  # made by `train-demo`


def demo_checkpoint() -> Path:
    """The folder of the demo checkpoint, unpacked where it is not yet. Raises CheckpointError."""
    return unpack(DEMO_ARCHIVE, Path("build") / "demo-checkpoint")


def unpack(archive: Path, target: Path) -> Path:
    """Make `target` hold the content of `archive` (.tar.xz) and return it.

    Nothing is done when the target's stamp names this very archive. The content appears with one rename, so it is
    never seen half-written; a second process waits for the first and then reuses its work. Raises CheckpointError.
    """
    target = Path(target).absolute()
    try:
        return _unpack(archive, target)
    except OSError as error:
        raise CheckpointError(
            f"{target}: {archive.name} cannot be unpacked there ({error}). Run this in a folder that can be written to."
        ) from None


def _unpack(archive: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{target.name}.lock"):
        packed = archive.read_bytes()
        digest = hashlib.sha256(packed).hexdigest()
        stamp = target / STAMP
        held = stamp.read_text(encoding="utf-8").strip() if stamp.is_file() else None
        if held == digest:
            return target
        if not held and target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise CheckpointError(
                f"{target} exists and was not unpacked from {archive.name}. Move it away, or name another folder."
            )

        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
            content = Path(temporary) / "content"
            content.mkdir()
            _extract(packed, archive, content)
            (content / STAMP).write_text(f"{digest}\n", encoding="utf-8")
            if target.exists():
                move(target, Path(temporary) / "replaced")
            move(content, target)
    return target


def _extract(packed: bytes, archive: Path, folder: Path) -> None:
    try:
        import lzma
    except ImportError:  # a Python that was compiled without it
        raise CheckpointError(
            f"{archive} cannot be unpacked: this Python has no lzma. Install liblzma-dev (macOS: xz) and build Python "
            "again, or use another."
        ) from None
    try:
        # Decompressed to the end before anything is written: a missing tail shows here, checksums included.
        plain = lzma.decompress(packed, format=lzma.FORMAT_XZ)
        with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as tar:
            for member in tar.getmembers():
                _check_member(member, archive)
            # Python 3.11.0 to 3.11.3 know no filters; _check_member makes plain extraction safe there.
            options: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            tar.extractall(folder, **options)
    except (lzma.LZMAError, EOFError, tarfile.TarError) as error:
        raise CheckpointError(f"{archive} is damaged or incomplete ({error}). Check the file out again.") from error


def _check_member(member: tarfile.TarInfo, archive: Path) -> None:
    path = PurePosixPath(member.name)
    inside = not path.is_absolute() and ".." not in path.parts and not set(member.name) & {"\\", ":"}
    if not inside or not (member.isfile() or member.isdir()):
        raise CheckpointError(
            f"{archive} holds {member.name!r}: only plain files and folders below the target may be there."
        )
