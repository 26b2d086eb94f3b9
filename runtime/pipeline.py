"""A prompt in, a video out: the cascade from text to frames."""

import os
import shlex
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from engines.catalog import TOKENIZERS, networks_of
from engines.errors import BundleError, EngineError, ProfileError, SettingsError
from engines.store import Bundle
from runtime.config import INTERP_FRAMES, NEGATIVE_PROMPT, SEED, Settings, stage_sizes
from runtime.engine import EnginePool, why_unusable
from runtime.noise import NoiseStream
from runtime.ops import FloatArray, Frames, clip_to_frames
from runtime.stages.base import run_base
from runtime.stages.diffusion import Progress, scheduler_of, stage_schedule
from runtime.stages.interp import run_interp
from runtime.stages.sr1 import run_if2, run_sr1
from runtime.stages.sr2 import run_sr2
from runtime.stages.text import OnCut, run_clip_text, run_text

OnClip = Callable[[str, FloatArray], None]  # (stage, its clip)


@dataclass(frozen=True, eq=False)
class Video:
    """A finished video. `clip` is what `frames` shows before it was cut to 8 bits: float32 [1, 3, F, H, W]."""

    frames: Frames  # uint8 [F, H, W, 3]
    clip: FloatArray
    prompt: str
    negative_prompt: str
    seed: int
    settings: Settings
    cut: dict[str, str] = field(default_factory=dict)  # encoder, see OnCut -> the end it did not read

    def metadata(self) -> dict[str, Any]:
        """What it takes to make this video again, as JSON's types."""
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "seed": int(self.seed),
            "settings": self.settings.to_dict(),
        }


class Show1Pipeline:
    """The whole cascade over one bundle.

    >>> with Show1Pipeline.from_bundle("bundle") as pipeline:
    ...     video = pipeline("a panda taking a selfie", seed=345)
    >>> video.frames.shape
    (29, 320, 576, 3)

    The stages are functions of their own (`runtime.stages`) over `pipeline.engines`. Threads that call one pipeline
    wait for each other.
    """

    def __init__(self, engines: EnginePool):
        self.engines, self.settings = engines, settings_of(engines.bundle)
        self._at_work = threading.RLock()  # engines are loaded and dropped as one video needs them

    @classmethod
    def from_bundle(cls, path: str | os.PathLike[str], keep_loaded: bool = False) -> Self:
        """Open a bundle made by `python -m export build`. `keep_loaded` trades memory for faster further calls."""
        return cls(EnginePool(Bundle.open(path), keep_loaded))

    def __call__(
        self,
        prompt: str,
        *,
        negative_prompt: str = NEGATIVE_PROMPT,
        seed: int = SEED,
        settings: Settings | None = None,
        progress: Progress | None = None,
        on_cut: OnCut | None = None,
        on_clip: OnClip | None = None,
    ) -> Video:
        """Make a video of `prompt`.

        `negative_prompt` is read by the last stage; the stages before it have the empty one, as in the reference.
        `settings` start from the bundle's (`pipeline.settings`). `progress(stage, done, total)` is called after every
        step, `on_cut(encoder, text)` when a prompt is too long for a text encoder, `on_clip(stage, clip)` with every
        stage's result. Raises SettingsError for an empty prompt or impossible settings.
        """
        settings = self.settings if settings is None else settings
        if not isinstance(settings, Settings):
            raise SettingsError(f"settings {settings!r}; allowed: runtime.config.Settings, e.g. pipeline.settings.")
        check_prompt(prompt, negative_prompt)
        NoiseStream(seed)  # raises for a seed out of range
        cut: dict[str, str] = {}

        def note_cut(encoder: str, text: str) -> None:
            cut[encoder] = text
            if on_cut is not None:
                on_cut(encoder, text)

        def done(stage: str, clip: FloatArray) -> FloatArray:
            check_finite(engines.bundle, stage, clip)
            if on_clip is not None:
                on_clip(stage, clip)
            return clip

        engines = self.engines
        check_run(engines.bundle, settings)
        with self._at_work:
            text = run_text(engines, prompt, note_cut)
            check_finite(engines.bundle, "t5", text.negative, text.prompt)
            keyframes = done("base", run_base(engines, text, settings, seed, progress=progress))
            clip = done("interp", run_interp(engines, text, keyframes, settings, seed, progress))
            first_frame = done("if2", run_if2(engines, text, clip[:, :, :1], settings, seed, progress))
            clip = done("sr1", run_sr1(engines, text, clip, first_frame, settings, seed, progress))
            latent_text = run_clip_text(engines, prompt, negative_prompt, note_cut)
            check_finite(engines.bundle, "clip", latent_text.negative, latent_text.prompt)
            frames = clip_to_frames(clip)
            del clip  # some GB of a long video, which sr2 does not read
            clip = done("sr2", run_sr2(engines, latent_text, frames, settings, seed, progress))
            return Video(clip_to_frames(clip), clip, prompt, negative_prompt, seed, settings, cut)

    def close(self) -> None:
        with self._at_work:
            self.engines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def settings_of(bundle: Bundle) -> Settings:
    """A bundle's own. Raises BundleError for impossible ones."""
    try:
        return Settings.from_dict(bundle.manifest.defaults)
    except SettingsError as error:
        raise BundleError(f"{bundle.root}: its settings: {error} Build the bundle again.") from None


