"""Noise schedules, timesteps and step arithmetic against the reference (diffusers 0.19.3)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.errors import CheckpointError, SettingsError
from runtime.noise import NoiseStream
from runtime.sampler import denoise
from runtime.schedulers import (
    SPACINGS,
    Schedule,
    SchedulerConfig,
    add_noise,
    alphas_cumprod,
    dynamic_threshold,
    log_snr,
    make_schedule,
    max_inference_steps,
)

_PIXEL: dict[str, Any] = {
    "beta_schedule": "squaredcos_cap_v2",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "variance_type": "fixed_small",
}
_DPM = {"_class_name": "DPMSolverMultistepScheduler"}
_DDPM = {"_class_name": "DDPMScheduler"}
# The published settings.
PUBLISHED: dict[str, dict[str, Any]] = {
    "base": {**_DPM, **_PIXEL, "sample_max_value": 1.5, "lambda_min_clipped": -5.1},
    "sr1": {**_DPM, **_PIXEL, "sample_max_value": 1.0},
    "if2": {**_DDPM, **_PIXEL, "sample_max_value": 1.0, "variance_type": "learned_range"},
    "if1": {**_DDPM, **_PIXEL, "sample_max_value": 1.5, "variance_type": "learned_range"},
    "sr2": {
        **_DPM,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "steps_offset": 1,
        "variance_type": None,
    },
    "noising": {**_DDPM, "beta_schedule": "squaredcos_cap_v2"},
}


def published(name: str, **changes: Any) -> SchedulerConfig:
    return SchedulerConfig.from_dict({**PUBLISHED[name], **changes}, "scheduler_config.json")


@pytest.mark.parametrize(("name", "prefix"), [("base", "cos"), ("sr2", "sd")])
def test_noise_schedules_equal_the_reference(golden: Path, name: str, prefix: str) -> None:
    reference = np.load(golden / "schedulers.npz")
    np.testing.assert_array_equal(alphas_cumprod(published(name)), reference[f"{prefix}_alphas_cumprod"])
    np.testing.assert_allclose(log_snr(published(name)), reference[f"{prefix}_lambda_t"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("level", [20, 150, 250])
def test_noising_equals_the_reference(golden: Path, level: int) -> None:
    reference = np.load(golden / "schedulers.npz")
    noised = add_noise(published("noising"), reference["noising_x"], reference["noising_noise"], level)
    assert noised.dtype == np.float32
    np.testing.assert_allclose(noised, reference[f"noising_{level}"], rtol=0, atol=1e-6)


def test_noise_levels_outside_training_are_refused() -> None:
    clean = np.zeros((1, 3, 1, 2, 2), np.float32)
    with pytest.raises(SettingsError, match="is 1000; allowed: 0 to 999"):
        add_noise(published("noising"), clean, clean, 1000)


@pytest.mark.parametrize(
    ("name", "steps", "first", "last"),
    [
        ("base", 75, [995, 982, 968, 955], [40, 27, 13]),
        ("sr1", 125, [999, 991, 983], [16, 8]),
        ("if2", 70, [966, 952], [14, 0]),
        ("sr2", 50, [999, 979, 959], [20]),
    ],
)
def test_published_runs_visit_the_timesteps_of_the_reference(
    name: str, steps: int, first: list[int], last: list[int]
) -> None:
    timesteps = make_schedule(published(name), steps).timesteps
    assert timesteps.dtype == np.int64
    assert len(timesteps) == steps
    assert list(timesteps[: len(first)]) == first
    assert list(timesteps[-len(last) :]) == last


@pytest.mark.parametrize(
    ("solver", "spacing", "expected"),
    [
        (_DPM, "linspace", [999, 799, 599, 400, 200]),
        (_DPM, "leading", [831, 665, 499, 333, 167]),
        (_DPM, "trailing", [999, 799, 599, 399, 199]),
        (_DDPM, "linspace", [999, 749, 500, 250, 0]),
        (_DDPM, "leading", [801, 601, 401, 201, 1]),
        (_DDPM, "trailing", [999, 799, 599, 399, 199]),
    ],
)
def test_each_solver_has_its_own_meaning_of_the_spacings(
    solver: dict[str, str], spacing: str, expected: list[int]
) -> None:
    config = SchedulerConfig.from_dict({**solver, "timestep_spacing": spacing, "steps_offset": 1}, "x")
    assert list(make_schedule(config, 5).timesteps) == expected


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("solver", [_DPM, _DDPM])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_possible_number_of_steps_falls_strictly_within_training(
    solver: dict[str, str], spacing: str, beta_schedule: str
) -> None:
    config = SchedulerConfig.from_dict({**solver, "num_train_timesteps": 100, "beta_schedule": beta_schedule}, "x")
    for steps in range(1, max_inference_steps(config, spacing) + 1):
        schedule = make_schedule(config, steps, spacing=spacing)
        assert len(schedule) == steps
        assert schedule.timesteps[0] < 100 and schedule.timesteps[-1] >= 0
        assert np.all(np.diff(schedule.timesteps) < 0)
        assert np.all(np.isfinite(schedule.x0_weight)) and np.all(np.isfinite(schedule.sample_weight))


@pytest.mark.parametrize("name", ["base", "sr1", "sr2", "if2"])
def test_the_published_spacing_stays_unless_another_is_asked_for(name: str) -> None:
    config = published(name)
    plain, asked = make_schedule(config, 20), make_schedule(config, 20, spacing=config.timestep_spacing)
    np.testing.assert_array_equal(plain.timesteps, asked.timesteps)
    np.testing.assert_array_equal(plain.x0_weight, asked.x0_weight)
    assert list(make_schedule(config, 20, spacing="logsnr").timesteps) != list(plain.timesteps)


@pytest.mark.parametrize("name", ["base", "sr1", "sr2", "if2"])
def test_logsnr_steps_are_equal_in_lambda_and_begin_where_x0_can_be_told(name: str) -> None:
    config = published(name)
    schedule = make_schedule(config, 12, spacing="logsnr")
    snr = log_snr(config)
    assert snr[schedule.timesteps[0]] >= -5.1 and (
        schedule.timesteps[0] == 999 or snr[schedule.timesteps[0] + 1] < -5.1
    )
    ends = np.append(schedule.timesteps[1:], 0) if config.solver == "dpm" else schedule.timesteps[1:]
    h = snr[ends] - snr[schedule.timesteps][: len(ends)]
    np.testing.assert_allclose(h[1:-2], h[1:-2].mean(), rtol=0.1)  # the ends' training steps lie too far apart


def test_logsnr_begins_no_noisier_than_the_scheduler_does() -> None:
    config = SchedulerConfig.from_dict({**PUBLISHED["base"], "lambda_min_clipped": -3.0}, "x")
    assert max_inference_steps(config, "logsnr") == max_inference_steps(config)


def test_logsnr_is_what_diffusers_calls_lu_lambdas() -> None:
    diffusers = pytest.importorskip("diffusers", reason="compares with the bench extra")
    theirs = diffusers.DPMSolverMultistepScheduler.from_config({**PUBLISHED["sr2"], "use_lu_lambdas": True})
    for steps in (8, 12, 20):
        theirs.set_timesteps(steps + 1)  # theirs visits the end point too
        ours = make_schedule(published("sr2"), steps, spacing="logsnr").timesteps
        np.testing.assert_array_equal(ours, theirs.timesteps[:-1])


def assert_equal_runs(schedule: Schedule, theirs: Any, rtol: float) -> None:
    """Our loop and diffusers' scheduler, on the same predictions."""
    import torch

    start, *preds = np.random.default_rng(0).standard_normal((len(schedule) + 1, 1, 3, 1, 6, 8), dtype=np.float32)
    left = iter(preds)
    x = denoise(lambda *_: (next(left), None), start, schedule, guidance_scale=1, noise=NoiseStream(7))

    expected, drawn = torch.from_numpy(start[:, :, 0]), torch.Generator().manual_seed(7)
    for timestep, pred in zip(theirs.timesteps, preds, strict=True):
        more = {"generator": drawn} if schedule.config.solver == "ddpm" else {}
        expected = theirs.step(torch.from_numpy(pred[:, :, 0]), timestep, expected, **more).prev_sample
    np.testing.assert_allclose(x[:, :, 0], expected.numpy(), rtol=rtol, atol=2e-5)


