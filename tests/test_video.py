"""Videos are decoded again and compared; failures are provoked half-way and must leave nothing behind."""

import errno
import os
import re
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence, PngImagePlugin

from engines.errors import OutputError
from runtime import video
from runtime.video import Taken, check_output, read_metadata, save_video

FORMATS = ["clip.mp4", "clip.gif", "clip.webp", "clip"]
METADATA = {
    "prompt": 'a «panda»\n"two lines", 日本語 👍',
    "seed": "345",
    "settings": '{"guidance_scale": 9.0}',
    "odd": "nul \x00, a byte of the command line that is no UTF-8 \udc80",
}


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Seven different frames of a smooth, colourful scene, uint8 [7, 48, 64, 3]."""
    y, x = np.mgrid[0:48, 0:64] / 64
    scene = [np.stack([x, y, (1 + np.sin(6 * (x + y) + k)) / 2], axis=-1) * (0.6 + k / 20) for k in range(7)]
    return (np.stack(scene) * 255).astype(np.uint8)


def read_frames(path: Path) -> np.ndarray:
    if path.suffix == ".mp4":
        with av.open(str(path)) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    if path.is_dir():
        return np.stack([np.asarray(Image.open(file)) for file in sorted(path.iterdir())])
    with Image.open(path) as image:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])


def psnr(actual: np.ndarray, expected: np.ndarray) -> float:
    """Decibels; at 30 a difference begins to be hard to see."""
    return float(10 * np.log10(255**2 / np.square(actual.astype(float) - expected).mean()))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What is written


@pytest.mark.parametrize(("name", "decibels"), [("clip.mp4", 36), ("clip.gif", 30), ("clip.webp", 36)])
def test_a_video_shows_the_frames_it_was_given(name: str, decibels: float, frames: np.ndarray, tmp_path: Path) -> None:
    save_video(frames, tmp_path / name)
    shown = read_frames(tmp_path / name)
    assert shown.shape == frames.shape
    assert psnr(shown, frames) > decibels


def test_png_frames_are_exact_and_numbered(frames: np.ndarray, tmp_path: Path) -> None:
    save_video(frames, tmp_path / "clip")
    assert sorted(os.listdir(tmp_path / "clip")) == [f"000{index}.png" for index in range(7)]
    np.testing.assert_array_equal(read_frames(tmp_path / "clip"), frames)


@pytest.mark.parametrize("name", FORMATS)
def test_metadata_come_back_as_they_were(name: str, frames: np.ndarray, tmp_path: Path) -> None:
    save_video(frames, tmp_path / name, metadata=METADATA)
    assert read_metadata(tmp_path / name) == METADATA


@pytest.mark.parametrize("name", FORMATS)
def test_a_video_without_metadata_has_none(name: str, frames: np.ndarray, tmp_path: Path) -> None:
    save_video(frames, tmp_path / name)
    assert read_metadata(tmp_path / name) == {}


def test_an_mp4_plays_in_a_browser_while_it_loads(frames: np.ndarray, tmp_path: Path) -> None:
    save_video(frames, tmp_path / "clip.mp4", fps=8, metadata=METADATA)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 8)
        assert stream.duration * stream.time_base == 7 / 8
        assert container.metadata["title"].startswith("a «panda»")
    raw = (tmp_path / "clip.mp4").read_bytes()
    assert raw.index(b"moov") < raw.index(b"mdat")


def test_an_mp4_says_which_colours_it_means(frames: np.ndarray, tmp_path: Path) -> None:
    save_video(frames, tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frame = next(container.decode(video=0))
    bt709, limited = 1, 1
    assert (frame.colorspace, frame.color_primaries, frame.color_trc) == (bt709, bt709, bt709)
    assert frame.color_range == limited


def test_an_odd_size_is_padded_in_an_mp4_only(frames: np.ndarray, tmp_path: Path) -> None:
    odd = frames[:, :47, :63]
    save_video(odd, tmp_path / "clip.mp4")
    shown = read_frames(tmp_path / "clip.mp4")
    assert shown.shape == (7, 48, 64, 3)
    assert psnr(shown[:, :47, :63], odd) > 36
    for name in FORMATS[1:]:
        save_video(odd, tmp_path / name)
        assert read_frames(tmp_path / name).shape == odd.shape


@pytest.mark.parametrize(("name", "expected"), [("clip.gif", 880), ("clip.webp", 875)])
def test_frame_durations_add_up_to_the_frame_rate(name: str, expected: int, frames: np.ndarray, tmp_path: Path) -> None:
    save_video(frames, tmp_path / name, fps=8)  # 7 / 8 s; GIF counts hundredths
    with Image.open(tmp_path / name) as image:
        durations = []
        for index in range(image.n_frames):
            image.seek(index)
            image.load()
            durations.append(image.info["duration"])
        assert image.info["loop"] == 0
    assert sum(durations) == expected
    assert max(durations) - min(durations) <= 10


@pytest.mark.parametrize("name", FORMATS)
def test_a_single_frame_is_a_video_too(name: str, frames: np.ndarray, tmp_path: Path) -> None:
    save_video(frames[:1], tmp_path / name, metadata=METADATA)
    assert read_frames(tmp_path / name).shape == (1, 48, 64, 3)
    assert read_metadata(tmp_path / name) == METADATA


def test_suffixes_may_be_capital_and_a_slash_asks_for_a_folder(frames: np.ndarray, tmp_path: Path) -> None:
    save_video(frames, tmp_path / "clip.MP4")
    save_video(frames, f"{tmp_path}/take.2/")
    assert read_frames(tmp_path / "take.2").shape == frames.shape
    assert read_metadata(tmp_path / "clip.MP4") == {}


def test_a_relative_path_is_fine(frames: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_video(frames, "clip.webp")
    assert os.listdir(tmp_path) == ["clip.webp"]


# Replacing


@pytest.mark.parametrize("name", FORMATS)
def test_a_new_video_replaces_the_old_one_completely(name: str, frames: np.ndarray, tmp_path: Path) -> None:
    save_video(frames, tmp_path / name)
    save_video(frames[:3], tmp_path / name, metadata={"take": "2"})
    assert os.listdir(tmp_path) == [name]
    assert len(read_frames(tmp_path / name)) == 3
    assert read_metadata(tmp_path / name) == {"take": "2"}


def test_a_video_that_shall_replace_none_does_not(
    frames: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_video(frames, tmp_path / "new.mp4", replace=False)
    for link in (os.link, no_links):
        monkeypatch.setattr("os.link", link)
        with pytest.raises(Taken):
            save_video(frames[:3], tmp_path / "new.mp4", replace=False)
    save_video(frames, tmp_path / "other.mp4", replace=False)
    assert [len(read_frames(tmp_path / name)) for name in sorted(os.listdir(tmp_path))] == [7, 7]


def no_links(*_: object) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


def test_a_video_is_written_where_a_link_leads(frames: np.ndarray, tmp_path: Path) -> None:
    """The format is the one that the link's own name says."""
    (tmp_path / "disk").mkdir()
    for name in ("real.mp4", "blob", "other.gif"):
        link, real = tmp_path / f"{name}-link.mp4", tmp_path / "disk" / name
        link.symlink_to(real)
        check_output(link)
        save_video(frames, link, metadata=METADATA)
        assert link.is_symlink() and real.is_file() and read_metadata(link) == METADATA


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.mp4")
    with pytest.raises(OutputError, match=r"x\.mp4: is no regular file"):
        check_output(tmp_path / "x.mp4")


