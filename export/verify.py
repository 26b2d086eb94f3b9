"""`export verify`: a bundle's engines against reference data made by the authors' code, case by case.

The reference is any folder of the format described in `tests/golden/README.md`: `meta.json` with the settings,
`models/` with the checkpoint, and NPZ files with inputs and expected outputs. Any file and any array may be absent: the
cases that need it are left out. A setting is read where a case needs it.
"""

import contextlib
import json
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.catalog import CATALOG, UNETS, predictions
from engines.compile_ort import BACKEND
from engines.errors import CheckpointError, ProfileError
from engines.manifest import EngineEntry
from engines.spec import INT8
from engines.store import Bundle
from export.config_file import read_config
from export.configs import NOISING, SCHEDULERS
from runtime.config import Settings, StageSettings
from runtime.engine import Engine, EnginePool
from runtime.noise import NoiseStream
from runtime.ops import clip_to_frames, resize_frames
from runtime.sampler import OnStep, denoise
from runtime.schedulers import SchedulerConfig, add_noise, alphas_cumprod, log_snr, make_schedule
from runtime.stages.base import run_base
from runtime.stages.diffusion import PromptEmbeds, prompted, scheduler_of
from runtime.stages.interp import fill_gaps, run_interp
from runtime.stages.sr1 import run_if2, upscale
from runtime.stages.sr2 import decode, encode, refine
from runtime.stages.text import MAX_TOKENS, run_clip_text, run_text
from runtime.tokenizer import Tokenizer, normalize_t5_prompt

Array = NDArray[Any]


@dataclass(frozen=True)
class Row:
    """One comparison. `mean_tolerance` is set where errors grow so unevenly that the largest alone says little."""

    case: str
    max_error: float
    mean_error: float
    tolerance: float
    mean_tolerance: float = np.inf

    @property
    def ok(self) -> bool:
        return self.max_error <= self.tolerance and self.mean_error <= self.mean_tolerance  # False for NaN


def _compare(
    case: str, actual: Array, expected: Array | None, tolerance: float, mean_tolerance: float = np.inf
) -> Iterator[Row]:
    """The row of a case, or none where the reference does not say what to expect."""
    if expected is None:
        return
    if actual.shape != expected.shape:
        raise CheckpointError(f"{case}: the bundle gives shape {actual.shape}, the reference has {expected.shape}.")
    error = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    yield Row(case, float(error.max()), float(error.mean()), tolerance, mean_tolerance)


def _uint8_tolerance(tolerance: float) -> float:
    """Truncation to 8 bits turns any difference into a step of one, and larger ones into several."""
    return 1 + np.floor(tolerance * 127.5)


# --- the reference folder


class _Absent(KeyError):
    """The reference lacks the input of a case."""


def _where_present(rows: Iterator[Row]) -> Iterator[Row]:
    """The rows up to the first that would need an absent array."""
    with contextlib.suppress(_Absent):
        yield from rows