def check_prompt(prompt: str, negative_prompt: str = "") -> None:
    """Raises SettingsError for a prompt that says nothing, and for text that is none."""
    if not (isinstance(prompt, str) and isinstance(negative_prompt, str)):
        raise SettingsError(f"prompt {prompt!r}, negative prompt {negative_prompt!r}; allowed: text.")
    if not prompt.strip():
        raise SettingsError("the prompt is empty. Say what the video should show, in a sentence.")
    for name, text in (("prompt", prompt), ("negative prompt", negative_prompt)):
        if any(0xD800 <= ord(char) < 0xE000 for char in text):
            raise SettingsError(f"the {name} is not valid text (bytes that are not UTF-8). Type it again in UTF-8.")


def check_finite(bundle: Bundle, network: str, *made: FloatArray) -> None:
    """Raises EngineError, with what mends it, where a network made a NaN or an infinity."""
    if all(np.isfinite(array).all() for array in made):
        return
    precision = bundle.engine(network).precision
    mend = f"`python -m export check {shlex.quote(str(bundle.root))}`"
    if precision != "fp32":
        mend = f"fp32 is more exact, and has more range than fp16: {bundle.rebuild_command(network, precision='fp32')}"
    raise EngineError(f"{network}: its {precision} engines made values that are not finite. {mend}.")


def check_run(bundle: Bundle, settings: Settings) -> None:
    """Raises Show1Error for what would stop a run half-way: a missing file, a size or step count out of range."""
    for network in networks_of(["all"]):
        entry = bundle.engine(network.name)
        if entry.edited:
            raise BundleError(f"{entry.name}: {entry.edited}. Build it again: {bundle.rebuild_command(entry.name)}.")
        for file in entry.files():
            bundle.path(file)
        if reason := why_unusable(bundle, entry):
            raise BundleError(f"{entry.name}: {reason}.")
    for name in TOKENIZERS:
        bundle.tokenizer(name)
    for name, level in (("if2", settings.if2_noise_level), ("sr1", settings.sr1_noise_level)):
        steps = scheduler_of(bundle, f"{name}.noising").num_train_timesteps
        if not 0 <= level < steps:
            raise SettingsError(f"{name}_noise_level: {level}; allowed: 0 to {steps - 1}.")
    factor = bundle.engine("vae_encoder").properties["factor"]
    window = min(settings.sr1_window, settings.num_frames)
    frames = {"base": settings.keyframes, "interp": INTERP_FRAMES, "if2": 1, "sr1": window, "sr2": settings.num_frames}
    for name, (width, height) in stage_sizes(settings.size).items():
        area = {"height": height, "width": width}
        entry, stage = bundle.engine(name), getattr(settings, name)
        spec = entry.graphs["step"].spec
        try:
            if name == "sr2":
                bundle.engine("vae_encoder").graphs["encode"].spec.check_sizes("vae_encoder", area)
                area = {axis: size // factor for axis, size in area.items()}
            spec.check_sizes(name, area)
        except ProfileError as error:
            again = bundle.rebuild_command(name, stage="all", size="{}x{}".format(*settings.size))
            raise ProfileError(f"{error} Or build the engines for this one: {again}.") from None
        spec.check_sizes(name, {"frames": frames[name]})
        if stage.cache_interval > 1 and "shallow" not in entry.graphs:
            raise BundleError(f"{name}: built before steps could reuse features: {bundle.rebuild_command(name)}.")
        stage_schedule(bundle, name, stage, settings.strength if name == "sr2" else 1.0)
