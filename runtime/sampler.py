"""The denoising loop, the same for all five stages: network, guidance, estimate of the clean sample, solver step."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np

from engines.errors import BundleError
from runtime.noise import NoiseStream
from runtime.runner import Loop
from runtime.schedulers import FloatArray, Schedule, advance, limit_x0, noise_std, predict_x0

# (sample [G*B, C+K, F, H, W], timestep) -> (noise_pred, variance_frac), each [G*B, C, F, H, W]
Unet = Callable[[FloatArray, int], tuple[FloatArray, FloatArray | None]]

OnStep = Callable[[int, int, FloatArray], None]  # (index, steps, x)


@runtime_checkable
class LoopingUnet(Protocol):
    """A Unet that may be able to run the loop where it is itself; None where it is not."""

    def start_loop(
        self, x: FloatArray, schedule: Schedule, guidance_scale: float, condition: FloatArray | None
    ) -> Loop | None: ...


def denoise(
    unet: Unet,
    x: FloatArray,
    schedule: Schedule,
    *,
    guidance_scale: float,
    noise: NoiseStream | None = None,
    condition: FloatArray | None = None,
    on_step: OnStep | None = None,
) -> FloatArray:
    """Take x, float32 [B, C, F, H, W], through all steps of the schedule and return the result in a new array.

    Above guidance 1 the network sees the batch twice (G = 2), first for the negative prompt, then for the prompt.
    `condition` [B, K, F, H, W] follows the sample's channels in every step. DDPM draws from `noise`.
    `on_step(index, total, x)` is called after each step; copy its x to keep it, the next step overwrites it.
    """
    if noise is None and schedule.adds_noise(0):
        raise ValueError("a DDPM schedule adds noise in its steps: pass a NoiseStream")
    if isinstance(unet, LoopingUnet) and (loop := unet.start_loop(x, schedule, guidance_scale, condition)):
        return _denoise_on_device(loop, schedule, noise, x.shape, on_step)
    batch, channels, frames, height, width = x.shape
    guided = guidance_scale > 1
    # What is as large as x is allocated here once; the steps only overwrite it.
    x = np.array(x, np.float32, order="C")
    x0, previous_x0, scratch = np.empty_like(x), np.empty_like(x), np.empty_like(x)
    extra = 0 if condition is None else condition.shape[1]
    halves = np.empty((2 if guided else 1, batch, channels + extra, frames, height, width), np.float32)
    if condition is not None:
        halves[:, :, channels:] = condition
    network_input = halves.reshape(-1, *halves.shape[2:])  # the same memory as [G*B, C+K, F, H, W]

    for index, timestep in enumerate(schedule.timesteps):
        halves[:, :, :channels] = x
        noise_pred, variance_frac = unet(network_input, int(timestep))
        _check_outputs(noise_pred, variance_frac, (len(network_input), *x.shape[1:]), schedule)
        if guided:
            noise_pred = _guide(noise_pred[:batch], noise_pred[batch:], guidance_scale, out=scratch)
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


def _guide(negative: FloatArray, positive: FloatArray, guidance_scale: float, out: FloatArray) -> FloatArray:
    """Classifier-free guidance (Ho & Salimans 2022): away from the negative prompt's prediction, [B, C, F, H, W]."""
    np.subtract(positive, negative, out=out)
    np.multiply(out, np.float32(guidance_scale), out=out)
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
