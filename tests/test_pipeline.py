"""The cascade over the golden bundle: what batches, windows, seeds and settings do, and what is refused first."""

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from engines.errors import BundleError, EngineError, ProfileError, SettingsError, Show1Error
from engines.store import Bundle
from runtime.config import DIFFUSION_STAGES, NEGATIVE_PROMPT, Settings
from runtime.engine import EnginePool
from runtime.noise import NoiseStream
from runtime.ops import FloatArray, clip_to_frames
from runtime.pipeline import Show1Pipeline, Video, check_finite, check_run
from runtime.sampler import guidance_scales, whole_steps
from runtime.schedulers import make_schedule
from runtime.stages import interp, sr1
from runtime.stages.base import run_base
from runtime.stages.diffusion import PromptEmbeds, scheduler_of
from runtime.stages.interp import fill_gaps, run_interp
from runtime.stages.sr1 import run_if2, run_sr1
from runtime.stages.sr2 import run_sr2
from runtime.stages.text import run_clip_text, run_text

PROMPT = "a panda taking a selfie"
SEED = 345

# The smallest video in the reference's ratios: key frames of 16 x 8, 5 frames of 112 x 64, one or two steps per stage.
DRAFT = Settings(size=(112, 64), keyframes=2).with_steps({"base": 2, "interp": 2, "if2": 2, "sr1": 1, "sr2": 2})


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Iterator[Show1Pipeline]:
    with Show1Pipeline.from_bundle(bundle, keep_loaded=True) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def text(pipeline: Show1Pipeline) -> PromptEmbeds:
    return run_text(pipeline.engines, PROMPT)


@pytest.fixture(scope="module")
def video(pipeline: Show1Pipeline) -> Video:
    return pipeline(PROMPT, seed=SEED, settings=DRAFT)


def clip_of(frames: int, height: int = 8, width: int = 16) -> FloatArray:
    """Something smooth to work on, [1, 3, F, H, W] in [-1, 1]."""
    axes = np.meshgrid(*(np.linspace(0, 3, n) for n in (3, frames, height, width)), indexing="ij")
    return np.sin(sum(axes))[None].astype(np.float32)


# Interpolation


@pytest.mark.parametrize("guided", [(0.0, 1.0), (0.0, 0.5)])
def test_gaps_in_one_batch_are_what_they_are_one_by_one(
    pipeline: Show1Pipeline, text: PromptEmbeds, guided: tuple[float, float]
) -> None:
    settings = DRAFT.with_guided({"interp": guided})
    keyframes = NoiseStream(7).normal((3, 8, 8, 16))
    together = fill_gaps(pipeline.engines, text, keyframes, settings, SEED)
    assert together.shape == (7, 3, 5, 8, 16)
    for gap in range(7):
        alone = fill_gaps(pipeline.engines, text, keyframes[:, gap : gap + 2], settings, SEED)
        np.testing.assert_allclose(together[gap], alone[0], rtol=0, atol=1e-5, err_msg=f"gap {gap}")