def test_a_full_disk_is_told_before_the_computation(
    frames: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5000, total=2**40))
    with pytest.raises(OutputError, match=r"disk full: more is needed than the 5000 bytes free"):
        check_output(tmp_path / "x.mp4")
    save_video(frames[:1], tmp_path / "x.mp4")  # tried, once it is there
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0, total=0))
    check_output(tmp_path / "x.mp4")  # a file system that does not say


def test_an_empty_folder_is_filled(frames: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    save_video(frames, tmp_path / "clip")
    assert len(read_frames(tmp_path / "clip")) == 7


@pytest.mark.parametrize("foreign", ["notes.txt", "0007.png", "photo.png"])
def test_a_folder_with_foreign_files_is_never_replaced(foreign: str, frames: np.ndarray, tmp_path: Path) -> None:
    save_video(frames, tmp_path / "clip")
    Image.new("RGB", (8, 8)).save(tmp_path / "clip" / foreign, "PNG")
    before = content(tmp_path)
    with pytest.raises(OutputError, match=f"such as {foreign}"):
        save_video(frames[:2], tmp_path / "clip")
    assert content(tmp_path) == before


def test_a_picture_that_cannot_be_read_is_foreign(frames: np.ndarray, tmp_path: Path) -> None:
    save_video(frames, tmp_path / "clip")
    profile = os.urandom(2 * PngImagePlugin.MAX_TEXT_CHUNK)  # more than Pillow unpacks
    Image.new("RGB", (8, 8)).save(tmp_path / "clip" / "0000.png", "PNG", icc_profile=profile)
    with pytest.raises(OutputError, match=r"such as 0000\.png"):
        check_output(tmp_path / "clip")
    with pytest.raises(OutputError, match="cannot read it as a video"):
        read_metadata(tmp_path / "clip")


@pytest.mark.parametrize("exif", [b"garbage!garbage", b"II*\0"])
def test_a_picture_of_another_program_is_told_as_one_that_cannot_be_read(tmp_path: Path, exif: bytes) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "other.webp", exif=exif)
    with pytest.raises(OutputError, match="cannot read it as a video"):
        read_metadata(tmp_path / "other.webp")