class Arrays(dict[str, Array]):
    """The arrays of one file. Cases read what they need with `[]`, which ends the case if it is absent."""

    def __missing__(self, key: str) -> Array:
        raise _Absent(key)

    def check_axes(self, where: str, axes: Mapping[str, str]) -> None:
        """Raises CheckpointError unless the arrays have these axes: "3" is a size, "H" one that all share, "4H" 4 H."""
        known = {"": 1}
        for key in [key for key in axes if key in self]:
            shape, wanted, sizes = self[key].shape, axes[key].split(), dict(known)
            fits = len(shape) == len(wanted)
            for size, axis in zip(shape, wanted, strict=False):
                letter = axis.lstrip("0123456789")
                factor = int(axis.removesuffix(letter) or 1)
                fits &= 0 < size == factor * sizes.setdefault(letter, size // factor)
            if not fits:
                others = "".join(f", {letter} = {size}" for letter, size in known.items() if letter)
                raise CheckpointError(f"{where}: {key} has shape {shape}, wanted [{', '.join(wanted)}]{others}.")
            known = sizes
            if wanted[-1:] == ["3"] and self[key].dtype != np.uint8:  # colours come last in frames for display only
                raise CheckpointError(f"{where}: {key} is {self[key].dtype}, wanted uint8.")


# Axes of the inputs by file: Frames, Height, Width, Keyframes; texts of L tokens, D wide.
_TEXT = {"prompt_embeds": "1 L D", "negative_prompt_embeds": "1 L D"}
_AXES = {
    "schedulers": {
        "start": "B 3 H W",
        "wave3": "B 3 H W",
        "wave6": "B 6 H W",
        "noising_x": "b c f h w",
        "noising_noise": "b c f h w",
    },
    "text_t5": {
        "input_ids": "1 L",
        "neg_input_ids": "1 L",
        "attention_mask": "1 L",
        "neg_attention_mask": "1 L",
    },
    "pipe_base": {**_TEXT, "frames": "1 3 F H W", "frames_lambda51": "1 3 f h w"},
    "pipe_base_ddpm": {**_TEXT, "frames": "1 3 F H W", "timesteps": "N"},
    "pipe_interp": {**_TEXT, "pixel_values": "1 3 5 H W", "init_noise": "1 3 5 H W"},
    "pipe_if2": {**_TEXT, "image": "1 3 H W"},
    "pipe_sr1_cond": {
        **_TEXT,
        "video": "1 3 F H W",
        "first_frame_cond": "1 3 1 4H 4W",
        "video_window1": "1 3 f H W",
        "first_frame_cond_window1": "1 3 1 4H 4W",
    },
    "pipe_sr1_uncond_ddpm": {**_TEXT, "video": "1 3 F H W"},
    "pipe_sr2": {"frames_in": "F h w 3", "frames_resized": "F H W 3"},
    "cascade": {
        **_TEXT,
        "keyframes": "1 3 K H W",
        "interp_init_noise": "1 3 5 H W",
        "interpolated": "1 3 F H W",
        "sr1": "1 3 F 4H 4W",
        "sr1_window_conds": "1 3 N 4H 4W",
        "sr2_input_uint8": "F h w 3",
    },
}


class Reference:
    """A folder of reference data."""

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / "meta.json").is_file():
            raise CheckpointError(
                f"{folder}: no meta.json there. Give --reference a folder of the format in tests/golden/README.md."
            )
        self._meta = read_config(folder / "meta.json")
        self.models = folder / "models"

    def arrays(self, name: str) -> Arrays | None:
        """The numbers in a file, or None where it is absent."""
        path = self.folder / f"{name}.npz"
        if not path.is_file():
            return None
        try:
            with np.load(path) as data:
                found = {key: data[key] for key in data.files}
        except (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise CheckpointError(f"{path} cannot be read as NPZ ({error}). Make or copy it again.") from None
        arrays = Arrays(
            {key: value for key, value in found.items() if np.issubdtype(np.asarray(value).dtype, np.number)}
        )
        arrays.check_axes(str(path), _AXES.get(name, {}))
        return arrays

    def setting(self, kind: type, *keys: str) -> Any:
        """An entry of meta.json by the keys that lead to it; raises CheckpointError unless it is a `kind`."""
        value: Any = self._meta
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float if kind is float else kind):
            found = "is missing" if value is None else f"is {value!r}"
            raise CheckpointError(f"{self.folder / 'meta.json'}: {'.'.join(keys)} {found}, wanted: {kind.__name__}.")
        return value

    @property
    def seed(self) -> int:
        return self.setting(int, "seed")

    @property
    def prompts(self) -> tuple[str, str]:
        """Prompt and negative prompt of the latent stage."""
        return self.setting(str, "prompt"), self.setting(str, "negative_prompt")

    def settings(self, stage: str, cascade: bool = False) -> Settings:
        """Those of the runs of one stage, by itself or in the cascade."""
        steps, guidance = (("cascade", "steps"), ("cascade", "gs")) if cascade else (("steps",), ("guidance",))
        changes: dict[str, Any] = {
            stage: StageSettings(self.setting(int, *steps, stage), self.setting(float, *guidance, stage))
        }
        if stage in ("if2", "sr1"):
            changes[f"{stage}_noise_level"] = self.setting(int, "noise_level", stage)
        if stage == "sr2" and "strength_sr2" in self._meta:
            changes["strength"] = self.setting(float, "strength_sr2")
        return replace(Settings(), **changes)