def test_more_gaps_than_the_engine_takes_at_once_are_split(
    pipeline: Show1Pipeline, text: PromptEmbeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyframes = NoiseStream(7).normal((3, 6, 8, 16))
    together = fill_gaps(pipeline.engines, text, keyframes, DRAFT, SEED)
    steps: list[tuple[str, int, int]] = []
    with pipeline.engines.use("interp") as engine:
        batch = engine.specs["step"].profile["batch"]
        monkeypatch.setitem(engine.specs["step"].profile, "batch", replace(batch, min=1, opt=4, max=4))
        split = fill_gaps(pipeline.engines, text, keyframes, DRAFT, SEED, progress=lambda *done: steps.append(done))
    np.testing.assert_allclose(split, together, rtol=0, atol=1e-5)
    # 5 gaps, guided, in batches of 2, 2 and 1, with two steps each
    assert steps == [("interp", done, 6) for done in range(1, 7)]


@pytest.mark.parametrize("cache", [1, 2])
def test_large_samples_are_run_one_after_the_other_and_give_the_same(
    pipeline: Show1Pipeline, text: PromptEmbeds, monkeypatch: pytest.MonkeyPatch, cache: int
) -> None:
    settings = DRAFT.with_cache({"base": cache})
    together = run_base(pipeline.engines, text, settings, SEED)
    batches: list[int] = []
    calls: list[str] = []
    with pipeline.engines.use("base") as engine:
        monkeypatch.setattr(engine, "on_call", lambda graph, *_: calls.append(graph))
        for graph in ("step", "shallow"):
            runner, profile = engine._runner(graph), engine.specs[graph].profile
            for axis in ("height", "width"):
                monkeypatch.setitem(profile, axis, replace(profile[axis], opt=profile[axis].min))

            def infer(feeds: Any, wanted: Any = None, original: Any = runner.infer) -> Any:
                batches.append(len(feeds["sample"]))
                return original(feeds, wanted)

            monkeypatch.setattr(runner, "infer", infer)
        apart = run_base(pipeline.engines, text, settings, SEED)
    np.testing.assert_allclose(apart, together, rtol=0, atol=1e-5)
    assert batches == [1, 1, 1, 1]  # two steps of a sample and its negative
    assert calls == ["context", "step", "step" if cache == 1 else "shallow"], "which are one call each to who counts"


@pytest.mark.parametrize(("samples", "expected"), [(3, [3, 3, 2]), (0.5, [1] * 8), (np.inf, [8])])
def test_on_a_cpu_samples_that_fill_it_are_run_one_after_the_other_and_on_a_gpu_together(
    pipeline: Show1Pipeline,
    text: PromptEmbeds,
    monkeypatch: pytest.MonkeyPatch,
    samples: float,
    expected: list[int],
) -> None:
    batches: list[int] = []
    keyframes = clip_of(5)
    together = run_interp(pipeline.engines, text, keyframes, DRAFT, SEED)
    with pipeline.engines.use("interp") as engine:
        runner = engine._runner("step")
        monkeypatch.setattr(runner, "positions_at_once", samples * 5 * keyframes[0, 0, 0].size)

        def infer(feeds: Any, wanted: Any = None, original: Any = runner.infer) -> Any:
            batches.append(len(feeds["sample"]))
            return original(feeds, wanted)

        monkeypatch.setattr(runner, "infer", infer)
        apart = run_interp(pipeline.engines, text, keyframes, DRAFT, SEED)
    np.testing.assert_allclose(apart, together, rtol=0, atol=1e-5)
    assert batches == expected * 2  # in two steps, of four gaps and their negatives


def test_samples_at_once_are_as_many_as_are_tuned_for(bundle: Path) -> None:
    spec = Bundle.open(bundle).engine("interp").graphs["step"].spec
    assert spec.samples_at_once(frames=5, height=40, width=64) == 14
    assert spec.samples_at_once(frames=5, height=80, width=128) == 3
    assert spec.samples_at_once(frames=5, height=1024, width=1024) == 1


def test_a_clip_is_the_gaps_side_by_side_with_shared_ends_once(pipeline: Show1Pipeline, text: PromptEmbeds) -> None:
    keyframes = clip_of(3)
    clip = run_interp(pipeline.engines, text, keyframes, DRAFT, SEED)
    gaps = fill_gaps(pipeline.engines, text, keyframes[0], DRAFT, SEED)
    assert clip.shape == (1, 3, 9, 8, 16)
    np.testing.assert_array_equal(clip[0, :, :4], gaps[0, :, :4])
    np.testing.assert_array_equal(clip[0, :, 4:], gaps[1])


# Windows


@pytest.mark.parametrize(
    ("frames", "window", "expected"),
    [
        (1, 8, [(0, 1)]),
        (5, 8, [(0, 5)]),
        (8, 8, [(0, 8)]),
        (9, 8, [(0, 8), (7, 9)]),
        (17, 8, [(0, 8), (7, 15), (14, 17)]),
        (29, 8, [(0, 8), (7, 15), (14, 22), (21, 29)]),
        (5, 2, [(0, 2), (1, 3), (2, 4), (3, 5)]),
    ],
)
def test_windows_share_a_frame_and_the_last_may_be_shorter(
    monkeypatch: pytest.MonkeyPatch, frames: int, window: int, expected: list[tuple[int, int]]
) -> None:
    seen: list[tuple[int, int]] = []
    first_frames: list[float] = []

    def upscale(bundle: Any, name: str, unet: Any, clip: FloatArray, first_frame: FloatArray, *_: Any) -> FloatArray:
        """Frame number n of window w becomes 100 w + n."""
        numbers = clip[0, 0, :, 0, 0]
        first_frames.append(first_frame.max())
        out = np.empty((1, 3, len(numbers), 32, 64), np.float32)
        out[:] = (100 * len(seen) + numbers)[:, None, None]
        seen.append((int(numbers[0]), int(numbers[-1]) + 1))
        return out

    monkeypatch.setattr(sr1, "upscale", upscale)
    monkeypatch.setattr(sr1, "prompted", lambda *_, **__: None)
    pool: Any = SimpleNamespace(bundle=None, use=lambda name: nullcontext())
    clip = np.broadcast_to(np.arange(frames, dtype=np.float32)[:, None, None], (1, 3, frames, 8, 16))
    out = run_sr1(pool, None, clip, np.full((1, 3, 1, 32, 64), -1, np.float32), replace(DRAFT, sr1_window=window), SEED)

    assert seen == expected
    # Each window starts on the last frame of the one before, and makes that frame anew.
    assert first_frames == [-1, *(100 * number + end - 1 for number, (_, end) in enumerate(expected[:-1]))]
    owner = [max(number for number, (start, end) in enumerate(expected) if start <= n < end) for n in range(frames)]
    np.testing.assert_array_equal(out[0, 0, :, 0, 0], [100 * window + n for n, window in enumerate(owner)])


def test_a_partial_last_window_changes_nothing_before_it(pipeline: Show1Pipeline, text: PromptEmbeds) -> None:
    settings = replace(DRAFT, sr1_window=4)
    clip, first_frame = clip_of(6), clip_of(1, 32, 64)
    whole = run_sr1(pipeline.engines, text, clip, first_frame, settings, SEED)  # windows of 4 and 3 frames
    start = run_sr1(pipeline.engines, text, clip[:, :, :4], first_frame, settings, SEED)
    assert whole.shape == (1, 3, 6, 32, 64)
    np.testing.assert_array_equal(whole[:, :, :3], start[:, :, :3])
    end = run_sr1(pipeline.engines, text, clip[:, :, 3:], start[:, :, 3:], settings, SEED)
    np.testing.assert_array_equal(whole[:, :, 3:], end)


def test_n_keyframes_give_four_times_n_minus_one_plus_one_frames(pipeline: Show1Pipeline) -> None:
    settings = replace(DRAFT, keyframes=5).with_steps({"base": 1, "interp": 1, "if2": 1})
    video = pipeline(PROMPT, settings=settings)
    assert video.frames.shape == (17, 64, 112, 3)
    assert video.clip.shape == (1, 3, 17, 64, 112)
    assert np.isfinite(video.clip).all()


# Prompts, seeds, guidance


def test_a_seed_gives_the_same_video_again_and_another_seed_another(pipeline: Show1Pipeline, video: Video) -> None:
    np.testing.assert_array_equal(pipeline(PROMPT, seed=SEED, settings=DRAFT).clip, video.clip)
    assert np.abs(pipeline(PROMPT, seed=SEED + 1, settings=DRAFT).clip - video.clip).max() > 0.1


def test_without_guidance_each_network_sees_the_prompt_alone(pipeline: Show1Pipeline, video: Video) -> None:
    settings = DRAFT.with_guidance(dict.fromkeys(DIFFUSION_STAGES, 1.0))
    unguided = pipeline(PROMPT, settings=settings)
    assert unguided.clip.shape == video.clip.shape
    assert np.abs(unguided.clip - video.clip).max() > 0.01
    # Nobody reads the negative prompt now.
    other = pipeline(PROMPT, negative_prompt="bright", settings=settings)
    np.testing.assert_array_equal(other.clip, unguided.clip)


def test_guidance_in_no_step_is_no_guidance(pipeline: Show1Pipeline) -> None:
    by_part = pipeline(PROMPT, settings=DRAFT.with_guided(dict.fromkeys(DIFFUSION_STAGES, (0.0, 0.0))))
    by_scale = pipeline(PROMPT, settings=DRAFT.with_guidance(dict.fromkeys(DIFFUSION_STAGES, 1.0)))
    # Rounding: the prompt was projected beside the negative one or alone, and frames are cut to 8 bits on the way.
    np.testing.assert_allclose(by_part.clip, by_scale.clip, rtol=0, atol=2e-3)


@pytest.mark.parametrize("change", [{"prompt": "a toad"}, {"negative_prompt": "bright"}])
def test_both_prompts_change_the_video(pipeline: Show1Pipeline, video: Video, change: dict[str, str]) -> None:
    other = pipeline(**{"prompt": PROMPT, **change}, seed=SEED, settings=DRAFT)
    assert np.abs(other.clip - video.clip).max() > 1e-3


def test_a_prompt_that_is_too_long_is_cut_and_the_cut_reported(pipeline: Show1Pipeline) -> None:
    prompt = " ".join(f"Panda{number}" for number in range(80))
    cuts: list[tuple[str, str]] = []
    settings = DRAFT.with_steps({"base": 1, "interp": 1, "if2": 1})
    video = pipeline(prompt, settings=settings, on_cut=lambda encoder, text: cuts.append((encoder, text)))
    assert [encoder for encoder, _ in cuts] == ["T5", "CLIP"]
    assert dict(cuts) == video.cut
    for text in video.cut.values():
        assert prompt.lower().endswith(text.lower()) and len(text) < len(prompt)
    np.testing.assert_array_equal(
        run_text(pipeline.engines, prompt).prompt, run_text(pipeline.engines, prompt + " and more").prompt
    )
    cuts.clear()
    run_clip_text(pipeline.engines, "a panda", prompt, lambda reader, text: cuts.append((reader, text)))
    assert [reader for reader, _ in cuts] == ["CLIP, negative prompt"]


@pytest.mark.parametrize("prompt", ["", "   \n\t", "\udcff caf\udce9"])
def test_a_prompt_that_says_nothing_is_refused_before_any_engine_runs(bundle: Path, prompt: str) -> None:
    assert_refused(bundle, SettingsError, r"the prompt is (empty\. Say what|not valid text .*UTF-8)", prompt=prompt)


def test_a_negative_prompt_that_is_no_text_is_refused_before_any_engine_runs(bundle: Path) -> None:
    message = "the negative prompt is not valid text .*UTF-8"
    assert_refused(bundle, SettingsError, message, negative_prompt="bl\udcff")


# Refused before any engine runs


def assert_refused(
    bundle: Path | Bundle,
    kind: type[Show1Error],
    message: str,
    prompt: str = PROMPT,
    settings: Settings = DRAFT,
    **options: Any,
) -> None:
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    loaded = patch.object(EnginePool, "open", side_effect=AssertionError("an engine was loaded before"))
    with EnginePool(opened) as engines, loaded, pytest.raises(kind, match=message):
        Show1Pipeline(engines)(prompt, settings=settings, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (8192, 64)}, r"if2/step: width 3648 \(built for 4\.\.1024 in steps of 4\)\. .*--size 8192x64"),
        ({"size": (112, 1288)}, r"vae_encoder/encode: height 1288 \(built for 4\.\.1280 in steps of 4\)"),
        ({"keyframes": 65}, r"base/step: frames 65 \(built for 1\.\.64\)\. Ask for .* that fit\.$"),
        ({"sr1_window": 33, "keyframes": 20}, r"sr1/step: frames 33 \(built for 1\.\.32\)"),
    ],
)
def test_sizes_out_of_an_engines_profile_are_refused_before_any_engine_runs(
    bundle: Path, changes: dict[str, Any], message: str
) -> None:
    assert_refused(bundle, ProfileError, message, settings=replace(DRAFT, **changes))


