"""Pixel super-resolution, four times as wide and high: first frame by DeepFloyd IF-II, the clip window by window."""

import numpy as np

from engines.store import Bundle
from runtime.config import SR1_SCALE, Settings, StageSettings
from runtime.engine import EnginePool
from runtime.noise import NoiseStream
from runtime.ops import FloatArray, resize_bilinear
from runtime.sampler import OnStep, Unet, denoise
from runtime.schedulers import add_noise
from runtime.stages.diffusion import Progress, PromptEmbeds, prompted, scheduler_of, stage_schedule, step_counter


def run_if2(
    engines: EnginePool,
    text: PromptEmbeds,
    image: FloatArray,
    settings: Settings,
    seed: int,
    progress: Progress | None = None,
) -> FloatArray:
    """One frame [1, 3, 1, H, W] -> float32 [1, 3, 1, 4H, 4W]."""
    stage, level = settings.if2, settings.if2_noise_level
    with engines.use("if2") as engine:
        unet = prompted(engine, text, stage.guidance_scale, noise_level=level)
        return upscale(engines.bundle, "if2", unet, image, None, stage, level, seed, step_counter(progress, "if2"))


def run_sr1(
    engines: EnginePool,
    text: PromptEmbeds,
    clip: FloatArray,
    first_frame: FloatArray,
    settings: Settings,
    seed: int,
    progress: Progress | None = None,
) -> FloatArray:
    """Clip [1, 3, F, H, W] and its upscaled first frame [1, 3, 1, 4H, 4W] -> float32 [1, 3, F, 4H, 4W].

    Windows follow each other: each starts on the last frame of the one before. The last may be shorter.
    """
    stage, level = settings.sr1, settings.sr1_noise_level
    frames = clip.shape[2]
    out = np.empty((1, 3, frames, *first_frame.shape[3:]), np.float32)
    starts = range(0, max(1, frames - 1), settings.sr1_window - 1)
    with engines.use("sr1") as engine:
        unet = prompted(engine, text, stage.guidance_scale, noise_level=level)
        for number, start in enumerate(starts):
            window = np.s_[:, :, start : start + settings.sr1_window]
            on_step = step_counter(progress, "sr1", number, len(starts))
            # The shared frame is generated again and overwritten, as in the reference.
            out[window] = upscale(engines.bundle, "sr1", unet, clip[window], first_frame, stage, level, seed, on_step)
            first_frame = out[window][:, :, -1:]
    return out


def upscale(
    bundle: Bundle,
    name: str,
    unet: Unet,
    clip: FloatArray,
    first_frame: FloatArray | None,
    stage: StageSettings,
    noise_level: int,
    seed: int,
    on_step: OnStep | None = None,
) -> FloatArray:
    """One window [1, 3, F, H, W] -> float32 [1, 3, F, 4H, 4W] by the network `name` ("if2" or "sr1").

    The condition is the clip resized and noised to `noise_level` (Ho et al. 2021, conditioning augmentation), with
    `first_frame` [1, 3, 1, 4H, 4W], if any, in front: clean, although the network is told the same level.
    """
    size = (clip.shape[3] * SR1_SCALE, clip.shape[4] * SR1_SCALE)
    noise = NoiseStream(seed)
    x = noise.normal((*clip.shape[:3], *size))
    condition = add_noise(
        scheduler_of(bundle, f"{name}.noising"), resize_bilinear(clip, size), noise.normal(x.shape), noise_level
    )
    if first_frame is not None:
        condition[:, :, :1] = first_frame
    return denoise(
        unet,
        x,
        stage_schedule(bundle, name, stage),
        guidance_scale=stage.guidance_scale,
        guided=stage.guided,
        cache_interval=stage.cache_interval,
        noise=noise,
        condition=condition,
        on_step=on_step,
    )