def _embeds(data: Arrays, stage: StageSettings) -> PromptEmbeds:
    """The negative prompt may be absent where there is no guidance."""
    prompt = data["prompt_embeds"]
    return PromptEmbeds(prompt, data["negative_prompt_embeds"] if stage.guidance_scale > 1 else prompt)


def verify(bundle: Bundle, folder: Path, report: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """Run every case that the reference folder has; `report` sees each row as it is done."""
    reference = Reference(folder)
    rows = []
    try:
        with EnginePool(bundle, keep_loaded=True) as engines:
            for row in _rows(reference, engines):
                report(row)
                rows.append(row)
    except ProfileError as error:
        raise CheckpointError(
            f"{bundle.root}: its engines do not take what {folder} gives them: {error} Give --reference the data of "
            f"the checkpoint that the bundle was built from, or a bundle built from {reference.models}."
        ) from None
    if not rows:
        raise CheckpointError(f"{folder}: no reference arrays (*.npz) there that make a case, nothing was verified.")
    return rows


def _rows(reference: Reference, engines: EnginePool) -> Iterator[Row]:
    for name in UNETS:
        if data := reference.arrays(f"unet_{name}"):
            yield from _unet(name, data, engines)
    yield from _prompt_normalisation(reference)
    for file, cases in _CASES.items():
        if data := reference.arrays(file):
            for case in cases:
                yield from _where_present(case(reference, data, engines))
    yield from _ddpm(reference, engines.bundle)


# --- single networks


def _unet(name: str, data: Arrays, engines: EnginePool) -> Iterator[Row]:
    with engines.use(name) as engine:
        for key in [key for key in data if key.startswith("sample")]:
            suffix = key.removeprefix("sample")
            case = f"unet_{name}{suffix}"
            yield from _where_present(_forward(case, engine, data, suffix, "timestep", f"out{suffix}"))
            rows = _forward(f"{case} t per item", engine, data, suffix, "timestep_batch", f"out_tbatch{suffix}")
            yield from _where_present(rows)


def _forward(case: str, engine: Engine, data: Arrays, suffix: str, timestep: str, out: str) -> Iterator[Row]:
    sample, expected, t, text = data[f"sample{suffix}"], data[out], data[timestep], data[f"ehs{suffix}"]
    pixels = "H W" if sample.ndim == 4 else "F H W"  # single images are clips of one frame
    axes = {f"sample{suffix}": f"B C {pixels}", out: f"B c {pixels}", f"ehs{suffix}": "B L D", "class_labels": "B"}
    data.check_axes(case, {**axes, timestep: "B" if t.ndim else ""})
    if sample.ndim == 4:
        sample, expected = sample[:, :, None], expected[:, :, None]
    noise_level = {"noise_level": data["class_labels"]} if engine.properties["noise_level"] else {}
    context = engine.run("context", prompt_embeds=text, **noise_level)
    predicted = predictions(engine.specs["step"])
    outputs = engine.run("step", predicted, sample=sample, timestep=np.broadcast_to(t, len(sample)), **context)
    actual = np.concatenate([outputs[name] for name in predicted], axis=1)
    # Where the scheduler drops the predicted variance, the engine does not compute it.
    yield from _compare(case, actual, expected[:, : actual.shape[1]], 1e-4)


# --- noise schedules: nothing of the bundle, but what its loops compute with

# The published settings by the names of the reference's trajectories (without their step count).
_PUBLISHED: dict[str, dict[str, Any]] = {
    "base": SCHEDULERS["base"],
    "sr1_": SCHEDULERS["sr1"],
    "if2_": SCHEDULERS["if2"],
    "sr2_": SCHEDULERS["sr2"],
    "ddpm_if1_": {**SCHEDULERS["if2"], "sample_max_value": 1.5},
}


def _schedulers(reference: Reference, data: Arrays, engines: EnginePool) -> Iterator[Row]:
    for prefix, name in (("cos", "base"), ("sd", "sr2_")):
        config = SchedulerConfig.from_dict(_PUBLISHED[name], name)
        yield from _compare(f"{prefix} alphas", alphas_cumprod(config), data.get(f"{prefix}_alphas_cumprod"), 1e-5)
        yield from _compare(f"{prefix} lambda", log_snr(config), data.get(f"{prefix}_lambda_t"), 1e-5)
    for key in data:
        if match := re.fullmatch(r"(.+?)(\d+)_traj", key):
            name, steps = match[1], int(match[2])
            if name in _PUBLISHED:
                yield from _where_present(_trajectory(name, steps, data, reference))
        elif match := re.fullmatch(r"noising_(\d+)", key):
            yield from _where_present(_noising(int(match[1]), data))


def _noising(level: int, data: Arrays) -> Iterator[Row]:
    config = SchedulerConfig.from_dict(NOISING, "noising")
    noised = add_noise(config, data["noising_x"], data["noising_noise"], level)
    yield from _compare(f"noising_{level}", noised, data[f"noising_{level}"], 1e-5)


def _trajectory(name: str, steps: int, data: Arrays, reference: Reference) -> Iterator[Row]:
    """The reference's stand-in for a network: a wave that drifts with the step, and half the sample."""
    case, config = f"{name}{steps}", SchedulerConfig.from_dict(_PUBLISHED[name], name)
    schedule = make_schedule(config, steps)
    yield from _compare(f"{case} timesteps", schedule.timesteps, data.get(f"{case}_timesteps"), 0)
    wave = _as_clip(data["wave6" if config.learned_variance else "wave3"])
    visited: list[Array] = []

    def network(sample: Array, timestep: int) -> tuple[Array, Array | None]:
        drifted, half = np.sin(wave * np.float32(1 + 0.03 * len(visited))), np.float32(0.5) * sample
        if not config.learned_variance:
            return drifted + half, None
        return drifted[:, :3] + half, drifted[:, 3:] + half

    denoise(
        network,
        _as_clip(data["start"]),
        schedule,
        guidance_scale=1,
        noise=NoiseStream(reference.seed),
        on_step=_keep(visited),
    )
    expected = data[f"{case}_traj"]  # [steps, N, C, H, W]
    # The latent trajectory reaches 13, where float32 has steps of 1e-6.
    tolerance = 1e-5 + 1e-6 * float(np.abs(expected).max(initial=0))
    yield from _compare(case, np.stack([x[0].swapaxes(0, 1) for x in visited]), expected, tolerance)


def _as_clip(images: Array) -> Array:
    """[N, C, H, W] -> [1, C, N, H, W]."""
    return images.swapaxes(0, 1)[None]


def _keep(visited: list[Array]) -> OnStep:
    return lambda index, total, x: visited.append(x.copy())


# --- text


def _prompt_normalisation(reference: Reference) -> Iterator[Row]:
    path = reference.folder / "text_cleaning.json"
    if not path.is_file():
        return
    try:
        cases = json.loads(path.read_text(encoding="utf-8"))
        wrong = sum(normalize_t5_prompt(case["input"]) != case["clean_false"] for case in cases)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f'{path}: wanted a list of {{"input": ..., "clean_false": ...}} ({type(error).__name__}: {error}).'
        ) from None
    yield Row("prompt normalisation", wrong, wrong, 0)