@pytest.mark.parametrize("steps", [12, 20])
@pytest.mark.parametrize("name", ["base", "sr2", "if2"])
def test_uneven_steps_equal_those_of_diffusers_at_the_same_timesteps(name: str, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers", reason="compares with the bench extra")
    settings = {**PUBLISHED[name], "variance_type": None if name == "sr2" else "fixed_small"}
    schedule = make_schedule(SchedulerConfig.from_dict(settings, name), steps, spacing="logsnr")
    theirs = getattr(diffusers, settings["_class_name"]).from_config({**settings, "final_sigmas_type": "sigma_min"})
    theirs.set_timesteps(timesteps=schedule.timesteps.tolist())
    assert_equal_runs(schedule, theirs, rtol=2e-5)


@pytest.mark.parametrize("name", ["base", "sr1"])
def test_few_logsnr_steps_are_nearer_the_exact_solution_than_many_even_ones(name: str) -> None:
    config = published(name)
    deviations = 0.7 / np.geomspace(1, 32, 60)  # of natural images: amplitudes fall as 1 / frequency

    def error(schedule: Schedule) -> float:
        """Of the deviation that a run gives Gaussian data, whose denoiser and solution are known exactly."""
        kept = alphas_cumprod(config).astype(np.float64)
        x, previous = np.ones(60), np.zeros(60)
        rows = zip(
            schedule.timesteps, schedule.sample_weight, schedule.x0_weight, schedule.previous_x0_weight, strict=True
        )
        for timestep, *weights in rows:
            signal = kept[timestep]
            x0 = np.sqrt(signal) * deviations**2 / (signal * deviations**2 + 1 - signal) * x
            x, previous = weights[0] * x + weights[1] * x0 + weights[2] * previous, x0
        return float(np.sqrt(np.mean((x - np.sqrt(kept[0] * deviations**2 + 1 - kept[0])) ** 2)))

    assert error(make_schedule(config, 12, spacing="logsnr")) < error(make_schedule(config, 50))
    assert error(make_schedule(config, 20, spacing="logsnr")) < 0.2 * error(make_schedule(config, 20))


def test_a_spacing_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SettingsError, match="spacing is 'karras'; allowed: linspace, leading, trailing, logsnr"):
        make_schedule(published("base"), 20, spacing="karras")