def test_a_window_may_be_longer_than_the_clip(bundle: Path) -> None:
    check_run(Bundle.open(bundle), replace(DRAFT, sr1_window=40))


@pytest.mark.parametrize("name", ["if2_noise_level", "sr1_noise_level"])
def test_noise_levels_that_no_schedule_has_are_refused(bundle: Path, name: str) -> None:
    assert_refused(bundle, SettingsError, f"{name}: 1000; allowed: 0 to 999", settings=replace(DRAFT, **{name: 1000}))


def test_a_stage_that_overflowed_is_named(pipeline: Show1Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.pipeline.run_base", lambda *_, **__: np.full((1, 3, 2, 8, 16), np.nan, np.float32))
    with pytest.raises(
        EngineError, match=r"base: its fp32 engines made values that are not finite\. `python -m export"
    ):
        pipeline(PROMPT, settings=DRAFT)


@pytest.mark.parametrize("network", ["t5", "clip"])
def test_a_text_encoder_that_overflowed_is_named(
    pipeline: Show1Pipeline, monkeypatch: pytest.MonkeyPatch, network: str
) -> None:
    broken = np.full((1, 77, 64), np.inf, np.float32)
    name = {"t5": "run_text", "clip": "run_clip_text"}[network]
    monkeypatch.setattr(f"runtime.pipeline.{name}", lambda *_: PromptEmbeds(broken, broken))
    with pytest.raises(EngineError, match=f"{network}: its fp32 engines made values that are not finite"):
        pipeline(PROMPT, settings=DRAFT)


def test_an_overflow_in_half_precision_comes_with_the_command_for_float32(bundle: Path) -> None:
    half = with_engine(Bundle.open(bundle), "base", precision="fp16")
    with pytest.raises(EngineError, match=r"base: its fp16 .* `python -m export build .* --precision fp32 "):
        check_finite(half, "base", np.float32([np.inf]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"base": {"steps": 3}},
        {"base": {}},
        {"base": {**DRAFT.to_dict()["base"], "guided": [0.5]}},
        {"base": {**DRAFT.to_dict()["base"], "num_inference_steps": "75"}},
        {"size": 576},
        {"size": [576]},
        {"keyframes": "8"},
        {"strength": None},
    ],
)
def test_settings_that_cannot_be_read_are_the_bundles_fault(bundle: Path, wrong: dict[str, Any]) -> None:
    opened = Bundle.open(bundle)
    other = Bundle(opened.root, replace(opened.manifest, defaults={**opened.manifest.defaults, **wrong}))
    with pytest.raises(BundleError, match=r"its settings: .*Build the bundle again"):
        Show1Pipeline(EnginePool(other))


