"""The ruler: the judge on clips whose content is known, the control, distances, and a whole run on such clips."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import quality
from bench.quality import bootstrap, feature_distance, flicker, ssim, wilson
from engines.errors import OutputError, SettingsError
from export.demo.captions import held_out
from export.demo.faithfulness import (
    PROMPTS_FILE,
    Prompt,
    faithfulness,
    load_prompts,
    make_prompts,
    training_prompts,
)
from export.demo.judge import Reading, read
from runtime.config import Settings
from runtime.ops import Frames, clip_to_frames, psnr, resize_frames
from runtime.pipeline import Show1Pipeline

PROMPTS = load_prompts(16)


def draw(prompt: Prompt, size: tuple[int, int] = (288, 160), every: int = 1) -> Frames:
    """The true video of a prompt, at half size."""
    torch = pytest.importorskip("torch", reason="needs the export extra")
    from export.demo.scenes import lay_out, render

    clip = render(lay_out([prompt.scene], prompt.seed), torch.arange(0.0, 29.0, every)[None], size)[0]
    return ((clip * 0.5 + 0.5) * 255).byte().permute(1, 2, 3, 0).numpy()


@pytest.fixture(scope="module")
def videos() -> list[Frames]:
    return [draw(prompt) for prompt in PROMPTS]


def test_the_committed_prompts_are_those_that_training_never_sees() -> None:
    assert PROMPTS_FILE.read_text(encoding="utf-8") == make_prompts()
    assert all(held_out(thing) for prompt in load_prompts() for thing in prompt.scene.things)


def test_prompts_to_choose_by_are_of_combinations_that_training_shows() -> None:
    prompts = training_prompts(96)
    assert not any(held_out(thing) for prompt in prompts for thing in prompt.scene.things)
    assert len({prompt.seed for prompt in prompts}) == 96
    assert 38 <= sum(len(prompt.scene.things) == 2 for prompt in prompts) <= 58
    assert training_prompts(5) == prompts[:5] and training_prompts() == prompts[:48]
    with pytest.raises(SettingsError, match=r"--prompts 1; allowed: 2 or more"):
        training_prompts(1)


@pytest.mark.torch
def test_true_videos_are_read_right_and_other_prompts_near_chance(videos: list[Frames]) -> None:
    result = faithfulness([prompt.scene for prompt in PROMPTS], [read(video) for video in videos])
    assert result.score == 1.0
    assert result.right == result.asked
    # 7 colours beside the background's, 5 shapes, 15 motions, 6 backgrounds, asked of the better of two pairings.
    assert result.chance_score < 0.25
    assert result.chance["direction"] < 0.15


@pytest.mark.torch
def test_true_key_frames_are_read_right_when_enlarged() -> None:
    readings = [read(resize_frames(draw(prompt, (64, 40), every=4), (288, 160))) for prompt in PROMPTS]
    assert faithfulness([prompt.scene for prompt in PROMPTS], readings).score == 1.0


@pytest.mark.torch
def test_key_frames_alone_are_those_of_the_video(bundle: Path) -> None:
    settings = Settings(size=(112, 64), keyframes=2).with_preset("draft")
    clips: dict[str, Any] = {}
    with Show1Pipeline.from_bundle(bundle) as pipeline:
        alone = quality.make_keyframes(pipeline, PROMPTS[0], settings)
        pipeline(PROMPTS[0].prompt, seed=PROMPTS[0].seed, settings=settings, on_clip=clips.__setitem__)
    np.testing.assert_array_equal(alone, resize_frames(clip_to_frames(clips["base"]), (112, 64)))


@pytest.mark.torch
def test_the_judge_bears_blur_and_noise(videos: list[Frames]) -> None:
    random = np.random.default_rng(0)
    spoiled = []
    for video in videos:
        soft = sum(np.roll(video.astype(np.float32), shift, axis=(1, 2)) for shift in (-2, -1, 0, 1, 2)) / 5
        spoiled.append((soft + random.normal(0, 12, soft.shape)).clip(0, 255).astype(np.uint8))
    assert faithfulness([prompt.scene for prompt in PROMPTS], [read(video) for video in spoiled]).score > 0.9


def test_the_table_tells_one_thing_from_two() -> None:
    scenes = [prompt.scene for prompt in PROMPTS[:8]]
    assert [len(scene.things) for scene in scenes] == [1, 1, 1, 2, 1, 1, 1, 2]
    result = faithfulness(scenes, [Reading((), scene.background) for scene in scenes])  # right alone in that
    table = quality.faithfulness_table(result)
    rows = {row[0]: row for row in table.rows}
    assert rows["faithfulness, 1 thing"][1:3] == ["6 videos", "25 %"]
    assert rows["faithfulness, 2 things"][1:3] == ["2 videos", "14 %"]
    assert list(table.headers[-2:]) == ["of 1 thing", "of 2 things"]
    assert rows["background"][-2:] == ["6 / 6", "2 / 2"] and rows["shape"][-2:] == ["0 / 6", "0 / 4"]


@pytest.mark.torch
def test_what_is_there_for_a_part_of_the_video_is_not_counted(videos: list[Frames]) -> None:
    video = videos[0].copy()
    assert len(read(video).things) == 1
    video[12:] = video[0, 0, 0]  # its background
    assert read(video).things == ()


@pytest.mark.parametrize("level", [0, 128, 255])
def test_an_empty_video_shows_nothing(level: int) -> None:
    assert read(np.full((29, 160, 288, 3), level, np.uint8)).things == ()


def test_noise_is_not_taken_for_what_was_asked() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (29, 160, 288, 3)).astype(np.uint8)
    assert faithfulness([prompt.scene for prompt in PROMPTS], [read(noise)] * len(PROMPTS)).score < 0.25


def test_intervals_hold_the_share_and_narrow_with_more_questions() -> None:
    low, high = wilson(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)  # Wilson (1927), 95 %
    assert wilson(800, 1000)[1] - wilson(800, 1000)[0] < high - low
    assert wilson(10, 10)[1] == pytest.approx(1)
    low, high = bootstrap([0.0, 1.0] * 50)
    assert 0.38 < low < 0.5 < high < 0.62


def test_distances_of_known_pairs() -> None:
    random = np.random.default_rng(0)
    clip = random.integers(0, 200, (3, 32, 48, 3)).astype(np.uint8)
    assert psnr(clip, clip) == float("inf")
    assert ssim(clip, clip) == pytest.approx(1)
    assert feature_distance(clip, clip) == 0
    assert psnr(clip, clip + np.uint8(5)) == pytest.approx(20 * np.log10(255 / 5))
    near, far = clip + np.uint8(5), random.integers(0, 200, clip.shape).astype(np.uint8)
    assert ssim(clip, near) > 0.95 > 0.2 > ssim(clip, far)
    assert feature_distance(clip, near) < 0.05 < 0.5 < feature_distance(clip, far)


def test_flicker_leaves_steady_change_out() -> None:
    steady = np.arange(0, 60, 6, dtype=np.uint8)[:, None, None, None] + np.zeros((10, 8, 8, 3), np.uint8)
    assert flicker(steady) == pytest.approx(0, abs=1e-3)
    flashing = np.where(np.arange(10) % 2, 100, 104).astype(np.uint8)[:, None, None, None] + np.zeros_like(steady)
    assert flicker(flashing) == pytest.approx(8, abs=1e-3)


def gray(prompt: Prompt) -> Frames:
    return np.full((5, 64, 112, 3), 128, np.uint8)


def test_a_clip_keeps_the_conditions_that_it_was_made_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moment = {"date": "2026-11-20 08:00 UTC", "load_average_1min": 0.5}
    monkeypatch.setattr(quality, "describe_moment", lambda: moment)
    monkeypatch.setattr(quality, "_commit", lambda: "aaaa")
    quality.run_quality(PROMPTS[:2], gray, tmp_path)
    moment |= {"date": "2026-11-21 09:30 UTC", "load_average_1min": 2.25}
    monkeypatch.setattr(quality, "_commit", lambda: "bbbb + changes")
    rows = quality.run_quality(PROMPTS[:3], gray, tmp_path)["videos"]
    assert [row["commit"] for row in rows] == ["aaaa", "aaaa", "bbbb + changes"]
    assert [row["load_average_1min"] for row in rows] == [0.5, 0.5, 2.25]
    span = ["2026-11-20 08:00 UTC to 2026-11-21 09:30 UTC", "0.5 to 2.25", "aaaa, bbbb + changes"]
    assert quality.clips_table({"draft": rows}).rows == [["draft", "3", *span]]


def test_what_is_not_known_of_a_clip_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "describe_moment", lambda: {"date": "2026-11-20 08:00 UTC", "load_average_1min": None})
    monkeypatch.setattr(quality, "_commit", lambda: None)
    quality.run_quality(PROMPTS[:2], gray, tmp_path)
    rows = quality.run_quality(PROMPTS[:2], pytest.fail, tmp_path)["videos"]
    assert quality.clips_table({"all": rows}).rows == [["all", "2", "2026-11-20 08:00 UTC", "unknown", "unknown"]]
    rows[0] |= {"load_average_1min": 0.5, "commit": "aaaa"}
    assert quality.clips_table({"all": rows}).rows[0][3:] == ["0.5, unknown", "aaaa, unknown"]
    assert quality.describe_clips(tmp_path) == {"commit": None}


@pytest.mark.parametrize("left_out", ["maker", "seconds", "conditions"])
def test_a_clip_that_does_not_say_how_it_was_made_is_refused(tmp_path: Path, left_out: str) -> None:
    quality.run_quality(PROMPTS[:2], gray, tmp_path)
    kept = dict(np.load(quality.clip_file(tmp_path, 0)))
    del kept[left_out]
    np.savez_compressed(quality.clip_file(tmp_path, 0), **kept)
    refused = r"00\.npz is not a clip of this command \(KeyError\)\. Move it away"
    with pytest.raises(OutputError, match=refused):
        quality.run_quality(PROMPTS[:2], pytest.fail, tmp_path)
    with pytest.raises(OutputError, match=refused):
        quality.describe_clips(tmp_path)


@pytest.mark.torch
def test_a_run_keeps_clips_continues_and_compares(tmp_path: Path, videos: list[Frames]) -> None:
    prompts, made = PROMPTS[:3], []

    def make(prompt: Prompt) -> Frames:
        made.append(prompt.prompt)
        return videos[PROMPTS.index(prompt)]

    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    quality.run_quality(prompts[:2], make, first)
    result = quality.run_quality(prompts, make, first)
    assert made == [prompt.prompt for prompt in prompts]
    assert result["faithfulness"].score == 1.0
    assert (first / "sheet-0.png").is_file()
    assert "psnr" not in result["videos"][0]

    against = quality.run_quality(prompts, make, second, reference=first)
    assert [row["ssim"] for row in against["videos"]] == pytest.approx([1, 1, 1])
    text = quality.distance_table(against["videos"]).as_markdown()
    assert "| PSNR to reference, dB | equal | equal |" in text
    assert "faithfulness" in quality.faithfulness_table(against["faithfulness"]).as_text()
    kept = json.loads(json.dumps(quality.json_rows(against["videos"]), allow_nan=False))
    assert [row["psnr"] for row in kept] == ["equal"] * 3 and kept[0]["ssim"] == against["videos"][0]["ssim"]
    assert quality.describe_clips(first)["commit"] == against["videos"][0]["commit"]
    quality.run_quality(prompts[:2], make, second)
    (second / "sheet-1.png").touch()  # of a run of more prompts
    quality.run_quality(prompts, make, second)
    assert [path.name for path in second.glob("sheet-*")] == ["sheet-0.png"]
    with pytest.raises(OutputError, match=r"are both .*second: distances would be to itself"):
        quality.run_quality(prompts, make, second, reference=second)
    with pytest.raises(OutputError, match=r"first: no 03\.npz"):
        quality.run_quality(PROMPTS[:4], make, second, reference=first)
    with pytest.raises(OutputError, match="another prompt or seed"):
        quality.run_quality(PROMPTS[1:3], make, second)
    (third := tmp_path / "third").mkdir()
    with pytest.raises(OutputError, match="another prompt or seed"):
        quality.run_quality(PROMPTS[1:3], pytest.fail, third, reference=first)
    for number, part in enumerate((np.s_[:2], np.s_[:, ::2])):
        (other := tmp_path / str(number)).mkdir()
        with pytest.raises(OutputError, match=r"00\.npz has frames of .* Give the --video and --keyframes"):
            quality.run_quality(prompts, lambda prompt, part=part: make(prompt)[part], other, reference=first)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a foreign file", b"\x93NUMPY"])
def test_a_file_that_is_no_clip_is_refused(tmp_path: Path, content: bytes) -> None:
    quality.clip_file(tmp_path, 0).write_bytes(content)
    with pytest.raises(OutputError, match=r"00\.npz is not a clip of this command .*Move it away"):
        quality.run_quality(PROMPTS[:2], pytest.fail, tmp_path)
    with pytest.raises(OutputError, match=r"no 00\.npz\. Give the --out of another run"):
        quality.describe_clips(tmp_path / "nowhere")


def test_a_damaged_clip_is_refused(tmp_path: Path) -> None:
    quality.run_quality(PROMPTS[:2], gray, tmp_path)
    clip = quality.clip_file(tmp_path, 0)
    content = bytearray(clip.read_bytes())
    name = content.index(b"frames.npy")
    header = name - 30  # of a zip's member: the length of what follows the name is its last number
    content[name + 10 + int.from_bytes(content[header + 28 : name], "little")] = 0xFF  # no kind of block
    clip.write_bytes(content)
    with pytest.raises(OutputError, match=r"00\.npz is not a clip of this command \(error\)"):
        quality.run_quality(PROMPTS[:2], pytest.fail, tmp_path)


def test_sheets_are_in_their_order(tmp_path: Path) -> None:
    for number in (10, 2, 0):
        (tmp_path / f"sheet-{number}.png").touch()
    assert [sheet.name for sheet in quality.sheets(tmp_path)] == ["sheet-0.png", "sheet-2.png", "sheet-10.png"]


def test_a_clip_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"00\.npz: cannot be written .*Choose another --out"):
        quality.run_quality(PROMPTS[:2], gray, tmp_path / "nowhere")


def test_the_median_of_an_equal_video_and_another_is_not_equal() -> None:
    assert quality.middle([20.0, math.inf]) == 20.0
    assert quality.middle([20.0, math.inf, math.inf]) == math.inf
    assert quality.middle([20.0, 30.0]) == 25.0
    assert quality.middle([20.0, 30.0, 40.0, math.inf]) == 35.0


def test_the_worst_video_is_the_least_like_the_reference_and_the_one_that_flickers_most() -> None:
    measures = ("flicker", "psnr", "ssim", "feature_distance")
    rows = [dict.fromkeys(measures, value) for value in (0.25, 0.5, 1.0)]
    table = quality.distance_table(rows)
    assert [row[1:] for row in table.rows] == [["0.500", w] for w in ("1.00", "0.250", "0.250", "1.00")]


def test_a_prompt_count_out_of_range_is_refused() -> None:
    with pytest.raises(SettingsError, match="--prompts 1; allowed: 2 to 48"):
        load_prompts(1)