def test_a_partial_run_starts_with_a_first_order_step() -> None:
    whole, part = make_schedule(published("sr2"), 50), make_schedule(published("sr2"), 50, strength=0.8)
    assert len(part) == 40
    assert part.timesteps[0] == 799
    assert whole.previous_x0_weight[10] != 0 and part.previous_x0_weight[0] == 0
    np.testing.assert_array_equal(part.x0_weight[1:], whole.x0_weight[11:])
    np.testing.assert_allclose(part.x0_weight[0], whole.x0_weight[10] + whole.previous_x0_weight[10], rtol=1e-6)


@pytest.mark.parametrize(("steps", "strength", "last_is_first_order"), [(14, 1.0, True), (15, 1.0, False)])
def test_only_runs_below_15_steps_end_with_a_first_order_step(
    steps: int, strength: float, last_is_first_order: bool
) -> None:
    assert (make_schedule(published("base"), steps, strength).previous_x0_weight[-1] == 0) == last_is_first_order
    eager = published("base", lower_order_final=False)
    assert make_schedule(eager, steps, strength).previous_x0_weight[-1] != 0


def test_the_length_of_the_whole_run_decides_about_the_last_order() -> None:
    assert make_schedule(published("sr2"), 15, strength=0.8).previous_x0_weight[-1] != 0


def test_a_solver_of_order_one_never_looks_back() -> None:
    assert np.all(make_schedule(published("base", solver_order=1), 20).previous_x0_weight == 0)


def test_ddpm_adds_noise_in_every_step_but_the_one_at_zero() -> None:
    schedule = make_schedule(published("if2"), 70)
    assert [schedule.adds_noise(index) for index in range(70)] == [True] * 69 + [False]
    assert not any(make_schedule(published("base"), 75).adds_noise(index) for index in range(75))


