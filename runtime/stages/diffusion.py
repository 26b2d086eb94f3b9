"""What the diffusion stages share: an engine with its prompt as a function that the sampler can call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from engines.catalog import DEEP, predictions
from engines.errors import BundleError, SettingsError
from engines.store import Bundle
from runtime.config import StageSettings
from runtime.engine import Engine
from runtime.ops import FloatArray
from runtime.runner import Loop, LoopStart
from runtime.sampler import OnStep
from runtime.schedulers import Schedule, SchedulerConfig, make_schedule

Progress = Callable[[str, int, int], None]  # (stage, steps done, steps in all)


@dataclass(frozen=True)
class PromptEmbeds:
    """Encoded text of one prompt and of its negative, float32 [1, L, D] each."""

    prompt: FloatArray
    negative: FloatArray


def scheduler_of(bundle: Bundle, name: str) -> SchedulerConfig:
    """A stage's published scheduler; `name` is a UNet's, or "sr1.noising" for the one that noises its condition."""
    if name not in bundle.manifest.schedulers:
        again = bundle.rebuild_command(name.removesuffix(".noising"))
        raise BundleError(f"{bundle.root}: no scheduler for {name}. Build its stage: {again}.")
    return SchedulerConfig.from_dict(bundle.manifest.schedulers[name], f"{bundle.root}: scheduler of {name}")


def stage_schedule(bundle: Bundle, name: str, stage: StageSettings, strength: float = 1.0) -> Schedule:
    """The steps of one denoising loop. Raises SettingsError, naming the stage, where they are impossible."""
    try:
        return make_schedule(scheduler_of(bundle, name), stage.num_inference_steps, strength, stage.spacing)
    except SettingsError as error:
        raise SettingsError(f"{name}: {error}") from None


class PromptedUnet:
    """A UNet with its prompt: a `sampler.Unet`, and where the backend can, a loop on its device."""

    def __init__(self, engine: Engine, context: Mapping[str, FloatArray]):
        """`context` [G * clips, ...] is what the prompt contributes."""
        self._engine, self._context = engine, context
        self._deep: FloatArray | None = None

    def __call__(
        self, sample: FloatArray, timestep: int, whole: bool | None = None
    ) -> tuple[FloatArray, FloatArray | None]:
        feeds = {name: value[-len(sample) :] for name, value in self._context.items()}  # the prompt's are the last
        feeds |= {"sample": sample, "timestep": np.full(len(sample), timestep, np.float32)}
        if whole is False:
            assert self._deep is not None, "the first step is whole"
            feeds[DEEP] = self._deep
            read = [binding.name for binding in self._engine.specs["shallow"].inputs]
            outputs = self._engine.run("shallow", **{name: feeds[name] for name in read})
        else:
            wanted = None if whole else predictions(self._engine.specs["step"])
            outputs = self._engine.run("step", wanted, **feeds)
            self._deep = outputs.get(DEEP)
        return outputs["noise_pred"], outputs.get("variance_frac")

    def start_loop(self, start: LoopStart) -> Loop | None:
        return self._engine.start_loop(start, self._context)


def prompted(
    engine: Engine, text: PromptEmbeds, guidance_scale: float, clips: int = 1, noise_level: int | None = None
) -> PromptedUnet:
    """The engine with one prompt, for `clips` clips side by side; the prompt's part is computed here, once.

    `noise_level` is the training timestep that super-resolution networks are told their condition was noised to.
    """
    embeds = np.concatenate([text.negative, text.prompt]) if guidance_scale > 1 else text.prompt
    feeds = {"prompt_embeds": embeds}
    if engine.properties["noise_level"]:
        feeds["noise_level"] = np.full(len(embeds), noise_level or 0, np.float32)
    # Negative and prompt once per clip, in the sampler's order: [negative] * clips + [prompt] * clips.
    context = {name: np.repeat(value, clips, axis=0) for name, value in engine.run("context", **feeds).items()}
    return PromptedUnet(engine, context)


def step_counter(progress: Progress | None, stage: str, part: int = 0, parts: int = 1) -> OnStep | None:
    """Progress of loop `part` of a stage that runs `parts` loops of equal length."""
    if progress is None:
        return None
    return lambda index, steps, _: progress(stage, part * steps + index + 1, parts * steps)
