"""Latent refinement to the final size: the clip is encoded, noised part of the way and denoised again (SDEdit)."""

import numpy as np

from runtime.config import Settings
from runtime.engine import EnginePool
from runtime.noise import NoiseStream
from runtime.ops import FloatArray, Frames, frames_to_clip, resize_frames
from runtime.sampler import OnStep, denoise
from runtime.schedulers import add_noise
from runtime.stages.diffusion import Progress, PromptEmbeds, prompted, stage_schedule, step_counter


def run_sr2(
    engines: EnginePool,
    text: PromptEmbeds,
    frames: Frames,
    settings: Settings,
    seed: int,
    progress: Progress | None = None,
) -> FloatArray:
    """Frames uint8 [F, h, w, 3] of any size -> float32 [1, 3, F, H, W] at `settings.size`, near [-1, 1], not clamped.

    `text` is CLIP's. The detour through 8 bits is the reference's.
    """
    noise = NoiseStream(seed)
    latents = draw_latents(engines, frames, settings, noise)
    latents = refine(engines, text, latents, settings, noise, step_counter(progress, "sr2"))
    return decode(engines, latents)


def draw_latents(engines: EnginePool, frames: Frames, settings: Settings, noise: NoiseStream) -> FloatArray:
    """Frames uint8 [F, h, w, 3] of any size -> latents [F, 4, H/8, W/8] of `settings.size`, unscaled."""
    mean, logvar = encode(engines, resize_frames(frames, settings.size))
    # One draw for all frames' posteriors: Kingma & Welling (2013), eq. 10.
    spread: FloatArray = np.exp(0.5 * logvar)  # said for NumPy's types from 2.5 on
    return mean + spread * noise.normal(mean.shape)


def encode(engines: EnginePool, frames: Frames) -> tuple[FloatArray, FloatArray]:
    """Frames uint8 [F, H, W, 3] -> mean and log variance of their latents [F, 4, H/8, W/8], unscaled."""
    with engines.use("vae_encoder") as engine:
        # One frame at a time: the autoencoder's activations are the largest of the cascade.
        outputs = [engine.run("encode", image=frames_to_clip(frames[i : i + 1])) for i in range(len(frames))]
    return np.concatenate([o["mean"] for o in outputs]), np.concatenate([o["logvar"] for o in outputs])


def refine(
    engines: EnginePool,
    text: PromptEmbeds,
    latents: FloatArray,
    settings: Settings,
    noise: NoiseStream,
    on_step: OnStep | None = None,
) -> FloatArray:
    """SDEdit (Meng et al. 2021) on unscaled latents [F, 4, h, w]: noise to `settings.strength`, denoise; same shape."""
    schedule = stage_schedule(engines.bundle, "sr2", settings.sr2, settings.strength)
    guidance = settings.sr2.guidance_scale
    scale = np.float32(engines.bundle.engine("vae_decoder").properties["scaling_factor"])
    with engines.use("sr2") as engine:
        x = add_noise(schedule.config, latents * scale, noise.normal(latents.shape), int(schedule.timesteps[0]))
        x = denoise(
            prompted(engine, text, guidance),
            x.swapaxes(0, 1)[None],  # [1, 4, F, h, w]
            schedule,
            guidance_scale=guidance,
            guided=settings.sr2.guided,
            cache_interval=settings.sr2.cache_interval,
            noise=noise,
            on_step=on_step,
        )
    return x[0].swapaxes(0, 1) / scale


def decode(engines: EnginePool, latents: FloatArray) -> FloatArray:
    """Unscaled latents [F, 4, h, w] -> clip float32 [1, 3, F, 8h, 8w] near [-1, 1], not clamped."""
    with engines.use("vae_decoder") as engine:
        sides = (engine.properties["factor"] * side for side in latents.shape[2:])
        clip = np.empty((1, 3, len(latents), *sides), np.float32)
        for i in range(len(latents)):
            clip[0, :, i] = engine.run("decode", latents=latents[i : i + 1])["image"][0]
    return clip
