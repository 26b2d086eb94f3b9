"""Noise schedules and solver steps: DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095) and DDPM (Ho et al. 2020).

A `Schedule` is a table with one row per step. Both solvers first estimate the clean sample x0 and then take one linear
combination, whose weights are in the table:

    x0   = limit((x - pred_weight * pred) / divisor)
    x   <- sample_weight * x + x0_weight * x0 + previous_x0_weight * (x0 of the step before)  [+ std * noise, DDPM]

Arrays are float32 [B, C, F, H, W] and the sample lies near [-1, 1]. The functions below write into arrays that the
caller allocated once, so that a step costs memory traffic only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engines.errors import CheckpointError, SettingsError
from runtime.ops import FloatArray

_SOLVERS = {"DPMSolverMultistepScheduler": "dpm", "DDPMScheduler": "ddpm"}
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_PREDICTION_TYPES = ("epsilon", "v_prediction")
_SPACINGS = ("linspace", "leading", "trailing")
LOGSNR = "logsnr"
SPACINGS = (*_SPACINGS, LOGSNR)  # of a run; no published scheduler names the last
_VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range")
# Variants of the solvers that would change the result; diffusers releases after 0.19 know more of them.
_MUST_BE_OFF = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
    "euler_at_final",
    "rescale_betas_zero_snr",
)
_LOWER_ORDER_BELOW = 15  # steps; from here on the reference ignores `lower_order_final`
# Where runs spaced by log-SNR begin. Show-1's base clips there; below, the alpha that x0 is divided by drops to 5e-5.
_NOISIEST = -5.1
_NO_NOISE = np.float32(-np.inf)  # as a log variance
_LARGEST = np.finfo(np.float32).max


@dataclass(frozen=True)
class SchedulerConfig:
    """What a published scheduler_config.json says, in its own words. `solver` comes from its class name."""

    solver: Literal["dpm", "ddpm"]
    prediction_type: str
    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    trained_betas: tuple[float, ...] | None
    variance_type: str | None
    timestep_spacing: str
    steps_offset: int
    thresholding: bool
    dynamic_thresholding_ratio: float
    sample_max_value: float
    clip_sample: bool  # DDPM only, ignored where thresholding is on
    clip_sample_range: float
    solver_order: int  # DPM only, as the next two
    lower_order_final: bool
    lambda_min_clipped: float

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str) -> "SchedulerConfig":
        """Check the contents of the scheduler_config.json `where`; absent keys take diffusers 0.19.3's defaults."""
        entries = _Entries(config, where)
        for key in _MUST_BE_OFF:
            entries.choice(key, False, (False, None))
        is_dpm = _SOLVERS[entries.choice("_class_name", None, tuple(_SOLVERS))] == "dpm"
        if is_dpm:
            entries.choice("algorithm_type", "dpmsolver++", ("dpmsolver++",))
            entries.choice("solver_type", "midpoint", ("midpoint",))
        num_train_timesteps = int(entries.number("num_train_timesteps", 1000, 1, 10**6))
        scheduler = cls(
            solver="dpm" if is_dpm else "ddpm",
            prediction_type=entries.choice("prediction_type", "epsilon", _PREDICTION_TYPES),
            num_train_timesteps=num_train_timesteps,
            beta_start=entries.number("beta_start", 0.0001, 0, 1),
            beta_end=entries.number("beta_end", 0.02, 0, 1),
            beta_schedule=entries.choice("beta_schedule", "linear", _BETA_SCHEDULES),
            trained_betas=entries.betas("trained_betas", num_train_timesteps),
            variance_type=(
                entries.choice("variance_type", None, (None, *_VARIANCE_TYPES))
                if is_dpm
                else entries.choice("variance_type", "fixed_small", _VARIANCE_TYPES)
            ),
            timestep_spacing=entries.choice("timestep_spacing", "linspace" if is_dpm else "leading", _SPACINGS),
            steps_offset=int(entries.number("steps_offset", 0, 0, num_train_timesteps - 1)),
            thresholding=entries.choice("thresholding", False, (False, True)),
            dynamic_thresholding_ratio=entries.number("dynamic_thresholding_ratio", 0.995, 0, 1),
            sample_max_value=entries.number("sample_max_value", 1.0, 1, np.inf),
            clip_sample=not is_dpm and entries.choice("clip_sample", True, (False, True)),
            clip_sample_range=entries.number("clip_sample_range", 1.0, 0, np.inf),
            solver_order=entries.choice("solver_order", 2, (1, 2)),
            lower_order_final=entries.choice("lower_order_final", True, (False, True)),
            lambda_min_clipped=entries.number("lambda_min_clipped", -np.inf, -np.inf, np.inf),
        )
        kept = alphas_cumprod(scheduler)
        if not (kept[0] < 1 and kept[-1] > 0):
            raise CheckpointError(
                f"{where}: the betas keep {kept[0]:.3g} of the signal at the first training step and {kept[-1]:.3g} "
                "at the last; allowed: strictly between 0 and 1. Check beta_start, beta_end and trained_betas."
            )
        if max_inference_steps(scheduler) < 1:
            raise CheckpointError(
                f"{where}: lambda_min_clipped is {scheduler.lambda_min_clipped}; "
                f"allowed: below {log_snr(scheduler)[1]:.3g}, so that a training step is left to start from."
            )
        return scheduler

    @property
    def learned_variance(self) -> bool:
        """Whether a step needs the variance rows of the network's output. DPM-Solver++ is deterministic: never."""
        return self.solver == "ddpm" and self.variance_type in ("learned", "learned_range")


