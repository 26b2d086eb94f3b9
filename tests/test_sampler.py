"""The denoising loop against recorded trajectories of the reference, and what guidance and batching may not change."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_schedulers import published

from engines.errors import BundleError
from runtime.noise import NoiseStream
from runtime.ops import FloatArray, cross_fade, resize_bilinear
from runtime.sampler import Interval, Unet, denoise, guidance_scales, whole_steps
from runtime.schedulers import add_noise, make_schedule

SEED = 345


def frames_last(x: FloatArray) -> FloatArray:
    """[F, C, H, W], the layout of the recorded steps, -> [1, C, F, H, W]."""
    return x.swapaxes(0, 1)[None]


@pytest.mark.parametrize(
    ("recording", "name", "steps"),
    [
        ("base75", "base", 75),
        ("base10", "base", 10),
        ("sr1_125", "sr1", 125),
        ("sr2_50", "sr2", 50),
        ("if2_70", "if2", 70),
        ("ddpm_if1_100", "if1", 100),
    ],
)
def test_trajectories_equal_the_reference(golden: Path, recording: str, name: str, steps: int) -> None:
    reference = np.load(golden / "schedulers.npz")
    schedule = make_schedule(published(name), steps)
    np.testing.assert_array_equal(schedule.timesteps, reference[f"{recording}_timesteps"])
    trajectory: list[FloatArray] = []

    def recorded_unet(sample: FloatArray, timestep: int) -> tuple[FloatArray, FloatArray | None]:
        wave = np.float32(1 + 0.03 * len(trajectory))
        feedback = np.float32(0.5) * sample
        if not schedule.config.learned_variance:
            return frames_last(np.sin(reference["wave3"] * wave)) + feedback, None
        both = frames_last(np.sin(reference["wave6"] * wave))
        return both[:, :3] + feedback, both[:, 3:] + feedback

    denoise(
        recorded_unet,
        frames_last(reference["start"]),
        schedule,
        guidance_scale=1.0,
        noise=NoiseStream(SEED),
        on_step=lambda index, total, x: trajectory.append(x.copy()),
    )
    for step, x in enumerate(trajectory):
        # The latents of sr2 reach 13, where float32 has steps of 1e-6: hence the relative part.
        expected = frames_last(reference[f"{recording}_traj"][step])
        np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-5, err_msg=f"step {step}")


def test_interpolation_input_equals_the_reference(golden: Path) -> None:
    reference = np.load(golden / "pipe_interp.npz")
    pixels = reference["pixel_values"]
    mask = np.zeros((1, 1, 5, *pixels.shape[3:]), np.float32)
    mask[:, :, [0, -1]] = 1
    condition = np.concatenate([cross_fade(pixels[:, :, 0], pixels[:, :, -1], 5), mask], axis=1)
    seen = first_network_input(reference["init_noise"], condition, guidance_scale=4.0)
    np.testing.assert_allclose(seen, reference["first_unet_input"], rtol=0, atol=1e-6)


def test_super_resolution_input_equals_the_reference(golden: Path) -> None:
    reference = np.load(golden / "pipe_sr1_cond.npz")
    noise = NoiseStream(SEED)
    shape = (1, 3, 8, 32, 48)
    x = noise.normal(shape)
    upscaled = resize_bilinear(reference["video"], (32, 48))
    condition = add_noise(published("noising"), upscaled, noise.normal(shape), 250)
    condition[:, :, 0] = reference["first_frame_cond"][:, :, 0]
    seen = first_network_input(x, condition, guidance_scale=2.5)
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_allclose(seen[:1], reference["first_unet_input"], rtol=0, atol=2e-6)


def first_network_input(x: FloatArray, condition: FloatArray, guidance_scale: float) -> FloatArray:
    inputs: list[FloatArray] = []

    def unet(sample: FloatArray, timestep: int) -> tuple[FloatArray, None]:
        inputs.append(sample.copy())
        return sample[:, :3], None

    denoise(unet, x, make_schedule(published("base"), 2), guidance_scale=guidance_scale, condition=condition)
    return inputs[0]


def pointwise_unet(sample: FloatArray, timestep: int) -> tuple[FloatArray, FloatArray]:
    """Stands in for a network: each element on its own, so that the batch around it cannot matter."""
    noise_pred = np.sin(3 * sample[:, :3] + np.float32(timestep))
    return noise_pred, np.cos(5 * sample[:, :3])


def random_clips(batch: int) -> FloatArray:
    return np.random.default_rng(1).standard_normal((batch, 3, 4, 6, 8), dtype=np.float32)


@pytest.mark.parametrize("name", ["base", "sr1", "if1", "sr2"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_seven_clips_in_one_batch_equal_seven_runs(name: str, guidance_scale: float) -> None:
    schedule = make_schedule(published(name), 8)
    x, condition = random_clips(7), random_clips(7)[::-1]

    def run(clips: slice) -> FloatArray:
        return denoise(
            pointwise_unet,
            x[clips],
            schedule,
            guidance_scale=guidance_scale,
            noise=NoiseStream(SEED),
            condition=condition[clips],
        )

    together = run(slice(0, 7))
    for clip in range(7):
        np.testing.assert_array_equal(together[clip : clip + 1], run(slice(clip, clip + 1)))


@pytest.mark.parametrize("name", ["base", "if1"])
def test_guidance_moves_away_from_the_first_half_and_takes_the_variance_of_the_second(name: str) -> None:
    schedule = make_schedule(published(name), 6)
    scale = np.float32(7)

    def halves(sample: FloatArray, timestep: int) -> tuple[FloatArray, FloatArray]:
        np.testing.assert_array_equal(sample[:2], sample[2:])
        noise_pred, variance_frac = pointwise_unet(sample, timestep)
        noise_pred[:2] *= np.float32(0.5)
        variance_frac[:2] = np.nan
        return noise_pred, variance_frac

    def combined(sample: FloatArray, timestep: int) -> tuple[FloatArray, FloatArray]:
        positive, variance_frac = pointwise_unet(sample, timestep)
        negative = positive * np.float32(0.5)
        return (positive - negative) * scale + negative, variance_frac

    guided = denoise(halves, random_clips(2), schedule, guidance_scale=7.0, noise=NoiseStream(SEED))
    plain = denoise(combined, random_clips(2), schedule, guidance_scale=1.0, noise=NoiseStream(SEED))
    np.testing.assert_array_equal(guided, plain)


@pytest.mark.parametrize(
    ("count", "guided", "expected"),
    [
        (4, (0, 1), [0, 1, 2, 3]),
        (4, (0, 0.5), [0, 1]),
        (5, (0, 0.5), [0, 1]),
        (5, (0.2, 0.8), [1, 2, 3]),
        (10, (0.07, 0.12), []),
        (3, (0, 0), []),
        (1, (0.4, 0.6), [0]),
    ],
)
def test_steps_whose_middle_lies_in_the_interval_are_guided(count: int, guided: Interval, expected: list[int]) -> None:
    scales = guidance_scales(count, 7.5, guided)
    assert scales.dtype == np.float32 and scales.shape == (count,)
    assert np.flatnonzero(scales == 7.5).tolist() == expected
    assert np.count_nonzero(scales == 1) == count - len(expected)


@pytest.mark.parametrize("name", ["base", "if1"])
@pytest.mark.parametrize("guided", [(0.0, 0.5), (0.3, 0.7), (0.0, 0.0)])
def test_unguided_steps_see_the_prompt_alone_and_the_solver_goes_on(name: str, guided: Interval) -> None:
    schedule, condition = make_schedule(published(name), 6), random_clips(2)[::-1]
    scales = guidance_scales(6, 7.0, guided)

    def halves(sample: FloatArray, timestep: int) -> tuple[FloatArray, FloatArray]:
        """The prompt's prediction is the last, and the only one in an unguided step."""
        noise_pred, variance_frac = pointwise_unet(sample, timestep)
        np.testing.assert_array_equal(sample[-2:, 3:], condition)
        if scales[list(schedule.timesteps).index(timestep)] > 1:
            assert len(sample) == 4
            np.testing.assert_array_equal(sample[:2], sample[2:])
            noise_pred[:2] *= np.float32(0.5)
            variance_frac[:2] = np.nan
        else:
            assert len(sample) == 2
        return noise_pred, variance_frac

    def combined(sample: FloatArray, timestep: int) -> tuple[FloatArray, FloatArray]:
        positive, variance_frac = pointwise_unet(sample, timestep)
        scale = scales[list(schedule.timesteps).index(timestep)]
        negative = positive * np.float32(0.5)
        return (positive - negative) * scale + negative if scale > 1 else positive, variance_frac

    given, expected = (
        denoise(
            unet,
            random_clips(2),
            schedule,
            guidance_scale=guidance_scale,
            guided=guided,
            noise=NoiseStream(SEED),
            condition=condition,
        )
        for unet, guidance_scale in ((halves, 7.0), (combined, 1.0))
    )
    np.testing.assert_array_equal(given, expected)