def _t5(reference: Reference, data: Arrays, engines: EnginePool) -> Iterator[Row]:
    prompt = reference.setting(str, "prompt")
    tokenizer = Tokenizer.from_file(engines.bundle.tokenizer("t5"))
    tokens = tokenizer.encode([normalize_t5_prompt(prompt), ""], MAX_TOKENS)
    for kind, actual in (("input_ids", tokens.input_ids), ("attention_mask", tokens.attention_mask)):
        if data.keys() >= {kind, f"neg_{kind}"}:
            yield from _compare(f"t5 {kind}", actual, np.concatenate([data[kind], data[f"neg_{kind}"]]), 0)
    text = run_text(engines, prompt)
    yield from _compare("t5 prompt", text.prompt, data.get("prompt_embeds"), 1e-5)
    yield from _compare("t5 negative", text.negative, data.get("negative_embeds"), 1e-5)


# --- single pipelines


def _with_scheduler(bundle: Bundle, name: str, scheduler: Mapping[str, Any]) -> Bundle:
    """The same engines under another scheduler."""
    schedulers = {**bundle.manifest.schedulers, name: dict(scheduler)}
    return Bundle(bundle.root, replace(bundle.manifest, schedulers=schedulers))


def _denoise_base(
    engines: EnginePool, text: PromptEmbeds, stage: StageSettings, seed: int, shape: tuple[int, ...]
) -> list[Array]:
    """The base stage, keeping the sample after every step."""
    visited: list[Array] = []
    noise = NoiseStream(seed)
    with engines.use("base") as engine:
        denoise(
            prompted(engine, text, stage.guidance_scale),
            noise.normal(shape),
            make_schedule(scheduler_of(engines.bundle, "base"), stage.num_inference_steps),
            guidance_scale=stage.guidance_scale,
            noise=noise,
            on_step=_keep(visited),
        )
    return visited