@pytest.mark.parametrize("stage", DIFFUSION_STAGES)
@pytest.mark.parametrize("steps", [1001, 10**6])
def test_steps_out_of_range_are_refused_with_the_name_of_the_stage(bundle: Path, stage: str, steps: int) -> None:
    assert_refused(bundle, SettingsError, rf"{stage}: .*{steps}", settings=DRAFT.with_steps({stage: steps}))


def test_settings_are_settings(pipeline: Show1Pipeline) -> None:
    for wrong in ({}, "draft"):
        with pytest.raises(SettingsError, match=r"allowed: runtime\.config\.Settings"):
            pipeline("a panda", settings=wrong)  # type: ignore[arg-type]


def test_threads_that_call_one_pipeline_wait_for_each_other(bundle: Path, video: Video) -> None:
    with Show1Pipeline.from_bundle(bundle) as pipeline, ThreadPoolExecutor(3) as pool:
        steps: list[int] = []

        def make(number: int) -> Video:
            return pipeline(PROMPT, seed=SEED, settings=DRAFT, progress=lambda *_: steps.append(number))

        for made in pool.map(make, range(3)):
            np.testing.assert_array_equal(made.frames, video.frames)
    assert sum(before != after for before, after in pairwise(steps)) == 2, "one video after the other"


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range_are_refused(bundle: Path, seed: int) -> None:
    assert_refused(bundle, SettingsError, f"seed is {seed}; allowed: 0 to", seed=seed)


