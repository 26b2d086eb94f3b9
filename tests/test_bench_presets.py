"""Presets side by side: what the table, plot and files say of videos whose content is known."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import presets
from bench.__main__ import main
from bench.cost import Cost
from bench.presets import PresetResult, run_presets
from engines.errors import OutputError
from engines.store import Bundle
from export.demo.faithfulness import Prompt, load_prompts, training_prompts
from runtime.config import Settings
from runtime.ops import Frames
from runtime.pipeline import Show1Pipeline, Video

PROMPTS = load_prompts(3)
SETTINGS = {preset: Settings().with_preset(preset) for preset in ("reference", "fast")}
COSTS = {preset: Cost(settings) for preset, settings in SETTINGS.items()}


def true_video(prompt: Prompt) -> Frames:
    torch = pytest.importorskip("torch", reason="needs the export extra")
    from export.demo.scenes import lay_out, render

    clip = render(lay_out([prompt.scene], prompt.seed), torch.arange(29.0)[None], (288, 160))[0]
    return ((clip * 0.5 + 0.5) * 255).byte().permute(1, 2, 3, 0).numpy()


def make(prompt: Prompt, settings: Settings) -> Frames:
    """What was asked for by the reference; by others nothing but its border."""
    frames = true_video(prompt)
    return frames if settings == SETTINGS["reference"] else np.broadcast_to(frames[:1, :1, :1], frames.shape).copy()


def compare(out: Path, make: Callable[..., Frames] = make, on_preset: Any = lambda sofar: None) -> Any:
    return run_presets(PROMPTS, SETTINGS, COSTS, make, out, {"bundle": "b"}, lambda *_: None, on_preset)


@pytest.mark.torch
def test_presets_are_judged_and_compared_with_the_first(tmp_path: Path) -> None:
    sofar: list[list[str]] = []
    results = compare(tmp_path, on_preset=lambda done: sofar.append(list(done)))
    assert sofar == [["reference"], ["reference", "fast"]]
    reference, fast = results.values()
    assert reference.faithfulness.score == 1.0 and reference.psnr == []
    assert fast.faithfulness.score < 0.5 and len(fast.psnr) == 3 and max(fast.psnr) < 40
    assert np.mean(fast.change(reference)) == pytest.approx(fast.faithfulness.score - 1)
    assert all((tmp_path / preset / "sheet-0.png").is_file() for preset in results)

    table = presets.table(results)
    (first, second) = (dict(zip(table.headers, row, strict=True)) for row in table.rows)
    assert (first["preset"], first["PFLOP"], first["times cheaper"]) == ("reference", "19.7", "1.00")
    assert (first["points"], first["PSNR dB"]) == ("-", "-")
    assert (second["preset"], second["PFLOP"], second["times cheaper"]) == ("fast", "2.52", "7.83")
    assert float(second["points"]) == pytest.approx(100 * fast.faithfulness.score - 100, abs=0.1)
    assert "3 prompts by every preset" in table.title

    svg = presets.plot(results).svg()
    assert svg.count("<circle") == 2 and svg.count('stroke-width="1.6"') == 2
    kept = json.loads(json.dumps(presets.to_json(results)))["presets"]
    assert Settings.from_dict(kept["fast"]["settings"]) == SETTINGS["fast"]
    assert kept["fast"]["flop"] == COSTS["fast"].total and kept["fast"]["seconds"]["n"] == 3


@pytest.mark.torch
def test_a_comparison_goes_on_where_it_was_interrupted_but_not_with_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Settings] = []

    def counting(prompt: Prompt, settings: Settings) -> Frames:
        made.append(settings)
        if len(made) == 5:
            raise KeyboardInterrupt
        return make(prompt, settings)

    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path, counting)
    before = compare(tmp_path, counting)
    assert made == [SETTINGS["reference"]] * 3 + [SETTINGS["fast"]] * 4  # one of them was interrupted
    again = compare(tmp_path, counting)
    assert len(made) == 7 and presets.to_json(again) == presets.to_json(before)
    monkeypatch.setitem(SETTINGS, "fast", SETTINGS["fast"].with_steps({"sr1": 3}))
    with pytest.raises(OutputError, match=r"fast.00\.npz was made by another bundle or with other settings"):
        compare(tmp_path, counting)


def test_equal_videos_and_no_change_can_be_shown(tmp_path: Path) -> None:
    def gray(prompt: Prompt, settings: Settings) -> Frames:
        return np.full((5, 64, 112, 3), 128, np.uint8)

    results: dict[str, PresetResult] = compare(tmp_path, gray)
    row = dict(zip(presets.table(results).headers, presets.table(results).rows[1], strict=True))
    assert (row["points"], row["PSNR dB"], row["worst"]) == ("+0.0", "equal", "equal")
    kept = json.loads(json.dumps(presets.to_json(results), allow_nan=False))["presets"]
    assert [video["psnr"] for video in kept["fast"]["videos"]] == ["equal"] * 3


def test_every_preset_is_compared_with_the_first_and_its_worst_video_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SETTINGS, "draft", Settings().with_preset("draft"))
    monkeypatch.setitem(COSTS, "draft", Cost(SETTINGS["draft"]))
    away = {"reference": (0, 0, 0), "fast": (1, 1, 1), "draft": (4, 8, 16)}  # in steps of brightness

    def gray(prompt: Prompt, settings: Settings) -> Frames:
        preset = next(name for name, chosen in SETTINGS.items() if chosen == settings)
        return np.full((5, 64, 112, 3), 128 + away[preset][PROMPTS.index(prompt)], np.uint8)

    table = presets.table(compare(tmp_path, gray))
    rows = [dict(zip(table.headers, row, strict=True)) for row in table.rows]
    assert [(row["preset"], row["PSNR dB"], row["worst"]) for row in rows] == [
        ("reference", "-", "-"),
        ("fast", "48.1", "48.1"),
        ("draft", "30.1", "24.0"),
    ]


def test_the_command_compares_small_videos_of_few_prompts(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Settings] = []

    def noise(self: Show1Pipeline, prompt: str, *, seed: int, settings: Settings) -> Video:
        asked.append(settings)
        frames = np.random.default_rng(seed).integers(0, 256, (5, 64, 112, 3)).astype(np.uint8)
        return Video(frames, np.zeros((1, 3, 5, 64, 112), np.float32), prompt, "", seed, settings)

    monkeypatch.setattr(Show1Pipeline, "__call__", noise)
    command = ["quality", "--bundle", str(bundle), "--presets", "draft,fast", "--prompts", "2", "--video", "112x64"]
    assert main([*command, "--keyframes", "2", "--steps", "sr1=2", "--out", str(tmp_path)]) == 0
    assert [s.size for s in asked] == [(112, 64)] * 4 and [s.keyframes for s in asked] == [2] * 4
    assert [s.base.num_inference_steps for s in asked] == [30, 30, 6, 6]
    assert all(s.sr1.num_inference_steps == 2 for s in asked)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["benchmark"] == "presets" and list(report["presets"]) == ["fast", "draft"]
    page = (tmp_path / "report.md").read_text()
    assert all(f"| {preset} | 2 | 20" in page for preset in ("fast", "draft")), "when the clips of both were made"
    assert "![fast/sheet-0.png](fast/sheet-0.png)" in page and "![faithfulness](report-faithfulness.svg)" in page
    assert "points and PSNR against fast" in capsys.readouterr().out


def test_key_frames_alone_are_compared_by_their_own_work(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Show1Pipeline, "__call__", pytest.fail)
    command = ["quality", "--bundle", str(bundle), "--only-keyframes", "--combinations", "training", "--prompts", "2"]
    small = ["--video", "112x64", "--keyframes", "2", "--steps", "base=2", "--out", str(tmp_path)]
    assert main([*command, "--presets", "reference,draft", *small]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["run"]["judged"], report["run"]["combinations"]) == ("key frames", "training")
    assert [video["prompt"] for video in report["presets"]["draft"]["videos"]] == [
        p.prompt for p in training_prompts(2)
    ]
    with np.load(tmp_path / "draft" / "00.npz") as kept:
        assert kept["frames"].shape == (2, 64, 112, 3)
    work = Cost(Settings().with_options(preset="draft", steps="base=2")).stages
    assert report["presets"]["draft"]["flop"] == work["text"] + work["base"]
    assert "| preset | base |" in (tmp_path / "report.md").read_text()

    capsys.readouterr()
    assert main(["quality", "--bundle", str(bundle), "--preset", "draft", *small[:-1], str(tmp_path / "draft")]) == 1
    assert "Choose another" in capsys.readouterr().err


def test_steps_are_those_that_ran_and_work_that_of_the_published_networks(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Bundle.open(bundle)
    own = Settings(strength=0.1).with_guidance({"sr1": 1.0, "sr2": 1.0})
    monkeypatch.setattr(Bundle, "open", lambda _: Bundle(opened.root, replace(opened.manifest, defaults=own.to_dict())))

    def gray(self: Show1Pipeline, prompt: str, *, seed: int, settings: Settings) -> Video:
        frames = np.full((5, 64, 112, 3), 128, np.uint8)
        return Video(frames, np.zeros((1, 3, 5, 64, 112), np.float32), prompt, "", seed, settings)

    monkeypatch.setattr(Show1Pipeline, "__call__", gray)
    options = ["--presets", "reference,draft", "--prompts", "2", "--out", str(tmp_path)]
    assert main(["quality", "--bundle", str(bundle), *options]) == 0
    page = (tmp_path / "report.md").read_text()
    assert "| reference | 75 | 75 | 70 | 125, unguided | 5, unguided |" in page
    assert "| draft | 6 | 4 | 6 | 3, unguided | 1, unguided |" in page
    assert "| reference | 19.7 |" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fast,best"], "--presets best; allowed: all, reference, quick, fast, draft"),
        (
            ["fast,draft", "--reference", "x"],
            "--reference goes with one --preset; --presets are compared with the first",
        ),
    ],
)
def test_presets_that_cannot_be_compared_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["quality", "--presets", *arguments]) == 1
    assert message in capsys.readouterr().err