def _base(reference: Reference, data: Arrays, engines: EnginePool) -> Iterator[Row]:
    stage = reference.settings("base").base
    schedule = make_schedule(scheduler_of(engines.bundle, "base"), stage.num_inference_steps)
    yield from _compare("pipe_base timesteps", schedule.timesteps, data.get("timesteps"), 0)
    visited = _denoise_base(engines, _embeds(data, stage), stage, reference.seed, data["frames"].shape)
    yield from _compare("pipe_base every step", np.stack(visited), data.get("trajectory"), 1e-2)
    yield from _compare("pipe_base frames", visited[-1], data["frames"], 1e-2)
    yield from _compare("pipe_base uint8", clip_to_frames(visited[-1]), data.get("uint8"), _uint8_tolerance(1e-2))


def _base_published_lambda(reference: Reference, data: Arrays, engines: EnginePool) -> Iterator[Row]:
    expected, stage = data["frames_lambda51"], StageSettings(12, 1.5)
    scheduler = {**engines.bundle.manifest.schedulers["base"], "lambda_min_clipped": -5.1}
    with EnginePool(_with_scheduler(engines.bundle, "base", scheduler)) as published:
        frames = _denoise_base(published, _embeds(data, stage), stage, reference.seed + 5, expected.shape)[-1]
    yield from _compare("pipe_base lambda -5.1", frames, expected, 1e-4)


class _RecordingPool(EnginePool):
    """Keeps what a stage feeds to its network in the first step."""

    first: Array = np.empty(0)

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[Engine]:
        with super().use(name) as engine:
            run = engine.run

            def record(graph: str, *wanted: Any, **feeds: Array) -> dict[str, Array]:
                if graph == "step" and not self.first.size:
                    self.first = feeds["sample"].copy()
                return run(graph, *wanted, **feeds)

            engine.run = record  # type: ignore[method-assign]
            engine.start_loop = lambda *_: None  # type: ignore[method-assign]  # a device's memory is not seen here
            yield engine


def _interp(reference: Reference, data: Arrays, engines: EnginePool) -> Iterator[Row]:
    settings = reference.settings("interp")
    text, keyframes = _embeds(data, settings.interp), data["pixel_values"][0][:, [0, -1]]
    with _RecordingPool(engines.bundle) as recording:
        frames = fill_gaps(recording, text, keyframes, settings, reference.seed, data["init_noise"])
        yield from _compare("pipe_interp first input", recording.first, data.get("first_unet_input"), 1e-5)
    yield from _compare("pipe_interp frames", frames, data.get("frames_init_noise"), 1e-3)


def _interp_own_noise(reference: Reference, data: Arrays, engines: EnginePool) -> Iterator[Row]:
    settings, expected = reference.settings("interp"), data["frames_no_init_noise"]
    text, keyframes = _embeds(data, settings.interp), data["pixel_values"][0][:, [0, -1]]
    frames = fill_gaps(engines, text, keyframes, settings, reference.seed)
    yield from _compare("pipe_interp own noise", frames, expected, 1e-3)


def _if2(reference: Reference, data: Arrays, engines: EnginePool) -> Iterator[Row]:
    settings = reference.settings("if2")
    frame = run_if2(engines, _embeds(data, settings.if2), data["image"][:, :, None], settings, reference.seed)
    yield from _compare("pipe_if2 images", frame[:, :, 0], data.get("images"), 1e-3)