def test_every_nth_step_is_whole_and_so_is_the_first_of_another_batch() -> None:
    unguided, late = np.ones(7, np.float32), np.array([1, 1, 1, 4, 4, 4, 1], np.float32)
    assert whole_steps(unguided, 1).all()
    assert whole_steps(unguided, 3).tolist() == [True, False, False, True, False, False, True]
    assert whole_steps(late, 3).tolist() == [True, False, False, True, False, False, True]
    assert whole_steps(late, 2).tolist() == [True, False, True, True, False, True, True]


def test_only_loops_that_reuse_features_tell_the_network_which_steps_are_whole() -> None:
    told: list[bool | None] = []

    def unet(sample: FloatArray, timestep: int, whole: bool | None = None) -> tuple[FloatArray, None]:
        told.append(whole)
        return pointwise_unet(sample, timestep)[0], None

    schedule = make_schedule(published("base"), 4)
    for interval in (1, 2):
        denoise(unet, random_clips(1), schedule, guidance_scale=1.0, cache_interval=interval)
    assert told == [None] * 4 + [True, False] * 2


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0])
def test_without_guidance_the_network_sees_each_clip_once(guidance_scale: float) -> None:
    def unet(sample: FloatArray, timestep: int) -> tuple[FloatArray, FloatArray]:
        assert sample.shape == (2, 3, 4, 6, 8)
        return pointwise_unet(sample, timestep)

    denoise(unet, random_clips(2), make_schedule(published("base"), 3), guidance_scale=guidance_scale)