@pytest.mark.parametrize(
    ("variance_type", "is_largest"), [("fixed_small", False), ("fixed_small_log", False), ("fixed_large", True)]
)
def test_fixed_variances_are_one_of_the_learned_bounds(variance_type: str, is_largest: bool) -> None:
    learned = make_schedule(published("if2"), 20)
    fixed = make_schedule(published("if2", variance_type=variance_type), 20)
    np.testing.assert_array_equal(fixed.min_log_var, fixed.max_log_var)
    np.testing.assert_array_equal(fixed.min_log_var, learned.max_log_var if is_largest else learned.min_log_var)


@pytest.mark.parametrize("steps", [0, -3, 996, 1001])
def test_step_counts_that_do_not_fit_are_refused(steps: int) -> None:
    assert max_inference_steps(published("base")) == 995
    with pytest.raises(SettingsError, match=f"num_inference_steps is {steps}; allowed: 1 to 995"):
        make_schedule(published("base"), steps)


def test_an_offset_beyond_training_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"steps_offset 1 starts at timestep 1000; allowed: 0 to 999"):
        make_schedule(published("noising", steps_offset=1), 1000)


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.1, float("nan")])
def test_strengths_out_of_range_are_refused(strength: float) -> None:
    with pytest.raises(SettingsError, match=r"strength is .*; allowed: above 0, up to 1"):
        make_schedule(published("sr2"), 50, strength)


def test_a_schedule_whose_end_is_clipped_has_a_step_whatever_the_strength() -> None:
    clipped = published("sr2", lambda_min_clipped=-2.0)
    assert len(make_schedule(clipped, 50, strength=0.02, spacing="trailing")) == 1


def test_a_strength_below_one_step_runs_the_last() -> None:
    whole, part = make_schedule(published("sr2"), 4), make_schedule(published("sr2"), 4, strength=0.1)
    assert part.timesteps.tolist() == whole.timesteps[-1:].tolist()


def test_every_scheduler_file_of_the_tiny_checkpoints_is_understood(golden: Path) -> None:
    files = sorted(golden.glob("models/*/*scheduler/scheduler_config.json"))
    assert len(files) >= 7
    learned = [
        file.parent.parent.name
        for file in files
        if SchedulerConfig.from_dict(json.loads(file.read_text()), str(file)).learned_variance
    ]
    assert learned == ["if2"]


def test_absent_keys_take_the_defaults_of_diffusers() -> None:
    dpm, ddpm = SchedulerConfig.from_dict(_DPM, "x"), SchedulerConfig.from_dict(_DDPM, "x")
    assert (dpm.timestep_spacing, ddpm.timestep_spacing) == ("linspace", "leading")
    assert (dpm.variance_type, ddpm.variance_type) == (None, "fixed_small")
    assert (dpm.clip_sample, ddpm.clip_sample) == (False, True)
    assert (dpm.solver_order, dpm.lower_order_final, dpm.lambda_min_clipped) == (2, True, -np.inf)
    assert (dpm.beta_schedule, dpm.beta_start, dpm.beta_end) == ("linear", 0.0001, 0.02)


def test_dpm_never_needs_a_learned_variance() -> None:
    assert not published("base", variance_type="learned_range").learned_variance