def _window(
    engines: EnginePool, text: PromptEmbeds, clip: Array, first_frame: Array | None, settings: Settings, seed: int
) -> Array:
    """One window of sr1."""
    stage, level = settings.sr1, settings.sr1_noise_level
    with engines.use("sr1") as engine:
        unet = prompted(engine, text, stage.guidance_scale, noise_level=level)
        return upscale(engines.bundle, "sr1", unet, clip, first_frame, stage, level, seed)


def _sr1_first_window(reference: Reference, data: Arrays, engines: EnginePool) -> Iterator[Row]:
    settings = reference.settings("sr1")
    text, clip, first_frame = _embeds(data, settings.sr1), data["video"], data["first_frame_cond"]
    with _RecordingPool(engines.bundle) as recording:
        frames = _window(recording, text, clip, first_frame, settings, reference.seed)
        yield from _compare("pipe_sr1 first input", recording.first[:1], data.get("first_unet_input"), 1e-5)
    yield from _compare("pipe_sr1 window 0", frames, data.get("frames_window0"), 3e-2, 2e-3)


def _sr1_next_window(reference: Reference, data: Arrays, engines: EnginePool) -> Iterator[Row]:
    settings, expected = reference.settings("sr1"), data["frames_window1"]
    text, clip, first_frame = _embeds(data, settings.sr1), data["video_window1"], data["first_frame_cond_window1"]
    frames = _window(engines, text, clip, first_frame, settings, reference.seed)
    yield from _compare("pipe_sr1 window 1", frames, expected, 3e-2, 2e-3)


def _sr1_no_first_frame(reference: Reference, data: Arrays, engines: EnginePool) -> Iterator[Row]:
    settings, expected = reference.settings("sr1"), data["frames_nocond"]
    frames = _window(engines, _embeds(data, settings.sr1), data["video"], None, settings, reference.seed)
    yield from _compare("pipe_sr1 no first frame", frames, expected, 3e-2, 2e-3)


def _sr2_text(reference: Reference, data: Arrays, engines: EnginePool) -> Iterator[Row]:
    tokens = Tokenizer.from_file(engines.bundle.tokenizer("clip")).encode(reference.prompts, MAX_TOKENS)
    yield from _compare("clip ids", tokens.input_ids, data.get("clip_input_ids"), 0)
    text = run_clip_text(engines, *reference.prompts)
    yield from _compare("clip embeds", np.concatenate([text.prompt, text.negative]), data.get("clip_embeds"), 1e-5)


def _sr2_resize(reference: Reference, data: Arrays, engines: EnginePool) -> Iterator[Row]:
    expected = data["frames_resized"]
    resized = resize_frames(data["frames_in"], (expected.shape[2], expected.shape[1]))
    yield from _compare("pipe_sr2 resized", resized, expected, 0)


def _refined(
    engines: EnginePool,
    text: PromptEmbeds,
    mean: Array,
    logvar: Array,
    settings: Settings,
    seed: int,
    on_step: OnStep | None = None,
) -> Array:
    """`run_sr2` from the encoded frames on, for sizes of a reference rather than of a video."""
    noise = NoiseStream(seed)
    latents = mean + np.exp(0.5 * logvar) * noise.normal(mean.shape)
    return decode(engines, refine(engines, text, latents, settings, noise, on_step))


def _sr2(reference: Reference, data: Arrays, engines: EnginePool) -> Iterator[Row]:
    mean, logvar = encode(engines, data["frames_resized"])
    yield from _compare("vae mean", mean, data.get("vae_mean"), 1e-4)
    yield from _compare("vae logvar", logvar, data.get("vae_logvar"), 1e-4)
    text, visited = run_clip_text(engines, *reference.prompts), list[Array]()
    video = _refined(engines, text, mean, logvar, reference.settings("sr2"), reference.seed, _keep(visited))
    yield from _compare("pipe_sr2 first step", visited[0], data.get("latents_step0"), 2e-3)
    yield from _compare("pipe_sr2 latents", visited[-1], data.get("latents_final"), 2e-3)
    yield from _compare("pipe_sr2 video", video, data.get("video"), 1e-3)
    yield from _compare("pipe_sr2 uint8", clip_to_frames(video), data.get("uint8"), _uint8_tolerance(1e-3))