def without(bundle: Bundle, part: str, name: str) -> Bundle:
    parts = {key: value for key, value in getattr(bundle.manifest, part).items() if key != name}
    return Bundle(bundle.root, replace(bundle.manifest, **{part: parts}))


def with_engine(bundle: Bundle, name: str, **changes: Any) -> Bundle:
    engines = {**bundle.manifest.engines, name: replace(bundle.engine(name), **changes).sealed()}
    return Bundle(bundle.root, replace(bundle.manifest, engines=engines))


@pytest.mark.parametrize("name", ["t5", "sr1", "vae_decoder"])
def test_a_missing_engine_is_named_before_any_engine_runs(bundle: Path, name: str) -> None:
    assert_refused(without(Bundle.open(bundle), "engines", name), BundleError, f"engine {name} is missing.*Add it with")


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_a_missing_tokenizer_is_named_before_any_engine_runs(bundle: Path, name: str) -> None:
    assert_refused(without(Bundle.open(bundle), "tokenizers", name), BundleError, f"tokenizer {name} is missing")


@pytest.mark.parametrize("name", ["base", "sr2", "if2.noising", "sr1.noising"])
def test_a_missing_scheduler_is_named_before_any_engine_runs(bundle: Path, name: str) -> None:
    assert_refused(without(Bundle.open(bundle), "schedulers", name), BundleError, f"no scheduler for {name}")