def test_trained_betas_replace_the_named_schedule() -> None:
    betas = np.linspace(0.001, 0.02, 1000)
    config = published("base", trained_betas=betas.tolist())
    np.testing.assert_allclose(alphas_cumprod(config), np.cumprod(1 - betas), rtol=1e-4)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("_class_name", "EulerDiscreteScheduler", "'DPMSolverMultistepScheduler', 'DDPMScheduler'"),
        ("use_karras_sigmas", True, "False, None"),
        ("algorithm_type", "dpmsolver", "'dpmsolver\\+\\+'"),
        ("solver_type", "heun", "'midpoint'"),
        ("solver_order", 3, "1, 2"),
        ("prediction_type", "sample", "'epsilon', 'v_prediction'"),
        ("beta_schedule", "sigmoid", "'linear', 'scaled_linear', 'squaredcos_cap_v2'"),
        ("timestep_spacing", "random", "'linspace', 'leading', 'trailing'"),
        ("variance_type", "fixed_large_log", "None, 'fixed_small'"),
        ("thresholding", "yes", "False, True"),
        ("sample_max_value", 0.5, "a number from 1 to inf"),
        ("dynamic_thresholding_ratio", 95, "a number from 0 to 1"),
        ("num_train_timesteps", 1000.5, "an integer from 1"),
        ("beta_end", None, "a number from 0 to 1"),
        ("trained_betas", [0.1, 0.2], "a list of 1000 numbers"),
        ("lambda_min_clipped", 50.0, "below"),
    ],
)
def test_unsupported_values_name_the_file_the_key_and_what_is_allowed(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(CheckpointError, match=rf"base/scheduler_config.json: {key} is .*; allowed: .*{allowed}"):
        SchedulerConfig.from_dict({**PUBLISHED["base"], key: value}, "base/scheduler_config.json")


def test_betas_that_lose_the_whole_signal_are_refused() -> None:
    with pytest.raises(CheckpointError, match="keep 0 of the signal at the first training step"):
        published("noising", beta_schedule="linear", beta_start=1.0, beta_end=1.0)


@pytest.mark.parametrize("name", ["base", "if2"])
def test_a_run_on_v_predictions_equals_diffusers(name: str) -> None:
    diffusers = pytest.importorskip("diffusers", reason="compares with the bench extra")
    settings = {**PUBLISHED[name], "prediction_type": "v_prediction", "variance_type": "fixed_small"}
    # Later releases end at no noise unless told otherwise.
    theirs = getattr(diffusers, settings["_class_name"]).from_config({**settings, "final_sigmas_type": "sigma_min"})
    theirs.set_timesteps(10)
    assert_equal_runs(make_schedule(SchedulerConfig.from_dict(settings, name), 10), theirs, rtol=0)


def threshold_plainly(x0: np.ndarray, ratio: float, max_value: float) -> np.ndarray:
    """Dynamic thresholding with the quantile of every frame and no shortcut."""
    out = np.empty_like(x0)
    for batch, frame in np.ndindex(x0.shape[0], x0.shape[2]):
        raw = x0[batch, :, frame]
        ordered = np.sort(np.abs(raw), axis=None)
        position = np.float32(ratio) * np.float32(ordered.size - 1)
        low, high = ordered[int(position)], ordered[int(np.ceil(position))]
        s = np.clip(low + (high - low) * (position - np.floor(position)), 1, max_value)
        out[batch, :, frame] = np.clip(raw, -s, s) / s
    return out


@pytest.mark.parametrize("max_value", [1.0, 1.5, 10.0])
@pytest.mark.parametrize("ratio", [0.5, 0.95, 0.995, 1.0])
def test_threshold_shortcuts_equal_the_plain_computation_exactly(max_value: float, ratio: float) -> None:
    rng = np.random.default_rng(0)
    loudness = np.geomspace(0.1, 5, 12, dtype=np.float32).reshape(2, 1, 6, 1, 1)
    x0 = loudness * rng.standard_normal((2, 3, 6, 8, 10), dtype=np.float32)
    out = np.empty_like(x0)
    dynamic_threshold(x0, ratio, max_value, out)
    np.testing.assert_array_equal(out, threshold_plainly(x0, ratio, max_value))


@pytest.mark.parametrize("loud", range(9, 15))
def test_threshold_is_exact_where_the_count_of_loud_values_decides(loud: int) -> None:
    x0 = np.full(240, 0.5, np.float32)  # 0.95 * 239 = 227.05: decided by the sorted values 227 and 228
    x0[:loud] = np.linspace(1.1, 2, loud)
    x0 = x0.reshape(1, 3, 1, 8, 10)
    out = np.empty_like(x0)
    dynamic_threshold(x0, 0.95, 1.5, out)
    np.testing.assert_array_equal(out, threshold_plainly(x0, 0.95, 1.5))


@pytest.mark.parametrize("infinite", [1, 12, 13, 100, 240])
@pytest.mark.parametrize("max_value", [1.0, 1.5])
def test_infinite_estimates_become_plus_or_minus_one(infinite: int, max_value: float) -> None:
    x0 = np.linspace(-0.9, 0.9, 240, dtype=np.float32)
    x0[:infinite] = np.where(np.arange(infinite) % 2, np.inf, -np.inf)
    out = np.empty((1, 3, 1, 8, 10), np.float32)
    dynamic_threshold(x0.reshape(out.shape), 0.95, max_value, out)
    assert np.all(np.isfinite(out))
    np.testing.assert_array_equal(out.ravel()[:infinite], np.sign(x0[:infinite]))