# --- the cascade: every stage from the reference's input, and the stages that may follow each other freely


def _cascade_free_run(reference: Reference, data: Arrays, engines: EnginePool) -> Iterator[Row]:
    expected, settings, seed = data["keyframes"], reference.settings("base", cascade=True), reference.seed
    count, height, width = expected.shape[2:]
    text = _embeds(data, settings.base)
    keyframes = run_base(engines, text, replace(settings, keyframes=count), seed, (width, height))
    yield from _compare("cascade keyframes", keyframes, expected, 1e-3)

    expected, settings = data["interpolated"], reference.settings("interp", cascade=True)
    clip = run_interp(engines, _embeds(data, settings.interp), keyframes, settings, seed)
    yield from _compare("free run interpolated", clip, expected, 5e-3)

    expected, settings = data["first_frame_sr"], reference.settings("if2", cascade=True)
    first_frame = run_if2(engines, _embeds(data, settings.if2), clip[:, :, :1], settings, seed)
    yield from _compare("free run first frame", first_frame, expected, 5e-3)


def _cascade_interp(reference: Reference, data: Arrays, engines: EnginePool) -> Iterator[Row]:
    if (expected := data.get("interp_init_noise")) is not None:
        noise = NoiseStream(reference.seed).normal(expected.shape)
        yield from _compare("cascade interp noise", noise, expected, 1e-6)
    expected, settings = data["interpolated"], reference.settings("interp", cascade=True)
    clip = run_interp(engines, _embeds(data, settings.interp), data["keyframes"], settings, reference.seed)
    yield from _compare("cascade interpolated", clip, expected, 1e-3)


def _cascade_first_frame(reference: Reference, data: Arrays, engines: EnginePool) -> Iterator[Row]:
    expected, settings = data["first_frame_sr"], reference.settings("if2", cascade=True)
    frame = data["interpolated"][:, :, :1]
    first_frame = run_if2(engines, _embeds(data, settings.if2), frame, settings, reference.seed)
    yield from _compare("cascade first frame", first_frame, expected, 1e-3)


def _cascade_windows(reference: Reference, data: Arrays, engines: EnginePool) -> Iterator[Row]:
    clip, upscaled, conditions = data["interpolated"], data["sr1"], data["sr1_window_conds"]
    settings = reference.settings("sr1", cascade=True)
    text = _embeds(data, settings.sr1)
    # The reference may leave frames at the end for which no whole window is left.
    starts = range(0, clip.shape[2] - 1, settings.sr1_window - 1)[: conditions.shape[2]]
    for number, start in enumerate(starts):
        window = np.s_[:, :, start : start + settings.sr1_window]
        out = _window(engines, text, clip[window], conditions[:, :, number : number + 1], settings, reference.seed)
        expected = upscaled[window].copy()
        if number + 1 < conditions.shape[2]:
            # The shared frame was overwritten in `sr1`, and is kept as the next window's condition.
            expected[:, :, -1] = conditions[:, :, number + 1]
        yield from _compare(f"cascade sr1 window {number}", out, expected, 3e-2, 2e-3)


def _cascade_sr2(reference: Reference, data: Arrays, engines: EnginePool) -> Iterator[Row]:
    frames = data["sr2_input_uint8"]
    if (upscaled := data.get("sr1")) is not None:
        resized = resize_frames(clip_to_frames(upscaled), (frames.shape[2], frames.shape[1]))
        yield from _compare("cascade sr2 input", resized, frames, 0)
    settings = reference.settings("sr2", cascade=True)
    text, encoded = run_clip_text(engines, *reference.prompts), encode(engines, frames)
    video = _refined(engines, text, *encoded, settings, reference.seed)
    yield from _compare("cascade sr2", video[:, :, [0, 1, -1]], data.get("sr2_first2_last1"), 1e-3)
    yield from _compare("cascade sr2 uint8", clip_to_frames(video), data.get("sr2_uint8"), _uint8_tolerance(1e-3))


_Case = Callable[[Reference, Arrays, EnginePool], Iterator[Row]]

