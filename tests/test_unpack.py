"""Archives unpack once, whole or not at all, and never over somebody else's files."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import pytest

from engines.errors import CheckpointError
from export.unpack import unpack

ARCHIVE = Path(__file__).parent / "golden" / "golden.tar.xz"


def write_archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:xz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_archive(tmp_path / "small.tar.xz", {"meta.json": b"{}", "models/base/config.json": b"{}"})


def test_models_has_a_folder_per_stage(golden: Path) -> None:
    stages = {folder.name for folder in (golden / "models").iterdir()}
    assert stages == {"base", "interpolation", "if2", "sr1", "sr2"}


def test_second_unpack_does_nothing(tmp_path: Path, archive: Path) -> None:
    target = unpack(archive, tmp_path / "deep" / "golden")
    assert (target / "models" / "base" / "config.json").read_bytes() == b"{}"
    (target / "meta.json").write_text("mine")

    assert unpack(archive, target) == target
    assert (target / "meta.json").read_text() == "mine"


def test_changed_archive_replaces_the_content(tmp_path: Path, archive: Path) -> None:
    target = unpack(archive, tmp_path / "golden")
    write_archive(archive, {"meta.json": b"[]"})

    unpack(archive, target)
    assert (target / "meta.json").read_bytes() == b"[]"
    assert not (target / "models").exists()


@pytest.mark.parametrize("kept", [0, 5_000_000, -8], ids=["empty", "half", "no tail"])
def test_truncated_archive_raises_and_leaves_nothing(tmp_path: Path, kept: int) -> None:
    cut = tmp_path / "cut.tar.xz"
    cut.write_bytes(ARCHIVE.read_bytes()[:kept])
    folder = tmp_path / "folder"

    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        unpack(cut, folder / "golden")
    assert [path.name for path in folder.iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "..\\outside.txt", "C:outside.txt"])
def test_members_outside_the_target_are_refused(tmp_path: Path, name: str) -> None:
    archive = write_archive(tmp_path / "outside.tar.xz", {name: b""})
    with pytest.raises(CheckpointError, match=r"holds .*outside.*only plain files and folders below the target"):
        unpack(archive, tmp_path / "golden")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".golden.lock", "outside.tar.xz"]


def test_links_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "links.tar.xz", "w:xz") as tar:
        link = tarfile.TarInfo("config.json")
        link.type, link.linkname = tarfile.SYMTYPE, "meta.json"
        tar.addfile(link)
    with pytest.raises(CheckpointError, match=r"holds 'config\.json': only plain files and folders"):
        unpack(tmp_path / "links.tar.xz", tmp_path / "golden")
    assert not (tmp_path / "golden").exists()


def test_an_empty_folder_is_filled(tmp_path: Path, archive: Path) -> None:
    (tmp_path / "golden").mkdir()
    assert (unpack(archive, tmp_path / "golden") / "meta.json").is_file()


def test_folder_with_other_files_is_left_alone(tmp_path: Path, archive: Path) -> None:
    target = tmp_path / "home"
    target.mkdir()
    (target / "letter.txt").write_text("dear")

    with pytest.raises(CheckpointError, match="Move it away, or name another folder"):
        unpack(archive, target)
    assert (target / "letter.txt").read_text() == "dear"
    with pytest.raises(CheckpointError, match=r"cannot be unpacked there .*Run this in a folder that can be written"):
        unpack(archive, target / "letter.txt" / "below")
    with pytest.raises(CheckpointError, match=r"no\.tar\.xz cannot be unpacked there"):
        unpack(tmp_path / "no.tar.xz", tmp_path / "new")


def test_a_python_without_lzma_is_told_so(tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lzma", None)
    with pytest.raises(CheckpointError, match=r"this Python has no lzma\. Install liblzma-dev"):
        unpack(archive, tmp_path / "golden")
    assert not (tmp_path / "golden").exists()