@pytest.mark.parametrize("name", ["base", "sr1"])
def test_infinite_noise_predictions_count_as_very_large_ones(name: str) -> None:
    def unet_with(extreme: float) -> Unet:
        def unet(sample: FloatArray, timestep: int) -> tuple[FloatArray, None]:
            noise_pred = pointwise_unet(sample, timestep)[0]
            noise_pred[-1, 0, 0] = extreme  # all of a channel, hence beyond the quantile
            noise_pred[-1, 1, 1, 0, 0] = -extreme
            return noise_pred, None

        return unet

    schedule = make_schedule(published(name), 5)
    infinite = denoise(unet_with(np.inf), random_clips(1), schedule, guidance_scale=3.0)
    assert np.all(np.isfinite(infinite))
    np.testing.assert_array_equal(infinite, denoise(unet_with(1e30), random_clips(1), schedule, guidance_scale=3.0))


def test_progress_is_reported_after_each_step_and_the_input_stays_as_it_was() -> None:
    x = random_clips(1)
    before = x.copy()
    progress: list[tuple[int, int]] = []
    result = denoise(
        pointwise_unet,
        x,
        make_schedule(published("base"), 3),
        guidance_scale=2.0,
        on_step=lambda index, total, x: progress.append((index, total)),
    )
    assert progress == [(0, 3), (1, 3), (2, 3)]
    np.testing.assert_array_equal(x, before)
    assert result.shape == x.shape and result.dtype == np.float32


@pytest.mark.parametrize("name", ["base", "if2"])
def test_a_loop_elsewhere_is_given_noise_where_its_step_adds_some_and_its_result_is_kept(name: str) -> None:
    schedule, buffer = make_schedule(published(name), 3), np.zeros((1, 3, 4, 6, 8), np.float32)
    given: list[bool] = []
    loop = SimpleNamespace(step=lambda noise: given.append(noise is not None), sample=lambda: buffer)
    unet: Any = SimpleNamespace(start_loop=lambda _: loop)
    result = denoise(unet, random_clips(1), schedule, guidance_scale=2.0, noise=NoiseStream(SEED))
    assert given == [schedule.adds_noise(index) for index in range(3)] and not given[-1]
    buffer += 1  # by the next loop
    assert not result.any()


def test_ddpm_without_a_noise_stream_is_an_error() -> None:
    with pytest.raises(ValueError, match="pass a NoiseStream"):
        denoise(pointwise_unet, random_clips(1), make_schedule(published("if2"), 3), guidance_scale=1.0)


def test_an_engine_without_the_variance_that_the_scheduler_needs_is_refused() -> None:
    def unet(sample: FloatArray, timestep: int) -> tuple[FloatArray, None]:
        return sample, None

    with pytest.raises(BundleError, match=r"no variance_frac.*'learned_range' needs \(2, 3, 4, 6, 8\)"):
        denoise(unet, random_clips(1), make_schedule(published("if2"), 3), guidance_scale=2.0, noise=NoiseStream(SEED))


def test_an_engine_whose_output_has_another_shape_is_refused() -> None:
    def unet(sample: FloatArray, timestep: int) -> tuple[FloatArray, None]:
        return sample[:1], None

    with pytest.raises(BundleError, match=r"noise_pred \(1, 3, 4, 6, 8\); this run needs \(2, 3, 4, 6, 8\)"):
        denoise(unet, random_clips(1), make_schedule(published("base"), 3), guidance_scale=2.0)
