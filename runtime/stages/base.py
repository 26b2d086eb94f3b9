"""Key frames in pixels from noise: the first stage of the cascade."""

from runtime.config import Settings, stage_sizes
from runtime.engine import EnginePool
from runtime.noise import NoiseStream
from runtime.ops import FloatArray
from runtime.sampler import denoise
from runtime.stages.diffusion import Progress, PromptEmbeds, prompted, stage_schedule, step_counter


def run_base(
    engines: EnginePool,
    text: PromptEmbeds,
    settings: Settings,
    seed: int,
    size: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> FloatArray:
    """Key frames, float32 [1, 3, keyframes, H, W] near [-1, 1], not clamped.

    `size` is (width, height) in pixels, by default what `settings.size` calls for (64 x 40).
    """
    width, height = size or stage_sizes(settings.size)["base"]
    schedule = stage_schedule(engines.bundle, "base", settings.base)
    noise = NoiseStream(seed)
    x = noise.normal((1, 3, settings.keyframes, height, width))
    with engines.use("base") as engine:
        return denoise(
            prompted(engine, text, settings.base.guidance_scale),
            x,
            schedule,
            guidance_scale=settings.base.guidance_scale,
            guided=settings.base.guided,
            cache_interval=settings.base.cache_interval,
            noise=noise,
            on_step=step_counter(progress, "base"),
        )
