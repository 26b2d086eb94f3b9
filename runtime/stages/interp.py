"""Three new frames between every two key frames, all gaps in one batch."""

import numpy as np

from runtime.config import INTERP_FRAMES, Settings
from runtime.engine import EnginePool
from runtime.noise import NoiseStream
from runtime.ops import FloatArray, cross_fade
from runtime.sampler import denoise
from runtime.stages.diffusion import Progress, PromptEmbeds, prompted, stage_schedule, step_counter


def run_interp(
    engines: EnginePool,
    text: PromptEmbeds,
    keyframes: FloatArray,
    settings: Settings,
    seed: int,
    progress: Progress | None = None,
) -> FloatArray:
    """Key frames [1, 3, N, H, W] -> float32 [1, 3, 4(N-1)+1, H, W].

    The gaps read the key frames only, never each other, and share seed and noise: as a batch they give what the
    reference computes one by one. As there, the key frames themselves are generated anew.
    """
    # Drawn apart, as in the reference: noise that the steps add (DDPM) starts the seed's stream again.
    init_noise = NoiseStream(seed).normal((1, keyframes.shape[1], INTERP_FRAMES, *keyframes.shape[3:]))
    gaps = fill_gaps(engines, text, keyframes[0], settings, seed, init_noise, progress)
    # Every gap's last frame is overwritten by the next gap's first.
    return np.concatenate([*gaps[:, :, :-1], gaps[-1, :, -1:]], axis=1)[None]


def fill_gaps(
    engines: EnginePool,
    text: PromptEmbeds,
    keyframes: FloatArray,
    settings: Settings,
    seed: int,
    init_noise: FloatArray | None = None,
    progress: Progress | None = None,
) -> FloatArray:
    """The N-1 gaps of key frames [3, N, H, W], ends included: float32 [N-1, 3, 5, H, W].

    `init_noise` [1, 3, 5, H, W] replaces the seed's first draw, which all gaps share.
    """
    channels, count, height, width = keyframes.shape
    ends = keyframes.swapaxes(0, 1)  # [N, 3, H, W]
    fade = cross_fade(ends[:-1], ends[1:], INTERP_FRAMES)
    mask = np.zeros((1, 1, INTERP_FRAMES, 1, 1), np.float32)
    mask[:, :, [0, -1]] = 1  # frames that are given
    condition = np.concatenate([fade, np.broadcast_to(mask, (count - 1, 1, *fade.shape[2:]))], axis=1)

    guidance = settings.interp.guidance_scale
    schedule = stage_schedule(engines.bundle, "interp", settings.interp)
    filled = []
    with engines.use("interp") as engine:
        spec = engine.specs["step"]
        at_once = spec.samples_at_once(frames=INTERP_FRAMES, height=height, width=width)
        most = max(1, min(spec.profile["batch"].max, at_once) // (2 if guidance > 1 else 1))
        batches = np.array_split(condition, -(-(count - 1) // most))  # alike: another size is another loop on a card
        for number, batch in enumerate(batches):
            noise = NoiseStream(seed)
            shape = (1, channels, INTERP_FRAMES, height, width)
            x = noise.normal(shape) if init_noise is None else init_noise
            filled.append(
                denoise(
                    prompted(engine, text, guidance, clips=len(batch)),
                    np.repeat(x, len(batch), axis=0),
                    schedule,
                    guidance_scale=guidance,
                    guided=settings.interp.guided,
                    cache_interval=settings.interp.cache_interval,
                    noise=noise,
                    condition=batch,
                    on_step=step_counter(progress, "interp", number, len(batches)),
                )
            )
    return np.concatenate(filled)
