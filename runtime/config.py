"""Settings of a run. The reference's values stand here once, with their source; presets change what they name."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral
from typing import Any

from engines.catalog import UNETS
from engines.errors import SettingsError
from runtime.schedulers import SPACINGS

DIFFUSION_STAGES = UNETS  # each is named after its network

SEED = 345  # the authors' script's
NEGATIVE_PROMPT = "low resolution, blur"  # for the latent stage; the pixel stages have the empty one

INTERP_FRAMES = 5  # of one gap: two keyframes and three new frames between them
SR1_SCALE = 4
_LARGEST = 8192  # pixels: what is larger was not meant

Interval = tuple[float, float]  # (begin, end) as shares of a run's steps
ALL_STEPS: Interval = (0.0, 1.0)


@dataclass(frozen=True)
class StageSettings:
    """Settings of a denoising stage.

    `guided` is the part of its steps that guidance is applied in, `spacing` how they are spread over the noise levels
    (one of `runtime.schedulers.SPACINGS`; None: as the checkpoint's scheduler says). Every `cache_interval`-th step
    runs the whole network, those between reuse what its coarser levels said (`runtime.sampler.whole_steps`).
    """

    num_inference_steps: int
    guidance_scale: float
    guided: Interval = ALL_STEPS
    spacing: str | None = None
    cache_interval: int = 1

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "StageSettings":
        try:
            return cls(**{**data, "guided": tuple(data.get("guided", ALL_STEPS))})
        except TypeError as error:  # a field too many or too few
            raise SettingsError(f"settings of a stage that this version does not read ({error}).") from None


@dataclass(frozen=True)
class Settings:
    """Everything that shapes a video but its prompt and seed.

    Defaults are the authors' run_inference.py (Show-1 repository); sr2's guidance is their pipeline's default, which
    the script does not override.
    """

    base: StageSettings = StageSettings(75, 9.0)
    interp: StageSettings = StageSettings(75, 4.0)
    if2: StageSettings = StageSettings(70, 4.0)
    sr1: StageSettings = StageSettings(125, 7.0)
    sr2: StageSettings = StageSettings(50, 15.0)
    keyframes: int = 8
    size: tuple[int, int] = (576, 320)  # (width, height) of the finished video, pixels
    strength: float = 0.8  # share of sr2's steps that are run (SDEdit)
    if2_noise_level: int = 150  # training timestep up to which the low-resolution image is noised
    sr1_noise_level: int = 250
    sr1_window: int = 8  # frames; successive windows share one
    fps: int = 8

    def __post_init__(self) -> None:
        try:
            self._check()
        except (TypeError, ValueError, AttributeError) as error:  # values of other types
            raise SettingsError(f"settings that cannot be read ({error}): {self!r}.") from None

    def _check(self) -> None:
        for name in DIFFUSION_STAGES:
            stage = getattr(self, name)
            if not _whole(stage.num_inference_steps, 1):
                raise SettingsError(f"steps of {name}: {stage.num_inference_steps}; allowed: 1 or more.")
            if stage.spacing not in (None, *SPACINGS):
                raise SettingsError(f"spacing of {name}: {stage.spacing!r}; allowed: {', '.join(SPACINGS)}.")
            if not 0 <= stage.guidance_scale <= 1000:
                raise SettingsError(f"guidance of {name}: {stage.guidance_scale}; allowed: 0 to 1000 (1 turns it off).")
            if not _whole(stage.cache_interval, 1):
                raise SettingsError(f"cache interval of {name}: {stage.cache_interval}; allowed: 1 (none) or more.")
            begin, end = stage.guided
            if not 0 <= begin <= end <= 1:
                raise SettingsError(
                    f"guided part of {name}: {begin:g}-{end:g}; allowed: BEGIN-END from 0 to 1, shares of its steps."
                )
        if not _whole(self.keyframes, 2):
            raise SettingsError(f"keyframes: {self.keyframes}; allowed: 2 or more (N keyframes give 4(N-1)+1 frames).")
        for name in ("if2_noise_level", "sr1_noise_level"):
            if not _whole(level := getattr(self, name), 0):
                raise SettingsError(f"{name}: {level!r}; allowed: a timestep of the training, 0 or more.")
        if not 0 < self.strength <= 1:
            raise SettingsError(f"strength: {self.strength}; allowed: above 0, up to 1.")
        if not _whole(self.sr1_window, 2):
            raise SettingsError(f"sr1_window: {self.sr1_window}; allowed: 2 or more frames.")
        if not 1 <= self.fps <= 1000:
            raise SettingsError(f"fps: {self.fps}; allowed: 1 to 1000.")
        if len(self.size) != 2 or not all(_whole(side, 1) for side in self.size):
            raise SettingsError(f"size: {self.size!r}; allowed: (width, height) in pixels.")
        stage_sizes(self.size)

    @property
    def num_frames(self) -> int:
        return (INTERP_FRAMES - 1) * (self.keyframes - 1) + 1

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Settings":
        """Inverse of `to_dict`, as stored in a bundle's manifest."""
        if not isinstance(data, Mapping):
            raise SettingsError(f"settings {data!r}; allowed: what `to_dict` gave.")
        unknown = set(data) - {field.name for field in fields(cls)}
        if unknown:
            raise SettingsError(f"unknown settings: {', '.join(sorted(unknown))}.")
        values = dict(data)
        for name in DIFFUSION_STAGES:
            if name in values:
                values[name] = StageSettings.from_dict(values[name])
        if isinstance(values.get("size"), list):
            values["size"] = tuple(values["size"])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """As JSON's types, NumPy's numbers and arrays among them."""
        return json.loads(json.dumps(asdict(self), default=lambda value: value.tolist()))

    def with_preset(self, preset: str) -> "Settings":
        if preset not in PRESETS:
            raise SettingsError(f"unknown preset {preset!r}; allowed: {', '.join(PRESETS)}.")
        settings = self
        for field, values in _PRESETS[preset].items():
            settings = settings._with_stages(field, values)
        return settings

    def with_options(
        self, *, preset: str, keyframes: int | None = None, size: str | None = None, **by_stage: str | None
    ) -> "Settings":
        """As the options of a command line say, `by_stage` those of `STAGE_OPTIONS`; None leaves what is.

        E.g. keyframes 8, size "576x320", steps "base=75,sr1=125".
        """
        if unknown := by_stage.keys() - STAGE_OPTIONS.keys():
            raise SettingsError(
                f"unknown option {', '.join(sorted(unknown))}; allowed: preset, keyframes, size, "
                f"{', '.join(STAGE_OPTIONS)}."
            )
        settings = self.with_preset(preset)
        for option, text in by_stage.items():
            field = STAGE_OPTIONS[option][0]
            if text is not None:
                settings = settings._with_stages(field, _stage_values(option, text))
        if keyframes is not None:
            settings = replace(settings, keyframes=keyframes)
        if size is not None:
            settings = replace(settings, size=parse_size(size))
        return settings

    def with_steps(self, steps: Mapping[str, int]) -> "Settings":
        return self._with_stages("num_inference_steps", steps)

    def with_guidance(self, guidance: Mapping[str, float]) -> "Settings":
        return self._with_stages("guidance_scale", guidance)

    def with_guided(self, guided: Mapping[str, Interval]) -> "Settings":
        return self._with_stages("guided", guided)

    def with_spacing(self, spacing: Mapping[str, str | None]) -> "Settings":
        return self._with_stages("spacing", spacing)

    def with_cache(self, intervals: Mapping[str, int]) -> "Settings":
        return self._with_stages("cache_interval", intervals)

    def _with_stages(self, field: str, values: Mapping[str, Any]) -> "Settings":
        unknown = set(values) - set(DIFFUSION_STAGES)
        if unknown:
            raise SettingsError(f"unknown stage {', '.join(sorted(unknown))}; allowed: {', '.join(DIFFUSION_STAGES)}.")
        return replace(self, **{name: replace(getattr(self, name), **{field: n}) for name, n in values.items()})


# Preset -> field of StageSettings -> stage -> value.
_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "reference": {},  # as the bundle says
    "quick": {"num_inference_steps": {"interp": 50, "if2": 50, "sr1": 50}},  # the authors' demo, app.py
    "fast": {
        "num_inference_steps": {"base": 30, "interp": 20, "if2": 20, "sr1": 20, "sr2": 25},
        # Not sr2, whose `strength` skips a share of the steps: spaced by log-SNR they begin at more noise.
        "spacing": {"base": "logsnr", "interp": "logsnr", "if2": "logsnr", "sr1": "logsnr"},
        # The prompt decides early; base, the only stage that starts from nothing, follows it longest.
        "guided": {"base": (0, 0.8), "interp": (0, 0.5), "if2": (0, 0.5), "sr1": (0, 0.5), "sr2": (0, 0.5)},
        "cache_interval": {"interp": 2, "sr1": 2},  # most of the work, and they add detail to what base has decided
    },
    # A look at a prompt and a seed, no more.
    "draft": {"num_inference_steps": {"base": 6, "interp": 4, "if2": 6, "sr1": 3, "sr2": 4}},
}
PRESETS = tuple(_PRESETS)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def parse_size(text: str) -> tuple[int, int]:
    """ "576x320" -> (576, 320)."""
    match = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})", text.strip())
    if not match:
        raise SettingsError(f"size {text!r}; allowed: WIDTHxHEIGHT, e.g. 576x320.")
    return int(match[1]), int(match[2])


