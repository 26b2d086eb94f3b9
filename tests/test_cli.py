"""`show1-rt` from the command line to the file, and one line for whatever stops it."""

import argparse
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from engines.store import Bundle
from runtime.cli import _Bars, _free_name, main
from runtime.command import run_command
from runtime.config import Settings, StageSettings
from runtime.ops import clip_to_frames
from runtime.pipeline import Show1Pipeline, Video
from runtime.video import read_metadata, save_video

PROMPT = "A panda, taking a selfie!"
Spoil = Callable[[Path, bytes], None]

STAGES = ["base", "interp", "if2", "sr1", "sr2"]
DRAFT = ["--size", "112x64", "--keyframes", "2", "--steps", "base=2,interp=2,if2=2,sr1=2,sr2=2"]


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    def assert_one_line(self, message: str) -> None:
        assert self.code == 1
        assert self.out == ""
        (line,) = (line for line in self.err.splitlines() if not line.endswith(" steps"))  # but for the progress
        assert line.startswith("error: ") and message in line


@pytest.fixture
def generate(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """Runs `show1-rt generate` in an empty folder, with the draft's settings first: later arguments win."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, prompt: str = PROMPT) -> Result:
        try:
            code = main(["generate", prompt, "--bundle", str(bundle), *DRAFT, *arguments])
        except SystemExit as exit:
            code = exit.code
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def copied(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(bundle, tmp_path_factory.mktemp("copied") / "bundle")


@pytest.fixture
def spoil() -> Iterator[Spoil]:
    """Overwrites a file of the copied bundle until the end of the test."""
    whole: dict[Path, bytes] = {}

    def overwrite(path: Path, content: bytes) -> None:
        whole[path] = path.read_bytes()
        path.write_bytes(content)

    yield overwrite
    for path, content in whole.items():
        path.write_bytes(content)


def file_of(bundle: Path, engine: str, graph: str, kind: str) -> Path:
    opened = Bundle.open(bundle)
    return opened.path(getattr(opened.engine(engine).graphs[graph], kind))


# What is written and printed


def test_a_prompt_becomes_a_video_that_knows_how_it_was_made(generate: Callable[..., Result], bundle: Path) -> None:
    result = generate(
        *("--seed", "7", "--guidance", "sr1=3.5", "--guided", "base=0.5,sr1=0.1-0.6", "--json"),
        *("--negative-prompt", "dark", "--save-stages", "deep/stages", "--out", "x.mp4"),
    )
    assert result.code == 0, result.err
    about = json.loads(result.out)
    assert about["out"] == "x.mp4"
    assert about["frames"] == 5
    assert list(about["stage_seconds"]) == STAGES
    assert 0 < sum(about["stage_seconds"].values()) <= about["seconds"]
    assert about["cut"] == {}

    metadata = read_metadata(Path("x.mp4"))
    assert metadata["prompt"] == about["prompt"] == PROMPT
    assert metadata["seed"] == 7
    assert metadata["negative_prompt"] == "dark"
    assert metadata["software"].startswith("show1-rt ")
    assert metadata["bundle"] == f"{bundle.name} {Bundle.open(bundle).id}"
    settings = Settings.from_dict(metadata["settings"])
    expected = Settings(size=(112, 64), keyframes=2).with_steps(dict.fromkeys(STAGES, 2)).with_guidance({"sr1": 3.5})
    assert settings == expected.with_guided({"base": (0.0, 0.5), "sr1": (0.1, 0.6)})
    with av.open("x.mp4") as container:
        (stream,) = container.streams
        assert (stream.width, stream.height, stream.frames, stream.average_rate) == (112, 64, 5, 8)

    sizes = {"base": (2, 8, 16), "interp": (5, 8, 16), "if2": (1, 32, 64), "sr1": (5, 32, 64), "sr2": (5, 64, 112)}
    assert {path.name for path in Path("deep/stages").iterdir()} == {f"{s}.{t}" for s in STAGES for t in ("mp4", "npy")}
    for stage, (frames, height, width) in sizes.items():
        clip = np.load(f"deep/stages/{stage}.npy")
        assert clip.shape == (1, 3, frames, height, width), stage
        assert clip.dtype == np.float32

    # The same settings from Python give the same video.
    with Show1Pipeline.from_bundle(bundle) as pipeline:
        video = pipeline(PROMPT, negative_prompt="dark", seed=7, settings=settings)
    np.testing.assert_array_equal(video.clip, np.load("deep/stages/sr2.npy"))


def test_without_out_the_video_is_named_after_its_prompt(generate: Callable[..., Result]) -> None:
    result = generate("--steps", "base=1,interp=1,if2=1,sr1=1,sr2=2")
    assert result.code == 0, result.err
    assert result.out == "a-panda-taking-a-selfie-345.mp4\n"
    assert os.listdir() == ["a-panda-taking-a-selfie-345.mp4"]
    assert read_metadata(Path("a-panda-taking-a-selfie-345.mp4"))["negative_prompt"] == "low resolution, blur"
    assert [line for line in result.err.splitlines() if line.endswith(" steps")] == [
        f"{stage}: 1 steps" for stage in STAGES
    ]


def test_a_name_that_is_not_asked_for_replaces_no_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("a-panda-7.mp4", "a-panda-7-2.mp4", "a-panda-7-3.mp4"):
        assert _free_name("A panda!", 7) == expected
        Path(expected).touch()
    assert _free_name("熊猫在自拍", 345) == "熊猫在自拍-345.mp4"
    assert _free_name("?!", 1) == "video-1.mp4"
    long = _free_name("\U00020000" * 60, 1)  # four bytes each
    Path(long).touch()
    assert long == "\U00020000" * 50 + "-1.mp4"


def test_png_frames_and_a_cut_prompt(generate: Callable[..., Result]) -> None:
    prompt = " ".join(f"Panda{number}" for number in range(80))
    result = generate("--out", "frames/", "--json", "--steps", "base=1,interp=1,if2=1,sr1=1,sr2=2", prompt=prompt)
    assert result.code == 0, result.err
    assert sorted(os.listdir("frames")) == [f"000{index}.png" for index in range(5)]
    with Image.open("frames/0000.png") as image:
        assert image.size == (112, 64)
    assert read_metadata(Path("frames"))["prompt"] == prompt
    assert set(json.loads(result.out)["cut"]) == {"T5", "CLIP"}
    warnings = [line for line in result.err.splitlines() if line.startswith("warning: ")]
    assert [line.split(":")[1] for line in warnings] == [" T5", " CLIP"]
    assert all("77 tokens are read at most; this end was cut off" in line and "anda79'" in line for line in warnings)


# What stops it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "big"], "size 'big'; allowed: WIDTHxHEIGHT, e.g. 576x320"),
        (["--size", "576x"], "size '576x'; allowed: WIDTHxHEIGHT"),
        (["--steps", "base"], "'base'; allowed: STAGE=NUMBER, stages base, interp, if2, sr1, sr2"),
        (["--steps", "base=1.5"], "'base=1.5'; allowed: STAGE=NUMBER"),
        (["--steps", ""], "''; allowed: STAGE=NUMBER"),
        (["--guidance", "base=much"], "'base=much'; allowed: STAGE=NUMBER"),
        (["--steps", "base=2,sr1=2,base=3"], "'base=2,sr1=2,base=3' names base twice; allowed: every stage once"),
        (["--steps", "base=2,sr9=3"], "unknown stage sr9; allowed: base, interp, if2, sr1, sr2"),
        (["--guided", "base=most"], "'base=most'; allowed: STAGE=END or BEGIN-END as shares of the steps, stages base"),
        (["--guided", "base=0.7-0.3"], "guided part of base: 0.7-0.3; allowed: BEGIN-END from 0 to 1"),
        (["--guided", "sr2=1.5"], "guided part of sr2: 0-1.5; allowed: BEGIN-END from 0 to 1"),
        (["--guided", "text=0.5"], "unknown stage text; allowed: base"),
        (["--spacing", "base=karras"], "spacing of base: 'karras'; allowed: linspace, leading, trailing, logsnr"),
        (["--spacing", "base"], "'base'; allowed: STAGE=SPACING, stages base, interp, if2, sr1, sr2, e.g. sr1=logsnr"),
        (["--cache", "sr1=0"], "cache interval of sr1: 0; allowed: 1 (none) or more"),
        (["--cache", "sr1=often"], "'sr1=often'; allowed: STAGE=NUMBER"),
        (["--guidance", "text=3"], "unknown stage text; allowed: base"),
        (["--steps", "sr1=0"], "steps of sr1: 0; allowed: 1 or more"),
        (["--steps", "if2=2000"], "if2: "),
        (["--guidance", "base=nan"], "guidance of base: nan; allowed: 0 to 1000"),
        (["--size", "100x64"], "size 100x64; allowed: width and height in multiples of 8, from 64"),
        (["--size", "56x64"], "size 56x64; allowed: width and height in multiples of 8, from 64"),
        (["--size", "8192x64"], "if2/step: width 3648 (built for"),
        (["--keyframes", "1"], "keyframes: 1; allowed: 2 or more"),
        (["--keyframes", "65"], "base/step: frames 65 (built for"),
        (["--seed", "-1"], "seed is -1; allowed: 0 to"),
        (["--out", "nowhere/x.mp4"], "nowhere. Create it, or choose another"),
        (["--out", "x.avi"], "x.avi: cannot write .avi files. Allowed are .mp4"),
        (["--out", "taken/x.mp4"], "taken. Create it, or choose another"),
        (["--save-stages", "taken"], "taken: cannot be made"),
        (["--out", "run/", "--save-stages", "run/stages"], "--out run/ holds --save-stages run/stages. Choose another"),
        (["--out", "x.mp4", "--save-stages", "x.mp4"], "--out x.mp4 holds --save-stages x.mp4. Choose another"),
        (["--out", "st/sr1.mp4", "--save-stages", "st"], "st/sr1.mp4 is where --save-stages keeps what sr1 made."),
        (["--out", "st/SR1.mp4", "--save-stages", "st"], "st/SR1.mp4 is where --save-stages keeps what SR1 made."),
        (["--bundle", "nowhere", "--save-stages", "st"], "nowhere: no manifest.json there"),
        (["--size", "1" * 5000 + "x64", "--save-stages", "st"], "allowed: WIDTHxHEIGHT"),
        (["--seed", "-1", "--save-stages", "st"], "seed is -1; allowed: 0 to"),
        (["--keyframes", "65", "--save-stages", "st"], "base/step: frames 65 (built for"),
        (["--bundle", "taken"], "taken: no manifest.json there, so it is not a bundle. Make one with"),
        (["--bundle", "nowhere"], "nowhere: no manifest.json there, so it is not a bundle. Make one with"),
    ],
)
def test_a_bad_argument_is_one_line_and_no_file(
    generate: Callable[..., Result], arguments: list[str], message: str
) -> None:
    Path("taken").touch()
    result = generate("--out", "x.mp4", *arguments)
    result.assert_one_line(message)
    assert len(result.err.splitlines()) == 1, "nothing was computed before"
    assert os.listdir() == ["taken"]


@pytest.mark.parametrize("prompt", ["", " \n "])
def test_an_empty_prompt_is_one_line_and_no_file(generate: Callable[..., Result], prompt: str) -> None:
    generate(prompt=prompt).assert_one_line("the prompt is empty. Say what the video should show")
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keyframes", "two"], "argument --keyframes: invalid int value"),
        (["--preset", "best"], "argument --preset: invalid choice: 'best'"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_what_cannot_be_read_is_a_usage_error(
    generate: Callable[..., Result], arguments: list[str], message: str
) -> None:
    result = generate(*arguments)
    assert result.code == 2
    assert f"error: {message}" in result.err.splitlines()[-1]
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("engine", "graph", "kind"),
    [
        ("t5", "encode", "plan"),
        ("base", "context", "weights"),
        ("sr1", "step", "plan"),
        ("vae_decoder", "decode", "weights"),
    ],
)
def test_a_truncated_bundle_is_one_line_before_anything_is_computed(
    generate: Callable[..., Result], copied: Path, spoil: Spoil, engine: str, graph: str, kind: str
) -> None:
    path = file_of(copied, engine, graph, kind)
    spoil(path, path.read_bytes()[: path.stat().st_size // 2])
    result = generate("--bundle", str(copied))
    result.assert_one_line(f"{path} is missing or cut short. `python -m export check")
    assert "steps" not in result.err
    assert os.listdir() == []


def test_a_plan_of_the_right_length_that_is_none_is_one_line(
    generate: Callable[..., Result], copied: Path, spoil: Spoil
) -> None:
    path = file_of(copied, "t5", "encode", "plan")
    spoil(path, b"\n" * path.stat().st_size)
    generate("--bundle", str(copied)).assert_one_line(f"{path}: ONNX Runtime")
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", b'{"format": 1,', "is not a bundle's manifest (JSONDecodeError"),
        ("manifest.json", b'{"format": 7}', "manifest format 7, this version reads 3"),
        ("tokenizers/t5.json", None, "t5.json: not a tokenizer.json"),
    ],
)
def test_a_damaged_text_file_of_a_bundle_is_one_line(
    generate: Callable[..., Result], copied: Path, spoil: Spoil, name: str, content: bytes | None, message: str
) -> None:
    path = copied / name
    spoil(path, b" " * path.stat().st_size if content is None else content)
    generate("--bundle", str(copied)).assert_one_line(message)
    assert os.listdir() == []


@pytest.mark.parametrize("stage", ["base", "sr1"])
def test_ctrl_c_ends_with_130_a_line_and_no_video(
    generate: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"runtime.pipeline.run_{stage}", interrupt)
    result = generate("--out", "x.mp4")
    assert result.code == 130
    assert result.out == ""
    assert result.err.splitlines()[-1] == "interrupted: no video was written"
    assert "Traceback" not in result.err
    assert os.listdir() == []


def test_sigterm_cleans_up(capsys: pytest.CaptureFixture[str]) -> None:
    cleaned: list[bool] = []

    def run(_: argparse.Namespace) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit:
        run_command(parser_of(run), [], "")
    assert (exit.value.code, cleaned, signal.getsignal(signal.SIGTERM)) == (143, [True], before)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_reader_that_has_read_enough_ends_it_quietly() -> None:
    code = (
        "import argparse, sys; from runtime.command import run_command; parser = argparse.ArgumentParser(); "
        "parser.set_defaults(run=lambda _: print('line\\n' * 100_000)); sys.exit(run_command(parser, [], ''))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_memory_that_is_short_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def run(_: argparse.Namespace) -> None:
        raise MemoryError("Unable to allocate 9.00 GiB")

    assert run_command(parser_of(run), [], "") == 1
    assert capsys.readouterr().err.startswith("error: too little memory (Unable to allocate 9.00 GiB). Close")


@pytest.mark.skipif(sys.platform == "win32", reason="keeps a folder that a process is in")
def test_a_folder_that_has_been_removed_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, removed = Path.cwd(), tmp_path / "removed"
    removed.mkdir()
    os.chdir(removed)
    try:
        removed.rmdir()
        assert run_command(parser_of(lambda _: Path("out").absolute()), [], "") == 1
    finally:
        os.chdir(before)
    assert "has been removed. Change into one" in capsys.readouterr().err


def test_a_command_runs_in_any_thread() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run_command, parser_of(lambda _: None), [], "").result() == 0


def test_a_crash_of_machine_code_says_where_it_was(tmp_path: Path) -> None:
    code = (
        "import argparse, ctypes; from runtime.command import run_command; parser = argparse.ArgumentParser(); "
        "parser.set_defaults(run=lambda _: ctypes.string_at(0)); run_command(parser, [], '')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # not in ROOT, where it might leave a core file
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode and "in run_command" in process.stderr


def test_a_name_that_cannot_be_printed_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, "ascii", write_through=True))
    assert run_command(parser_of(lambda _: print("熊.mp4")), [], "") == 0
    assert written.getvalue() == b"\\u718a.mp4" + os.linesep.encode()


def parser_of(run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.set_defaults(run=run)
    return parser


@pytest.fixture
def made_already(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """`made_already(meanwhile)`: a black video stands for every run, at whose end `meanwhile` is called."""

    def stand_in(meanwhile: Callable[[], None] = lambda: None) -> None:
        def call(self: Show1Pipeline, prompt: str, *, settings: Settings, on_clip: Any, **_: Any) -> Video:
            clip = np.zeros((1, 3, 5, 64, 112), np.float32)
            on_clip("sr1", clip)
            on_clip("sr2", clip)
            meanwhile()
            return Video(clip_to_frames(clip), clip, prompt, "", 0, settings)

        monkeypatch.setattr(Show1Pipeline, "__call__", call)

    return stand_in


def test_options_win_over_a_preset(generate: Callable[..., Result], made_already: Any) -> None:
    made_already()
    assert generate("--preset", "fast", "--guidance", "interp=3", "--out", "x.mp4").code == 0
    interp = Settings.from_dict(read_metadata(Path("x.mp4"))["settings"]).interp
    assert interp == StageSettings(2, 3.0, (0, 0.5), "logsnr", cache_interval=2)


def disk_full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_run_that_ended_meanwhile_keeps_its_video(generate: Callable[..., Result], made_already: Any) -> None:
    made_already(lambda: Path("a-panda-taking-a-selfie-345.mp4").write_bytes(b"another's"))
    assert generate().out == "a-panda-taking-a-selfie-345-2.mp4\n"
    assert Path("a-panda-taking-a-selfie-345.mp4").read_bytes() == b"another's"


def test_stages_of_an_earlier_run_do_not_stay_beside_those_of_an_interrupted_one(
    generate: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("stages").mkdir()
    frames = np.zeros((2, 8, 16, 3), np.uint8)
    for name in ("base", "sr2"):
        save_video(frames, f"stages/{name}.mp4", metadata={"software": "show1-rt 0.0"})
        Path("stages", f"{name}.npy").write_text("earlier")
    Path("stages/mine.txt").write_text("mine")
    monkeypatch.setattr("runtime.pipeline.run_interp", interrupt)
    assert generate("--save-stages", "stages").code == 130
    assert sorted(os.listdir("stages")) == ["base.mp4", "base.npy", "mine.txt"]
    assert np.load("stages/base.npy").shape == (1, 3, 2, 8, 16)


@pytest.mark.parametrize("name", ["base.npy", "sr2.mp4"])
def test_files_that_are_not_stages_of_an_earlier_run_are_not_replaced(
    generate: Callable[..., Result], name: str
) -> None:
    Path(name).write_text("mine")
    generate("--save-stages", ".").assert_one_line(f"{name}: may be yours, not show1-rt's. Choose another")
    assert os.listdir() == [name] and Path(name).read_text() == "mine"


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_prompt_needs_no_quotes(bundle: Path, made_already: Any, tmp_path: Path) -> None:
    made_already()
    words, out = ["a", "red", "circle"], tmp_path / "x.mp4"
    assert main(["generate", *words, "--bundle", str(bundle), *DRAFT, "--out", str(out)]) == 0
    assert read_metadata(out)["prompt"] == "a red circle"


def test_a_stage_that_cannot_be_saved_does_not_cost_the_video(
    generate: Callable[..., Result], made_already: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_already()
    monkeypatch.setattr("engines.store.write_atomically", disk_full)
    result = generate("--out", "stages/x.mp4", "--save-stages", "stages")
    assert (result.code, result.out) == (1, "stages/x.mp4\n")
    (line,) = result.err.splitlines()
    assert line.startswith("error: stages/x.mp4 is complete, but not all stages were saved: stages/sr1.npy: cannot be")
    assert sorted(os.listdir("stages")) == ["sr1.mp4", "x.mp4"]


def test_a_failure_of_the_last_rename_is_one_line_and_leaves_the_video_of_before_and_the_new_one(
    generate: Callable[..., Result], made_already: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_already()
    monkeypatch.setattr("runtime.video._move", disk_full)
    Path("x.mp4").write_bytes(b"before")
    generate("--out", "x.mp4").assert_one_line("x.mp4")
    (new,) = {*os.listdir()} - {"x.mp4"}
    assert Path("x.mp4").read_bytes() == b"before" and new.endswith(".mp4") and len(Path(new).read_bytes()) > 6


def test_a_video_whose_place_has_gone_is_kept_in_another(
    generate: Callable[..., Result], made_already: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", "temporary")
    made_already(lambda: Path("gone").rmdir())
    for name in ("x.gif", "frames/", "frames.v2/"):
        Path("gone").mkdir(exist_ok=True)
        generate("--out", f"gone/{name}").assert_one_line("there is no folder")
        (kept,) = Path("temporary").glob(f"*/{name.strip('/')}")
        assert read_metadata(kept)["prompt"] == PROMPT
    for place in ("gone", None):  # nor is there another
        monkeypatch.setattr("tempfile.tempdir", place)
        monkeypatch.setattr("tempfile._get_default_tempdir", disk_full)
        Path("gone").mkdir(exist_ok=True)
        generate("--out", "gone/x.mp4").assert_one_line("there is no folder")


@pytest.mark.skipif(sys.platform == "win32", reason="keeps a folder that a process is in")
@pytest.mark.parametrize("options", [[], ["--out", "x.mp4"], ["--save-stages", "stages"]])
def test_a_video_outlives_the_folder_that_it_was_begun_in(
    generate: Callable[..., Result],
    made_already: Any,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
) -> None:
    (folder := tmp_path / "removed").mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made_already(lambda: shutil.rmtree(folder))
    generate(*options, "--bundle", os.path.relpath(bundle, folder)).assert_one_line("the current folder has gone")
    (kept,) = tmp_path.glob("*/*.mp4")
    assert read_metadata(kept)["prompt"] == PROMPT


def test_paths_are_read_as_the_shell_would(
    generate: Callable[..., Result], made_already: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    Path("home").mkdir()
    made_already()
    assert generate("--out", "~draft.mp4").out == "~draft.mp4\n"  # a name
    assert generate("--out=~/x.mp4", "--save-stages=~/stages").code == 0
    assert Path("home/x.mp4").is_file() and Path("home/stages/sr2.npy").is_file() and not Path("~").exists()
    for option in ("--out", "--save-stages", "--bundle"):
        result = generate(option, " ")
        assert result.code == 2 and f"argument {option}: is empty" in result.err


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_program_without_a_console_makes_its_video(
    bundle: Path, made_already: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: str
) -> None:
    made_already()
    monkeypatch.setattr(f"sys.{stream}", None)
    assert main(["generate", PROMPT, "--bundle", str(bundle), *DRAFT, "--out", str(tmp_path / "x.mp4")]) == 0
    assert (tmp_path / "x.mp4").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_one_line(unbuffered: str) -> None:
    code = (
        "import argparse, sys; from runtime.command import run_command; parser = argparse.ArgumentParser(); "
        "parser.set_defaults(run=lambda _: print('x.mp4')); sys.exit(run_command(parser, [], ''))"
    )
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}  # it is `print` that fails, or the end
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert process.returncode == 1
    assert process.stderr == "error: a file, or what was to be printed, cannot be written (No space left on device).\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_what_was_printed_before_a_failure_and_cannot_be_written_is_no_second_failure() -> None:
    code = (
        "import argparse, sys; from engines.errors import OutputError; from runtime.command import run_command\n"
        "def run(_): print('x.mp4'); raise OutputError('it failed')\n"
        "parser = argparse.ArgumentParser(); parser.set_defaults(run=run); sys.exit(run_command(parser, [], ''))"
    )
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (process.returncode, process.stderr) == (1, "error: it failed\n")


def test_a_quota_is_a_full_disk_and_other_errors_of_the_system_are_not() -> None:
    code = (
        "import argparse, errno, sys; from runtime.command import run_command; parser = argparse.ArgumentParser()\n"
        "def run(_): raise OSError(int(sys.argv[1]), 'what it was', *sys.argv[2:])\n"
        "parser.set_defaults(run=run); sys.exit(run_command(parser, [], ''))"
    )
    for number, files, start in (
        (errno.EDQUOT, [], "error: a file, or what was"),
        (errno.EACCES, ["x"], "error: x: "),
        (errno.EACCES, [], "Traceback (most recent"),
        (errno.ENOENT, [], "Traceback (most recent"),
    ):
        command = [sys.executable, "-c", code, str(number), *files]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == 1 and process.stderr.startswith(start) and "what it was" in process.stderr


def test_progress_in_a_log_is_a_line_a_minute_and_no_reason_to_stop(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("runtime.cli.time.monotonic", lambda: now)
    with _Bars() as bars:
        for done in range(1, 9):
            bars("base", done, 8)
            now += 25
    assert capsys.readouterr().err.splitlines() == ["base: 8 steps", "base: 4 of 8 steps", "base: 7 of 8 steps"]
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stderr", closed)
    with _Bars() as bars:
        for done in (1, 2, 3):
            bars("base", done, 8)


def test_a_bar_counts_the_steps_that_it_has_seen_and_ends_with_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with _Bars() as bars:
        for done in (1, 2, 3):
            bars("base", done, 3)
            if done == 1:
                assert bars._bar.initial == 1, "loading and the first step are none of its time"
        assert terminal.getvalue().endswith("\n"), "what is printed next has a line of its own"


def test_a_cut_prompt_that_nobody_is_told_of_is_no_reason_to_stop(
    generate: Callable[..., Result], made_already: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_already()
    make, closed = Show1Pipeline.__call__, io.StringIO()
    closed.close()

    def cut(*arguments: Any, on_cut: Callable[[str, str], None], **options: Any) -> Video:
        with monkeypatch.context() as patch:
            patch.setattr("sys.stderr", closed)
            on_cut("T5", "the end")
        return make(*arguments, **options)

    monkeypatch.setattr(Show1Pipeline, "__call__", cut)
    assert generate("--out", "x.mp4").out == "x.mp4\n"


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["--version"]])
def test_help_and_version_need_no_bundle(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith(("usage: show1-rt", "show1-rt "))