def test_a_description_that_no_reader_can_take_is_none_of_ours(tmp_path: Path) -> None:
    (description := PngImagePlugin.PngInfo()).add_text("Description", "[" * 100_000)
    Image.new("RGB", (8, 8)).save(tmp_path / "deep.png", pnginfo=description)
    assert read_metadata(tmp_path / "deep.png") == {}


def test_what_a_file_manager_left_there_is_no_reason_to_refuse_a_folder(frames: np.ndarray, tmp_path: Path) -> None:
    save_video(frames, tmp_path / "clip")
    (tmp_path / "clip" / ".DS_Store").write_bytes(b"Bud1")
    save_video(frames[:2], tmp_path / "clip")
    assert len(os.listdir(tmp_path / "clip")) == 2


def test_a_file_that_appears_in_the_folder_meanwhile_is_kept(
    frames: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_video(frames, tmp_path / "clip")
    write = video._write_pngs

    def write_while_the_user_works(*args: object) -> None:
        write(*args)
        (tmp_path / "clip/notes.txt").write_text("mine")

    monkeypatch.setattr(video, "_write_pngs", write_while_the_user_works)
    with pytest.raises(OutputError, match=r"such as notes\.txt"):
        save_video(frames[:2], tmp_path / "clip")
    assert os.listdir(tmp_path) == ["clip"]
    assert len(os.listdir(tmp_path / "clip")) == 8


@pytest.mark.parametrize("interrupted", [1, 2])
def test_frames_that_are_replaced_when_ctrl_c_comes_are_the_old_or_the_new(
    frames: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: int
) -> None:
    calls: list[Path] = []

    def interrupt(source: Path, target: Path) -> None:
        move(source, target)
        calls.append(source)
        if len(calls) == interrupted:
            raise KeyboardInterrupt

    save_video(frames, tmp_path / "clip")
    move = video.move
    monkeypatch.setattr(video, "move", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_video(frames[:2], tmp_path / "clip")
    assert os.listdir(tmp_path) == ["clip"]
    assert len(os.listdir(tmp_path / "clip")) == {1: 7, 2: 2}[interrupted]


@pytest.mark.skipif(sys.platform == "win32", reason="has no such names")
def test_a_name_that_looks_like_an_address_is_a_file(
    frames: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_video(frames, "12:30.mp4", metadata={"prompt": "x"})
    assert read_metadata("12:30.mp4") == {"prompt": "x"}


# Failing


def fail_after_writing(name: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the writer of this format fail when everything is in the temporary file or folder."""
    suffix = Path(name).suffix
    write = video._WRITERS.get(suffix, video._write_pngs)

    def write_and_fail(frames: np.ndarray, path: Path, *settings: object) -> None:
        write(frames, path, *settings)
        assert path.exists()
        raise error

    monkeypatch.setitem(video._WRITERS, suffix, write_and_fail)
    monkeypatch.setattr(video, "_write_pngs", write_and_fail)


def fail_at_the_fourth_frame(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def count_and_fail(convert):
        def counted(*args: object, **settings: object) -> object:
            seen.append(args)
            if len(seen) == 4:
                raise error
            return convert(*args, **settings)

        return counted

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", count_and_fail(av.VideoFrame.from_ndarray))
    monkeypatch.setattr(Image, "fromarray", count_and_fail(Image.fromarray))


ERRORS = [
    (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    (ValueError("a bug"), ValueError, "a bug"),
    (OSError(errno.EACCES, "Permission denied"), OutputError, r"cannot write \(Permission denied\)"),
    (av.error.OSError(errno.EIO, "Input/output error"), OutputError, r"cannot write \(Input/output error\)"),
]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("error", "raised", "message"), ERRORS)
@pytest.mark.parametrize("when", ["after writing", "at the fourth frame"])
def test_a_failure_leaves_nothing_behind(
    when: str,
    error: BaseException,
    raised: type[BaseException],
    message: str,
    name: str,
    frames: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if when == "after writing":
        fail_after_writing(name, error, monkeypatch)
    else:
        fail_at_the_fourth_frame(error, monkeypatch)
    with pytest.raises(raised, match=message):
        save_video(frames, tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_failure_leaves_the_old_video_untouched(
    error: BaseException, name: str, frames: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_video(frames, tmp_path / name)
    before = content(tmp_path)
    fail_after_writing(name, error, monkeypatch)
    with pytest.raises((KeyboardInterrupt, OutputError)):
        save_video(frames[:2], tmp_path / name)
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", FORMATS)
def test_a_failure_of_the_last_rename_leaves_the_old_video_untouched_and_the_new_one_beside_it(
    name: str, frames: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_video(frames, tmp_path / name)
    before = content(tmp_path)
    rename = os.replace
    failures = iter([PermissionError(errno.EACCES, "is open in a player")])

    def fail_once(source: Path, target: Path) -> None:
        if target.name == name and (error := next(failures, None)):
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(
        OutputError, match=r"cannot be replaced \(is open in a player\)\. The finished video is "
    ) as caught:
        save_video(frames[:2], tmp_path / name)
    kept = Path(str(caught.value).partition(" video is ")[2][:-1])
    shutil.move(kept, tmp_path.parent / kept.name)
    assert content(tmp_path) == before
    assert kept.suffix == Path(name).suffix and (tmp_path.parent / kept.name).exists(), "hours may be in it"


@pytest.mark.parametrize("name", FORMATS)
def test_a_place_that_takes_no_name_at_all_is_told_in_a_line(
    name: str, frames: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_source: Path, _target: Path) -> None:
        raise OSError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OutputError, match=r"cannot write \(No such file or directory\)\. Choose another place"):
        save_video(frames, tmp_path / name)
    assert content(tmp_path) == {}


def test_a_full_disk_is_told_with_its_free_bytes(
    frames: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_after_writing("clip.gif", OSError(errno.ENOSPC, "No space left on device"), monkeypatch)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 88, 12))
    with pytest.raises(OutputError, match=r"disk full: more is needed than the 12 bytes free at .*\. Make room there"):
        save_video(frames, tmp_path / "clip.gif")


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)],
)
def test_frames_of_another_kind_are_refused(wrong: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=re.escape(f"got {wrong.dtype} frames of shape {wrong.shape}")):
        save_video(wrong, tmp_path / "clip.mp4")


@pytest.mark.parametrize("fps", [0, -8, 1e-9, float("nan")])
def test_a_frame_rate_of_nothing_is_refused(fps: float, frames: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"frames per second, need 0\.01 to 1000"):
        save_video(frames, tmp_path / "clip.mp4", fps=fps)


# Asking first


@pytest.mark.parametrize("name", FORMATS)
def test_asking_first_leaves_no_trace(name: str, frames: np.ndarray, tmp_path: Path) -> None:
    check_output(tmp_path / name)
    assert os.listdir(tmp_path) == []
    save_video(frames, tmp_path / name)
    before = content(tmp_path)
    check_output(tmp_path / name)
    assert content(tmp_path) == before


def test_an_unknown_suffix_is_refused_with_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write \.avi files\. Allowed are \.mp4, \.gif, \.webp, or a folder"):
        check_output(tmp_path / "clip.avi")


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_parent_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"there is no folder .*missing\. Create it"):
        check_output(tmp_path / "missing" / name)


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        check_output(tmp_path / "clip.mp4")


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clip").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / "clip")


def test_a_folder_that_cannot_be_replaced_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, link = tmp_path / "here", tmp_path / "link"
    here.mkdir()
    link.symlink_to(here, target_is_directory=True)
    monkeypatch.chdir(here)
    for folder in (".", link, here):
        with pytest.raises(OutputError, match=r"cannot be replaced\. Name a new folder below it, e\.g\. .*frames"):
            check_output(folder)
    monkeypatch.chdir(tmp_path)
    check_output(here)
    monkeypatch.setattr(os.path, "ismount", lambda _: True)
    with pytest.raises(OutputError, match="mount point"):
        check_output(here)


def test_a_folder_that_takes_no_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)  # rights are no obstacle to root, nor the same on Windows
    with pytest.raises(OutputError, match=r"cannot write \(Permission denied\)"):
        check_output(tmp_path / "clip.mp4")


def test_a_name_too_long_for_the_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        check_output(tmp_path / ("x" * 300 + ".mp4"))


def test_an_encoder_that_is_not_there_is_missed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    with pytest.raises(OutputError, match="no libx264"):
        check_output(tmp_path / "clip.mp4")
    check_output(tmp_path / "clip.webp")


@pytest.mark.parametrize(
    "name", ["a?.mp4", 'say "hi".gif', "12:30.webp", "a|b", "con.mp4", "NUL", "take 1.", "COM3.gif"]
)
def test_a_name_that_windows_cannot_hold_is_known(name: str) -> None:
    assert video._WINDOWS_REFUSES.search(name)


@pytest.mark.parametrize("name", [*FORMATS, "console.mp4", "日本 語.gif", "a.b-c_(1)'.webp", ".hidden.mp4", "0000.png"])
def test_names_made_here_are_names_on_windows_too(name: str) -> None:
    assert not video._WINDOWS_REFUSES.search(name)
    assert not video._WINDOWS_REFUSES.search(video._temporary(Path(name)).name)


# Reading


def test_metadata_of_other_programs_are_no_metadata(frames: np.ndarray, tmp_path: Path) -> None:
    picture = Image.fromarray(frames[0])
    picture.save(tmp_path / "a.gif", comment=b"made elsewhere \xff")
    picture.save(tmp_path / "b.gif", comment=b"[1]")
    picture.save(tmp_path / "c.webp")
    for name in ("a.gif", "b.gif", "c.webp"):
        assert read_metadata(tmp_path / name) == {}


@pytest.mark.parametrize("name", ["missing.mp4", "missing.gif", "notes.webp", "notes.mp4", "."])
def test_what_is_no_video_cannot_be_read(name: str, tmp_path: Path) -> None:
    for suffix in ("webp", "mp4"):
        (tmp_path / f"notes.{suffix}").write_text("not a video")
    with pytest.raises(OutputError, match="cannot read it as a video"):
        read_metadata(tmp_path / name)