def parse_interval(text: str) -> Interval:
    """ "0.1-0.6" -> (0.1, 0.6), "0.5" -> (0.0, 0.5). Raises ValueError."""
    begin, dash, end = text.partition("-")
    return (float(begin), float(end)) if dash else (0.0, float(begin))


def _word(text: str) -> str:
    if not text.strip():
        raise ValueError
    return text.strip()


# Option -> field of StageSettings, how a value is read, its form and an example.
STAGE_OPTIONS: dict[str, tuple[str, Callable[[str], Any], str, str]] = {
    "steps": ("num_inference_steps", int, "NUMBER", "base=75,sr1=125"),
    "guidance": ("guidance_scale", float, "NUMBER", "base=9,sr2=15"),
    "guided": ("guided", parse_interval, "END or BEGIN-END as shares of the steps", "base=0.5,sr1=0.1-0.6"),
    "spacing": ("spacing", _word, "SPACING", "sr1=logsnr"),
    "cache": ("cache_interval", int, "NUMBER", "sr1=2"),
}


def _stage_values(option: str, text: str) -> dict[str, Any]:
    """ "base=75,sr1=125" -> {"base": 75, "sr1": 125}. Raises SettingsError with the option's form and example."""
    _, kind, form, example = STAGE_OPTIONS[option]
    values = {}
    for part in text.split(","):
        stage, _, value = part.partition("=")
        stage = stage.strip()
        if stage in values:
            raise SettingsError(f"{option} {text!r} names {stage} twice; allowed: every stage once, e.g. {example}.")
        try:
            values[stage] = kind(value)
        except ValueError:
            raise SettingsError(
                f"{option} {part!r}; allowed: STAGE={form}, stages {', '.join(DIFFUSION_STAGES)}, e.g. {example}."
            ) from None
    return values


def stage_sizes(size: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """(width, height) in pixels that each UNet's stage works at, for a finished video of `size`.

    Keeps the reference's ratios, 64 x 40 becomes 256 x 160, then 576 x 320, but for the rounding of the key frames'
    sides to multiples of 8, which every published network takes.
    """
    width, height = size
    if width % 8 or height % 8 or not (64 <= width <= _LARGEST and 64 <= height <= _LARGEST):
        raise SettingsError(
            f"size {width}x{height}; allowed: width and height in multiples of 8, from 64 to {_LARGEST}."
        )
    base = (max(8, round(width / 72) * 8), max(8, round(height / 64) * 8))
    sr1 = (base[0] * SR1_SCALE, base[1] * SR1_SCALE)
    return {"base": base, "interp": base, "if2": sr1, "sr1": sr1, "sr2": size}