@dataclass(frozen=True)
class _Entries:
    """Values of one scheduler_config.json, each checked as it is read."""

    config: Mapping[str, Any]
    where: str

    def choice(self, key: str, default: Any, allowed: Sequence[Any]) -> Any:
        value = self.config.get(key, default)
        if value not in allowed:
            raise self._error(key, value, ", ".join(map(repr, allowed)))
        return value

    def number(self, key: str, default: float, low: float, high: float) -> float:
        value = self.config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, type(default) | int) or not low <= value <= high:
            kind = "an integer" if isinstance(default, int) else "a number"
            raise self._error(key, value, f"{kind} from {low:g} to {high:g}")
        return value

    def betas(self, key: str, count: int) -> tuple[float, ...] | None:
        value = self.config.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count or not all(isinstance(beta, float) for beta in value):
            raise self._error(key, value, f"null or a list of {count} numbers (num_train_timesteps)")
        return tuple(value)

    def _error(self, key: str, value: Any, allowed: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} is {value!r}; allowed: {allowed}.")


def alphas_cumprod(config: SchedulerConfig) -> FloatArray:
    """Share of signal variance left at each training step, [num_train_timesteps], falling from near 1 to near 0."""
    # Rounded where the reference rounds: betas to float32, their running product taken in float64.
    alphas = np.float32(1) - _betas(config)
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _betas(config: SchedulerConfig) -> FloatArray:
    """Variance added by each training step, [num_train_timesteps]."""
    count = config.num_train_timesteps
    if config.trained_betas is not None:
        return np.array(config.trained_betas, np.float32)
    if config.beta_schedule == "linear":
        return _linspace(config.beta_start, config.beta_end, count)
    if config.beta_schedule == "scaled_linear":
        return _linspace(config.beta_start**0.5, config.beta_end**0.5, count) ** 2
    # Cosine schedule: Nichol & Dhariwal (2021), eq. 17, beta capped at 0.999.
    signal = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - signal[1:] / signal[:-1], 0.999).astype(np.float32)