# The cases of each file. One case ends where an input is absent; the others go on.
_CASES: dict[str, tuple[_Case, ...]] = {
    "schedulers": (_schedulers,),
    "text_t5": (_t5,),
    "pipe_base": (_base, _base_published_lambda),
    "pipe_interp": (_interp, _interp_own_noise),
    "pipe_if2": (_if2,),
    "pipe_sr1_cond": (_sr1_first_window, _sr1_next_window, _sr1_no_first_frame),
    "pipe_sr2": (_sr2_resize, _sr2_text, _sr2),
    "cascade": (_cascade_free_run, _cascade_interp, _cascade_first_frame, _cascade_windows, _cascade_sr2),
}


# --- DDPM with learned variance, whatever scheduler the checkpoint has


def _base_ddpm(reference: Reference, data: Arrays, engines: EnginePool) -> Iterator[Row]:
    stage = StageSettings(len(data["timesteps"]), reference.setting(float, "guidance", "base"))
    frames = _denoise_base(engines, _embeds(data, stage), stage, reference.seed, data["frames"].shape)[-1]
    yield from _compare("pipe_base_ddpm frames", frames, data["frames"], 1e-3)


def _sr1_ddpm(reference: Reference, data: Arrays, engines: EnginePool) -> Iterator[Row]:
    expected, stage = data["frames"], StageSettings(3, reference.setting(float, "guidance", "sr1"))
    settings = replace(Settings(), sr1=stage, sr1_noise_level=reference.setting(int, "noise_level", "sr1"))
    frames = _window(engines, _embeds(data, stage), data["video"], None, settings, reference.seed)
    yield from _compare("pipe_sr1 ddpm frames", frames, expected, 2e-3)


# file -> its network, the published scheduler that it was made with, its case
_DDPM_CASES: dict[str, tuple[str, str, _Case]] = {
    "pipe_base_ddpm": ("base", "ddpm_if1_", _base_ddpm),
    "pipe_sr1_uncond_ddpm": ("sr1", "if2_", _sr1_ddpm),
}


def _ddpm(reference: Reference, bundle: Bundle) -> Iterator[Row]:
    present = {file: data for file in _DDPM_CASES if (data := reference.arrays(file))}
    with _with_variance([_DDPM_CASES[file][0] for file in present], bundle, reference.models) as bundles:
        for file, data in present.items():
            network, scheduler, case = _DDPM_CASES[file]
            if network in bundles:
                with EnginePool(_with_scheduler(bundles[network], network, _PUBLISHED[scheduler])) as engines:
                    yield from _where_present(case(reference, data, engines))


@contextlib.contextmanager
def _with_variance(networks: Sequence[str], bundle: Bundle, checkpoint: Path) -> Iterator[dict[str, Bundle]]:
    """For each network a bundle whose engine keeps the variance output, which DPM-Solver bundles leave out.

    That is `bundle`, or a temporary one made from the reference's checkpoint, which may be absent.
    """
    entries = {name: bundle.engine(name) for name in networks}
    bundles = {name: bundle for name, entry in entries.items() if _has_variance(entry)}
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as processes:
            built = {
                name: processes.submit(
                    _build_with_variance, entry, checkpoint, bundle.manifest.size, Path(folder) / name
                )
                for name, entry in entries.items()
                if name not in bundles and checkpoint.is_dir()
            }
        for name, entry in built.items():
            bundles[name] = Bundle(Path(folder) / name, replace(bundle.manifest, engines={name: entry.result()}))
        yield bundles


def _has_variance(entry: EngineEntry) -> bool:
    return any(output.name == "variance_frac" for output in entry.graphs["step"].spec.outputs)


def _build_with_variance(entry: EngineEntry, checkpoint: Path, size: tuple[int, int], folder: Path) -> EngineEntry:
    """Runs in a process of its own: tracing keeps one processor busy for the better part of a minute."""
    from export.job import Backend, Job, build_engine  # torch, for these cases only
    from export.networks import Source

    folder.mkdir()
    precision = entry.precision
    if precision == INT8:  # what int8 engines are made from
        precision = "fp32" if entry.backend == BACKEND else "fp16"
    source = Source.find(CATALOG[entry.name], checkpoint, precision)
    return build_engine(Job(source, precision, size, Backend.of(entry), keep_variance=True), folder)
