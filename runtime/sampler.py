"""The denoising loop, the same for all five stages: network, guidance, estimate of the clean sample, solver step."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from engines.errors import BundleError
from runtime.config import ALL_STEPS, Interval
from runtime.noise import NoiseStream
from runtime.ops import FloatArray
from runtime.runner import Loop, LoopStart
from runtime.schedulers import Schedule, advance, limit_x0, noise_std, predict_x0


class Unet(Protocol):
    """(sample [G*B, C+K, F, H, W], timestep) -> (noise_pred, variance_frac), each [G*B, C, F, H, W].

    `whole` is given in loops that reuse deep features: True to compute and keep them, False to take those kept.
    """

    def __call__(
        self, sample: FloatArray, timestep: int, whole: bool | None = None
    ) -> tuple[FloatArray, FloatArray | None]: ...


OnStep = Callable[[int, int, FloatArray], None]  # (index, steps, x)


@runtime_checkable
class LoopingUnet(Protocol):
    """A Unet that may be able to run the loop where it is itself; None where it is not."""

    def start_loop(self, start: LoopStart) -> Loop | None: ...


def guidance_scales(count: int, scale: float, guided: Interval = ALL_STEPS) -> FloatArray:
    """The guidance scale of each of `count` steps, float32 [count]: 1, which is none, outside the interval `guided`.

    `guided` (begin, end) are shares of the steps, 0 before the first and 1 after the last; a step whose middle lies
    between them is guided. Kynkäänniemi et al. (2024, arXiv 2404.07724) find guidance harmful at high noise levels,
    unnecessary at low ones and useful in between; an unguided step is half the network's work.
    """
    begin, end = guided
    middles = (np.arange(count) + 0.5) / count
    return np.where((begin <= middles) & (middles < end) & (scale > 1), scale, 1).astype(np.float32)


def whole_steps(guidance: FloatArray, interval: int) -> NDArray[np.bool_]:
    """Which steps run the whole network, bool [N]: every `interval`-th, and where guidance begins or ends.

    The steps between take what the coarser levels said in the last whole one: it changes slowly (DeepCache: Ma et al.
    2023, arXiv 2312.00858).
    """
    whole = np.empty(len(guidance), bool)
    last = 0
    for index, scale in enumerate(guidance):
        turned = index > 0 and (scale > 1) != (guidance[index - 1] > 1)  # deep features are of another batch
        whole[index] = index == 0 or turned or index - last >= interval
        last = index if whole[index] else last
    return whole


def denoise(
    unet: Unet,
    x: FloatArray,
    schedule: Schedule,
    *,
    guidance_scale: float,
    guided: Interval = ALL_STEPS,
    cache_interval: int = 1,
    noise: NoiseStream | None = None,
    condition: FloatArray | None = None,
    on_step: OnStep | None = None,
) -> FloatArray:
    """Take x, float32 [B, C, F, H, W], through all steps of the schedule and return the result in a new array.

    Above guidance 1 the network sees the batch twice (G = 2), first for the negative prompt, then for the prompt; in
    steps outside the interval `guided` (see `guidance_scales`) once, for the prompt. Every `cache_interval`-th step
    runs the whole network (see `whole_steps`).
    `condition` [B, K, F, H, W] follows the sample's channels in every step. DDPM draws from `noise`.
    `on_step(index, total, x)` is called after each step; copy its x to keep it, the next step overwrites it.
    """
    if noise is None and schedule.adds_noise(0):
        raise ValueError("a DDPM schedule adds noise in its steps: pass a NoiseStream")
    guidance = guidance_scales(len(schedule), guidance_scale, guided)
    whole = whole_steps(guidance, cache_interval)
    start = LoopStart(x, schedule, guidance, whole, condition)
    if isinstance(unet, LoopingUnet) and (loop := unet.start_loop(start)):
        return _denoise_on_device(loop, schedule, noise, x.shape, on_step)
    reuse: list[dict[str, bool]] = [{} if whole.all() else {"whole": flag} for flag in whole.tolist()]
    batch, channels, frames, height, width = x.shape
    # What is as large as x is allocated here once; the steps only overwrite it.
    x = np.array(x, np.float32, order="C")
    x0, previous_x0, scratch = np.empty_like(x), np.empty_like(x), np.empty_like(x)
    extra = 0 if condition is None else condition.shape[1]
    halves = np.empty((2 if guidance.max() > 1 else 1, batch, channels + extra, frames, height, width), np.float32)
    if condition is not None:
        halves[:, :, channels:] = condition

    for index, timestep in enumerate(schedule.timesteps):
        seen = halves if guidance[index] > 1 else halves[:1]
        seen[:, :, :channels] = x
        network_input = seen.reshape(-1, *seen.shape[2:])  # the same memory as [G*B, C+K, F, H, W]
        noise_pred, variance_frac = unet(network_input, int(timestep), **reuse[index])
        _check_outputs(noise_pred, variance_frac, (len(network_input), *x.shape[1:]), schedule)
        if guidance[index] > 1:
            noise_pred = _guide(noise_pred[:batch], noise_pred[batch:], guidance[index], out=scratch)
        predict_x0(x, noise_pred, schedule.pred_weight[index], schedule.divisor[index], out=scratch)
        limit_x0(schedule.config, scratch, out=x0)
        advance(schedule, index, x, x0, previous_x0, scratch)
        if noise is not None and schedule.adds_noise(index):
            # The guided variance is the prompt's, the last B of the network's batch.
            std = noise_std(schedule, index, None if variance_frac is None else variance_frac[-batch:])
            x += std * _draw(noise, x.shape).swapaxes(0, 1)
        x0, previous_x0 = previous_x0, x0
        if on_step is not None:
            on_step(index, len(schedule), x)
    return x


def _denoise_on_device(
    loop: Loop, schedule: Schedule, noise: NoiseStream | None, shape: tuple[int, ...], on_step: OnStep | None
) -> FloatArray:
    for index in range(len(schedule)):
        loop.step(_draw(noise, shape) if noise is not None and schedule.adds_noise(index) else None)
        if on_step is not None:
            on_step(index, len(schedule), loop.sample())
    return loop.sample().copy()


def _draw(noise: NoiseStream, shape: tuple[int, ...]) -> FloatArray:
    """Noise for a step of a sample [B, C, F, H, W]: [F, C, H, W].

    The reference draws with frames as the batch. It runs one clip at a time, always from the same seed: clips batched
    here share each draw.
    """
    _, channels, frames, height, width = shape
    return noise.normal((frames, channels, height, width))


def _guide(negative: FloatArray, positive: FloatArray, scale: np.float32, out: FloatArray) -> FloatArray:
    """Classifier-free guidance (Ho & Salimans 2022): away from the negative prompt's prediction, [B, C, F, H, W]."""
    np.subtract(positive, negative, out=out)
    np.multiply(out, scale, out=out)
    return np.add(out, negative, out=out)


def _check_outputs(
    noise_pred: FloatArray, variance_frac: FloatArray | None, expected: tuple[int, ...], schedule: Schedule
) -> None:
    if noise_pred.shape != expected:
        raise BundleError(f"the engine gave noise_pred {noise_pred.shape}; this run needs {expected}.")
    if schedule.config.learned_variance and (variance_frac is None or variance_frac.shape != expected):
        given = "no variance_frac" if variance_frac is None else f"variance_frac {variance_frac.shape}"
        raise BundleError(
            f"the engine gave {given}; the scheduler's variance_type {schedule.config.variance_type!r} needs "
            f"{expected}. Build the bundle again from the checkpoint that this scheduler belongs to."
        )