def _linspace(start: float, end: float, count: int) -> FloatArray:
    """torch.linspace to the last bit: a step rounded to float32, counted from the nearer end."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(max(count - 1, 1)))
    index = np.arange(count)
    return np.where(index < count // 2, first + step * index, last - step * (count - 1 - index)).astype(np.float32)


def log_snr(config: SchedulerConfig) -> NDArray[np.float64]:
    """lambda = ln(alpha / sigma) at each training step (half the log of the signal-to-noise ratio)."""
    kept = alphas_cumprod(config).astype(np.float64)
    return 0.5 * np.log(kept / (1 - kept))


def max_inference_steps(config: SchedulerConfig, spacing: str | None = None) -> int:
    """Most steps a run may have without visiting a timestep twice."""
    # DPM-Solver++ adds an end point, t = 0, to the timesteps it visits.
    return _usable_steps(config, spacing) - (config.solver == "dpm")


def _usable_steps(config: SchedulerConfig, spacing: str | None) -> int:
    """Training steps in use: DPM-Solver++ leaves out the noisiest ones, with lambda below `lambda_min_clipped`."""
    least = config.lambda_min_clipped if config.solver == "dpm" else -np.inf
    if spacing == LOGSNR:
        least = max(least, _NOISIEST)
    return int(np.count_nonzero(log_snr(config) >= least))


@dataclass(frozen=True)
class Schedule:
    """The steps of one run: `timesteps` int64 [N], falling, and the coefficients of each step, float32 [N]."""

    config: SchedulerConfig
    timesteps: NDArray[np.int64]
    pred_weight: FloatArray  # x0 = (x - pred_weight * pred) / divisor
    divisor: FloatArray
    sample_weight: FloatArray
    x0_weight: FloatArray
    previous_x0_weight: FloatArray  # 0 in first-order steps
    min_log_var: FloatArray  # bounds of the log variance of the step's noise: equal if fixed, -inf if there is none
    max_log_var: FloatArray

    def __len__(self) -> int:
        return len(self.timesteps)

    def adds_noise(self, index: int) -> bool:
        """Whether step `index` draws noise: every DDPM step but the one at t = 0."""
        return bool(self.max_log_var[index] > _NO_NOISE)


def executed_steps(num_inference_steps: int, strength: float) -> int:
    """How many of the steps run, the last ones; few steps at little strength leave one, at more noise than asked."""
    return max(1, int(num_inference_steps * strength))


def make_schedule(
    config: SchedulerConfig, num_inference_steps: int, strength: float = 1.0, spacing: str | None = None
) -> Schedule:
    """Lay out a run of `num_inference_steps`, of which the last `executed_steps` are executed.

    strength < 1 starts from a noised clip instead of pure noise (SDEdit, Meng et al. 2021). Its first executed step
    has no history and is of first order. `spacing` is one of SPACINGS instead of the scheduler's own. "logsnr" puts
    timesteps at equal distances in lambda, as Lu et al. (2022, arXiv 2206.00927) do for few steps.
    Raises SettingsError.
    """
    if spacing is not None and spacing not in SPACINGS:
        raise SettingsError(f"spacing is {spacing!r}; allowed: {', '.join(SPACINGS)}.")
    most = max_inference_steps(config, spacing)
    if not 1 <= num_inference_steps <= most:
        raise SettingsError(f"num_inference_steps is {num_inference_steps}; allowed: 1 to {most}.")
    timesteps = _timesteps(config, num_inference_steps, spacing or config.timestep_spacing)
    if timesteps[0] >= config.num_train_timesteps:
        raise SettingsError(
            f"num_inference_steps is {num_inference_steps}, which with the scheduler's steps_offset "
            f"{config.steps_offset} starts at timestep {timesteps[0]}; allowed: 0 to {config.num_train_timesteps - 1}. "
            "Ask for fewer steps."
        )
    if not 0 < strength <= 1:
        raise SettingsError(f"strength is {strength}; allowed: above 0, up to 1.")
    skipped = num_inference_steps - executed_steps(num_inference_steps, strength)
    executed = timesteps[min(skipped, len(timesteps) - 1) :]  # where lambda is clipped there may be fewer
    if config.solver == "ddpm":
        ends = executed - config.num_train_timesteps // num_inference_steps
        if spacing == LOGSNR:
            ends = np.append(executed[1:], -1)
        return _ddpm_schedule(config, executed, ends)
    first_order_end = config.lower_order_final and len(timesteps) < _LOWER_ORDER_BELOW
    return _dpm_schedule(config, executed, first_order_end)


def _timesteps(config: SchedulerConfig, count: int, spacing: str) -> NDArray[np.int64]:
    """Timesteps of a run, int64 [count], falling. Three of the spacings are those of Lin et al. (2023), table 2."""
    start = _usable_steps(config, spacing)
    if spacing == "trailing":
        # Fewer than `count` where DPM-Solver++ starts lower; rounding may add a point below 0.
        timesteps = np.arange(start, 0, -config.num_train_timesteps / count).round().astype(np.int64) - 1
        return timesteps[timesteps >= 0]
    # DPM-Solver++ lays out one point more and never visits the lowest.
    points = count + (config.solver == "dpm")
    if spacing == "linspace":
        rising = np.linspace(0, start - 1, points).round().astype(np.int64)
    elif spacing == LOGSNR:
        snr = log_snr(config)[:start]
        wanted = np.linspace(snr[-1], snr[0], points)[::-1]  # a single one is the noisiest
        index = np.arange(points)
        rising = np.interp(-wanted, -snr, np.arange(start)).round().astype(np.int64)
        # Training steps are far apart in lambda at both ends: where several points fall on one, they take the next.
        rising = np.maximum.accumulate(rising - index) + index
        rising = np.minimum(rising, start - points + index)
    else:
        rising = np.arange(points) * (start // points) + config.steps_offset
    return rising[::-1][:count]


def _dpm_schedule(config: SchedulerConfig, timesteps: NDArray[np.int64], first_order_end: bool) -> Schedule:
    """DPM-Solver++(2M), midpoint (Lu et al. 2022, algorithm 2), as weights of the sample, x0 and the x0 before."""
    kept = alphas_cumprod(config).astype(np.float64)
    alpha, sigma, snr = np.sqrt(kept), np.sqrt(1 - kept), log_snr(config)
    # Each step ends where the next one starts. The last ends at t = 0, whose noise level is not 0: the reference
    # takes alpha and sigma of the first training step.
    ends = np.append(timesteps[1:], 0)
    h = snr[ends] - snr[timesteps]
    # Weight of the slope x0 - previous x0. Without history it is 0: as if the step before had been infinitely long.
    slope = 0.5 * h / np.append(np.inf, h[:-1])
    if config.solver_order == 1:
        slope[:] = 0
    if first_order_end:
        slope[-1] = 0
    gain = -alpha[ends] * np.expm1(-h)
    no_noise = np.full(len(timesteps), _NO_NOISE)
    return Schedule(
        config=config,
        timesteps=timesteps,
        **_estimate(config, alpha[timesteps], sigma[timesteps]),
        sample_weight=(sigma[ends] / sigma[timesteps]).astype(np.float32),
        x0_weight=(gain * (1 + slope)).astype(np.float32),
        previous_x0_weight=(-gain * slope).astype(np.float32),
        min_log_var=no_noise,
        max_log_var=no_noise,
    )


def _ddpm_schedule(config: SchedulerConfig, timesteps: NDArray[np.int64], ends: NDArray[np.int64]) -> Schedule:
    """DDPM from `timesteps` to `ends`, below 0 to x0 itself: Ho et al. (2020), mean by eq. 7, variance by section 3.2.

    The reference has ends at one stride everywhere, also where its spacing puts two timesteps closer or farther.
    """
    # float32 throughout: late in a run beta keeps only four digits, and the result should follow the reference's.
    kept = alphas_cumprod(config)
    kept_start = kept[timesteps]
    kept_end: FloatArray = np.where(ends >= 0, kept[ends], np.float32(1))
    beta = 1 - kept_start / kept_end
    # Upper and lower bound of the variance. The lower one is 0 in a step that ends at x0; the reference floors it.
    max_log_var = np.log(beta)
    min_log_var = np.log(np.maximum((1 - kept_end) / (1 - kept_start) * beta, 1e-20))
    if config.variance_type == "fixed_large":
        min_log_var = max_log_var
    elif config.variance_type in ("fixed_small", "fixed_small_log"):
        max_log_var = min_log_var
    return Schedule(
        config=config,
        timesteps=timesteps,
        **_estimate(config, np.sqrt(kept_start), np.sqrt(1 - kept_start)),
        sample_weight=np.sqrt(kept_start / kept_end) * (1 - kept_end) / (1 - kept_start),
        x0_weight=np.sqrt(kept_end) * beta / (1 - kept_start),
        previous_x0_weight=np.zeros(len(timesteps), np.float32),
        min_log_var=np.where(timesteps > 0, min_log_var, _NO_NOISE),
        max_log_var=np.where(timesteps > 0, max_log_var, _NO_NOISE),
    )


def _estimate(config: SchedulerConfig, alpha: NDArray[Any], sigma: NDArray[Any]) -> dict[str, FloatArray]:
    """How x0 follows from the network's output at x = alpha * x0 + sigma * noise: the noise, or v.

    v = alpha * noise - sigma * x0 (Salimans & Ho 2022, appendix D), so x0 = alpha * x - sigma * v.
    """
    if config.prediction_type == "v_prediction":
        alpha, sigma = 1 / alpha, sigma / alpha
    return {"pred_weight": sigma.astype(np.float32), "divisor": alpha.astype(np.float32)}


def add_noise(config: SchedulerConfig, clean: FloatArray, noise: FloatArray, timestep: int) -> FloatArray:
    """Noise a clean clip up to a training timestep: alpha * clean + sigma * noise (Ho et al. 2020, eq. 4)."""
    if not 0 <= timestep < config.num_train_timesteps:
        raise SettingsError(f"timestep (noise level) is {timestep}; allowed: 0 to {config.num_train_timesteps - 1}.")
    kept = alphas_cumprod(config)[timestep]
    return np.sqrt(kept) * clean + np.sqrt(1 - kept) * noise


def predict_x0(
    sample: FloatArray, pred: FloatArray, pred_weight: np.float32, divisor: np.float32, out: FloatArray
) -> None:
    """out = (sample - pred_weight * pred) / divisor; `out` may be `pred` itself."""
    np.multiply(pred, pred_weight, out=out)
    np.subtract(sample, out, out=out)
    np.divide(out, divisor, out=out)


def limit_x0(config: SchedulerConfig, x0: FloatArray, out: FloatArray) -> None:
    """Keep an estimate of the clean sample near [-1, 1] in the way the checkpoint asks for. `out` is not `x0`."""
    if config.thresholding:
        dynamic_threshold(x0, config.dynamic_thresholding_ratio, config.sample_max_value, out)
    elif config.clip_sample:
        np.clip(x0, -config.clip_sample_range, config.clip_sample_range, out=out)
    else:
        np.copyto(out, x0)


def dynamic_threshold(x0: FloatArray, ratio: float, max_value: float, out: FloatArray) -> None:
    """out = clip(x0, -s, s) / s with s = clip(quantile(|x0|, ratio), 1, max_value), for each frame on its own.

    Saharia et al. (2022), section 2.3. Infinite values, which a network in half precision may cause, become +-1.
    """
    np.clip(x0, -1, 1, out=out)  # all there is to do where s = 1
    if max_value == 1:
        return
    untouched = out == x0
    values = x0[0, :, 0].size
    # s = 1 also where the order statistics next to the quantile are among the untouched values. Counting these is
    # far cheaper than sorting, and late in a run it settles nearly every frame.
    needed = np.ceil(_quantile_position(values, ratio)) + 1
    for batch, frame in np.ndindex(x0.shape[0], x0.shape[2]):
        if np.count_nonzero(untouched[batch, :, frame]) < needed:
            raw = x0[batch, :, frame]
            s = np.clip(_quantile(np.abs(raw).ravel(), ratio), 1, max_value)
            np.divide(np.clip(raw, -s, s), s, out=out[batch, :, frame])


def _quantile_position(count: int, ratio: float) -> np.float32:
    """Where the quantile lies among `count` sorted values, counted from 0; in float32, as torch.quantile has it."""
    return np.float32(ratio) * np.float32(count - 1)


def _quantile(values: FloatArray, ratio: float) -> np.float32:
    """torch.quantile(values, ratio), interpolating linearly; [n] -> scalar. Reorders `values`."""
    position = _quantile_position(values.size, ratio)
    lower = int(position)
    values.partition(lower)  # a single rank: NumPy has vector code for that, 8 times faster than for two
    # Infinity would interpolate to NaN.
    low, high = min(values[lower], _LARGEST), values[lower + 1 :].min(initial=_LARGEST)
    return low + (high - low) * (position - np.float32(lower))


def advance(
    schedule: Schedule, index: int, sample: FloatArray, x0: FloatArray, previous_x0: FloatArray, scratch: FloatArray
) -> None:
    """Move `sample` in place over step `index`, without the step's noise: Lu et al. algorithm 2 or Ho et al. eq. 7."""
    sample *= schedule.sample_weight[index]
    sample += np.multiply(x0, schedule.x0_weight[index], out=scratch)
    if schedule.previous_x0_weight[index] != 0:
        sample += np.multiply(previous_x0, schedule.previous_x0_weight[index], out=scratch)


def noise_std(schedule: Schedule, index: int, variance_frac: FloatArray | None) -> FloatArray | np.float32:
    """Standard deviation of the noise of step `index`: a number, or [B, C, F, H, W] where the network learned it.

    `variance_frac` in [-1, 1] chooses between the bounds (Nichol & Dhariwal 2021, eq. 15); a checkpoint of variance
    type "learned" gives the variance itself.
    """
    min_log_var, max_log_var = schedule.min_log_var[index], schedule.max_log_var[index]
    if variance_frac is None or not schedule.config.learned_variance:
        return np.exp(min_log_var / 2)
    if schedule.config.variance_type == "learned":
        return np.sqrt(variance_frac)
    frac = (variance_frac + 1) / 2
    return np.exp((frac * max_log_var + (1 - frac) * min_log_var) / 2)