@pytest.mark.parametrize("graph", ["plan", "weights"])
def test_a_missing_file_of_a_late_engine_is_named_before_any_engine_runs(
    bundle: Path, tmp_path: Path, graph: str
) -> None:
    broken = Bundle.open(shutil.copytree(bundle, tmp_path / "bundle"))
    lost = broken.path(getattr(broken.engine("vae_decoder").graphs["decode"], graph))
    lost.unlink()
    assert_refused(broken, BundleError, rf"{re.escape(str(lost))} is missing or cut short\. `python -m export check")


def test_an_engine_that_was_edited_in_the_manifest_is_refused_before_any_engine_runs(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    edited = replace(opened.engine("sr2"), properties={})
    engines = {**opened.manifest.engines, "sr2": edited}
    broken = Bundle(opened.root, replace(opened.manifest, engines=engines))
    assert_refused(broken, BundleError, r"sr2: its part of the manifest has been changed\. Build it again: `python -m")


def test_a_late_engine_that_cannot_run_here_is_named_before_any_engine_runs(bundle: Path) -> None:
    for_cards = with_engine(Bundle.open(bundle), "vae_decoder", backend="tensorrt", backend_version="0.1")
    assert_refused(for_cards, BundleError, r"vae_decoder: (needs|built by) tensorrt 0\.1")


# Stages and the pipeline around them


def test_the_pipeline_is_its_stages_called_one_after_another(pipeline: Show1Pipeline, video: Video) -> None:
    engines = pipeline.engines
    text = run_text(engines, PROMPT)
    assert text.prompt.shape == text.negative.shape == (1, 77, 64)
    keyframes = run_base(engines, text, DRAFT, SEED)
    assert keyframes.shape == (1, 3, 2, 8, 16)
    clip = run_interp(engines, text, keyframes, DRAFT, SEED)
    assert clip.shape == (1, 3, 5, 8, 16)
    first_frame = run_if2(engines, text, clip[:, :, :1], DRAFT, SEED)
    assert first_frame.shape == (1, 3, 1, 32, 64)
    clip = run_sr1(engines, text, clip, first_frame, DRAFT, SEED)
    assert clip.shape == (1, 3, 5, 32, 64)
    latent_text = run_clip_text(engines, PROMPT, NEGATIVE_PROMPT)
    assert latent_text.prompt.shape == latent_text.negative.shape == (1, 77, 32)
    clip = run_sr2(engines, latent_text, clip_to_frames(clip), DRAFT, SEED)
    assert clip.dtype == np.float32
    np.testing.assert_array_equal(clip, video.clip)
    np.testing.assert_array_equal(clip_to_frames(clip), video.frames)


@pytest.mark.parametrize("hook", ["progress", "on_clip"])
def test_after_a_callback_that_fails_the_pipeline_makes_the_same_video(
    pipeline: Show1Pipeline, video: Video, hook: str
) -> None:
    with pytest.raises(ZeroDivisionError):
        pipeline(PROMPT, seed=SEED, settings=DRAFT, **{hook: lambda *_: 1 / 0})
    np.testing.assert_array_equal(pipeline(PROMPT, seed=SEED, settings=DRAFT).clip, video.clip)


def test_the_largest_video_that_is_promised_is_possible_and_none_beyond(pipeline: Show1Pipeline) -> None:
    """README's limits."""
    largest = replace(Settings(), size=(2304, 1280), keyframes=64)
    check_run(pipeline.engines.bundle, largest)
    for beyond in ({"size": (2368, 1280)}, {"size": (2304, 1344)}, {"keyframes": 65}):
        with pytest.raises((ProfileError, SettingsError)):
            check_run(pipeline.engines.bundle, replace(largest, **beyond))


def test_every_stage_reports_its_steps_and_its_clip(pipeline: Show1Pipeline) -> None:
    steps: dict[str, list[tuple[int, int]]] = {}
    clips: dict[str, tuple[int, ...]] = {}
    pipeline(
        PROMPT,
        settings=replace(DRAFT, keyframes=3),
        progress=lambda stage, done, total: steps.setdefault(stage, []).append((done, total)),
        on_clip=lambda stage, clip: clips.update({stage: clip.shape}),
    )
    totals = {"base": 2, "interp": 2, "if2": 2, "sr1": 2, "sr2": 1}  # sr1: one step in two windows; sr2: strength 0.8
    assert steps == {stage: [(done, total) for done in range(1, total + 1)] for stage, total in totals.items()}
    assert clips == {
        "base": (1, 3, 3, 8, 16),
        "interp": (1, 3, 9, 8, 16),
        "if2": (1, 3, 1, 32, 64),
        "sr1": (1, 3, 9, 32, 64),
        "sr2": (1, 3, 9, 64, 112),
    }


def test_every_stage_has_the_steps_that_were_asked_of_it(
    pipeline: Show1Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {**dict.fromkeys(DIFFUSION_STAGES, 3), "sr2": 4}
    settings = DRAFT.with_steps(counts).with_spacing(dict.fromkeys(counts, "logsnr"))
    settings = settings.with_cache(dict.fromkeys(counts, 2)).with_guided(dict.fromkeys(counts, (0.0, 0.5)))
    seen: dict[str, list[tuple[str, int, int]]] = {stage: [] for stage in counts}

    def note(stage: str, graph: str, feeds: Any) -> None:
        if graph != "context":
            seen[stage].append((graph, int(feeds["timestep"][0]), len(feeds["sample"])))

    for stage in counts:
        with pipeline.engines.use(stage) as engine:
            monkeypatch.setattr(engine, "on_feeds", partial(note, stage))
    pipeline(PROMPT, settings=settings)
    for stage, count in counts.items():
        scheduler = scheduler_of(pipeline.engines.bundle, stage)
        timesteps = make_schedule(scheduler, count, 0.8 if stage == "sr2" else 1.0, "logsnr").timesteps
        guidance = guidance_scales(len(timesteps), 2.0, (0.0, 0.5))
        graphs = np.where(whole_steps(guidance, 2), "step", "shallow")
        assert seen[stage] == list(zip(graphs, timesteps, guidance, strict=True)), stage


def test_engines_built_before_features_could_be_reused_are_refused_where_that_is_asked(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    graphs = {name: graph for name, graph in opened.engine("sr1").graphs.items() if name != "shallow"}
    opened = with_engine(opened, "sr1", graphs=graphs)
    check_run(opened, DRAFT)
    with pytest.raises(BundleError, match=r"sr1: built before steps could reuse features: .*python -m export build"):
        check_run(opened, DRAFT.with_cache({"sr1": 2}))


def test_metadata_are_plain_json_from_which_the_settings_come_back(video: Video) -> None:
    about = json.loads(json.dumps(replace(video, seed=np.int64(SEED)).metadata()))
    assert about["prompt"] == PROMPT
    assert about["negative_prompt"] == NEGATIVE_PROMPT
    assert about["seed"] == SEED
    assert Settings.from_dict(about["settings"]) == DRAFT


@pytest.fixture
def runners(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Plans that are loaded at present, by the name of their engine's folder and their own."""
    from runtime import engine

    loaded: list[str] = []
    open_runner = engine.open_runner

    def noted(backend: str, plan: Path, *of: str) -> Any:
        opened, name = open_runner(backend, plan, *of), f"{plan.parent.name.partition('-')[0]}/{plan.stem}"
        loaded.append(name)
        return SimpleNamespace(infer=opened.infer, close=lambda: (loaded.remove(name), opened.close()))

    monkeypatch.setattr(engine, "open_runner", noted)
    return loaded


def test_engines_are_kept_until_the_pipeline_is_left_or_dropped_after_their_stage(
    bundle: Path, runners: list[str], text: PromptEmbeds
) -> None:
    with Show1Pipeline.from_bundle(bundle, keep_loaded=True) as keeping:
        run_base(keeping.engines, text, DRAFT, SEED)
        assert sorted(runners) == ["base/context", "base/step"]
        run_text(keeping.engines, PROMPT)
        assert sorted(runners) == ["base/context", "base/step", "t5/encode"]
    assert runners == []
    with Show1Pipeline.from_bundle(bundle) as dropping:
        run_base(dropping.engines, text, DRAFT, SEED)
        assert runners == []


def test_memory_is_returned_when_an_engine_has_been_loaded_and_when_it_was_dropped(
    bundle: Path, runners: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[int] = []
    monkeypatch.setattr("runtime.engine.return_memory", lambda: loaded.append(len(runners)))
    with EnginePool(Bundle.open(bundle)) as pool, pool.use("vae_decoder"):
        pass
    assert loaded == [1, 0]


def test_an_engine_in_use_outlives_another_use_inside(bundle: Path, runners: list[str], text: PromptEmbeds) -> None:
    calls: list[str] = []
    with EnginePool(Bundle.open(bundle)) as pool:
        with pool.use("base") as engine:
            engine.on_call = lambda graph, start, seconds: calls.append(graph)
            run_base(pool, text, DRAFT, SEED)
            assert sorted(runners) == ["base/context", "base/step"]
        assert runners == []
    assert calls == ["context", "step", "step"]


def test_engines_are_dropped_when_a_stage_fails(bundle: Path, runners: list[str], text: PromptEmbeds) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        assert sorted(runners) == ["base/context", "base/step"]
        raise KeyboardInterrupt

    with Show1Pipeline.from_bundle(bundle) as pipeline, pytest.raises(KeyboardInterrupt):
        run_base(pipeline.engines, text, DRAFT, SEED, progress=interrupt)
    assert runners == []


def test_the_shallow_graph_is_loaded_where_steps_reuse_features(
    bundle: Path, runners: list[str], text: PromptEmbeds
) -> None:
    settings = DRAFT.with_steps({"base": 4}).with_cache({"base": 2})
    calls: list[str] = []
    with Show1Pipeline.from_bundle(bundle, keep_loaded=True) as pipeline:
        with pipeline.engines.use("base") as engine:
            engine.on_call = lambda graph, start, seconds: calls.append(graph)
        reusing = run_base(pipeline.engines, text, settings, SEED)
        assert sorted(runners) == ["base/context", "base/shallow", "base/step"]
        assert calls == ["context", *["step", "shallow"] * 2]
        whole = run_base(pipeline.engines, text, settings.with_cache({"base": 1}), SEED)
    assert not np.array_equal(reusing, whole)


def test_the_bundles_defaults_are_the_reference_settings(pipeline: Show1Pipeline) -> None:
    assert pipeline.settings == Settings()
    assert pipeline.settings.num_frames == 29


def test_interpolation_draws_its_first_noise_apart_from_the_noise_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[FloatArray] = []

    def filled(engines: Any, text: Any, keyframes: Any, settings: Any, seed: int, noise: Any, progress: Any) -> Any:
        given.append(noise)  # with noise given, the steps' own stream starts from the seed
        return np.zeros((1, 3, 5, 8, 16), np.float32)

    monkeypatch.setattr(interp, "fill_gaps", filled)
    run_interp(SimpleNamespace(), None, np.zeros((1, 3, 2, 8, 16), np.float32), DRAFT, SEED)  # type: ignore[arg-type]
    np.testing.assert_array_equal(given[0], NoiseStream(SEED).normal((1, 3, 5, 8, 16)))
