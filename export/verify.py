"""`export verify`: a bundle's engines against reference data made by the authors' code, case by case.

The reference is any folder of the format described in `tests/golden/README.md`: `meta.json` with the settings,
`models/` with the checkpoint, and NPZ files with inputs and expected outputs, each of which may be absent.
"""

import contextlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.catalog import CATALOG
from engines.errors import BundleError, CheckpointError
from engines.manifest import Manifest
from engines.store import Bundle
from export.checkpoint import read_config
from runtime.config import Settings, StageSettings
from runtime.noise import NoiseStream
from runtime.ops import clip_to_frames, frames_to_clip, resize_frames
from runtime.runner import Engine, EnginePool
from runtime.sampler import denoise
from runtime.schedulers import SchedulerConfig, add_noise, alphas_cumprod, log_snr, make_schedule
from runtime.stages.base import run_base
from runtime.stages.diffusion import PromptEmbeds, prompted, scheduler_of
from runtime.stages.interp import fill_gaps, run_interp
from runtime.stages.sr1 import run_if2, upscale
from runtime.stages.sr2 import decode, encode, refine, run_sr2
from runtime.stages.text import run_clip_text, run_text
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


def compare(case: str, actual: Array, expected: Array, tolerance: float, mean_tolerance: float = np.inf) -> Row:
    if actual.shape != expected.shape:
        raise BundleError(f"{case}: the engine gives shape {actual.shape}, the reference has {expected.shape}.")
    error = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    return Row(case, float(error.max()), float(error.mean()), tolerance, mean_tolerance)


def _uint8_tolerance(tolerance: float) -> float:
    """Truncation to 8 bits turns any difference into a step of one, and larger ones into several."""
    return 1 + np.floor(tolerance * 127.5)


class Reference:
    """A folder of reference data."""

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / "meta.json").is_file():
            raise CheckpointError(
                f"{folder}: no meta.json there. Give --reference a folder of the format in tests/golden/README.md."
            )
        self.meta = read_config(folder / "meta.json")
        self.seed: int = self.meta["seed"]
        self.models = folder / "models"

    def load(self, name: str) -> Mapping[str, Array] | None:
        path = self.folder / f"{name}.npz"
        if not path.is_file():
            return None
        with np.load(path) as data:
            return {key: data[key] for key in data.files}

    def stage(self, name: str) -> StageSettings:
        return StageSettings(self.meta["steps"][name], self.meta["guidance"][name])

    def settings(self, source: Mapping[str, Any] | None = None) -> Settings:
        """Settings of the single pipelines, or of the cascade where its part of the meta data is given."""
        steps, guidance = (source["steps"], source["gs"]) if source else (self.meta["steps"], self.meta["guidance"])
        stages = {name: StageSettings(steps[name], guidance[name]) for name in steps}
        levels = self.meta["noise_level"]
        return replace(
            Settings(),
            **stages,
            strength=self.meta.get("strength_sr2", 0.8),
            if2_noise_level=levels["if2"],
            sr1_noise_level=levels["sr1"],
        )


def _embeds(data: Mapping[str, Array]) -> PromptEmbeds:
    return PromptEmbeds(data["prompt_embeds"], data["negative_prompt_embeds"])


def verify(bundle: Bundle, folder: Path, report: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """Run every case that the reference folder has; `report` sees each row as it is done."""
    reference = Reference(folder)
    rows = []
    with EnginePool(bundle, keep_loaded=True) as engines:
        for cases in (_unets, _schedulers, _text, _base, _base_ddpm, _interp, _if2, _sr1, _sr1_ddpm, _sr2, _cascade):
            for row in cases(reference, engines):
                report(row)
                rows.append(row)
    if not rows:
        raise CheckpointError(f"{folder}: no reference arrays (*.npz) there, nothing was verified.")
    return rows


# --- single networks


def _unets(reference: Reference, engines: EnginePool) -> Iterator[Row]:
    for name in ("base", "interp", "if2", "sr1", "sr2"):
        data = reference.load(f"unet_{name}")
        if data is None:
            continue
        with engines.use(name) as engine:
            for key in (key for key in data if key.startswith("sample")):
                suffix = key.removeprefix("sample")
                yield _unet(f"unet_{name}{suffix}", engine, data, suffix, data["timestep"], f"out{suffix}")
                if f"out_tbatch{suffix}" in data:
                    timestep = data["timestep_batch"]
                    yield _unet(
                        f"unet_{name}{suffix} t per item", engine, data, suffix, timestep, f"out_tbatch{suffix}"
                    )


def _unet(case: str, engine: Engine, data: Mapping[str, Array], suffix: str, timestep: Array, out: str) -> Row:
    sample, expected = data[f"sample{suffix}"], data[out]
    if sample.ndim == 4:  # single images are clips of one frame
        sample, expected = sample[:, :, None], expected[:, :, None]
    feeds = {"prompt_embeds": data[f"ehs{suffix}"]}
    if engine.properties["noise_level"]:
        feeds["noise_level"] = data["class_labels"]
    context = engine.run("context", **feeds)
    outputs = engine.run("step", sample=sample, timestep=np.broadcast_to(timestep, len(sample)), **context)
    actual = np.concatenate([outputs[binding.name] for binding in engine.specs["step"].outputs], axis=1)
    # Where the scheduler drops the predicted variance, the engine does not compute it.
    return compare(case, actual, expected[:, : actual.shape[1]], 1e-4)


# --- noise schedules: nothing of the bundle, but what its loops compute with

_COSINE = {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "squaredcos_cap_v2"}
_DDPM = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"}
_THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.95}
_LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}

# The published settings by the names of the reference's trajectories (without their step count).
_PUBLISHED: dict[str, dict[str, Any]] = {
    "base": {**_COSINE, **_THRESHOLD, "sample_max_value": 1.5, "lambda_min_clipped": -5.1},
    "sr1_": {**_COSINE, **_THRESHOLD, "sample_max_value": 1.0},
    "if2_": {**_DDPM, **_THRESHOLD, "sample_max_value": 1.0, "variance_type": "learned_range"},
    "sr2_": {**_COSINE, **_LATENT},
    "ddpm_if1_": {**_DDPM, **_THRESHOLD, "sample_max_value": 1.5, "variance_type": "learned_range"},
}


def _schedulers(reference: Reference, engines: EnginePool) -> Iterator[Row]:
    data = reference.load("schedulers")
    if data is None:
        return
    for prefix, name in (("cos", "base"), ("sd", "sr2_")):
        if f"{prefix}_alphas_cumprod" in data:
            config = SchedulerConfig.from_dict(_PUBLISHED[name], name)
            yield compare(f"{prefix} alphas", alphas_cumprod(config), data[f"{prefix}_alphas_cumprod"], 1e-5)
            yield compare(f"{prefix} lambda", log_snr(config), data[f"{prefix}_lambda_t"], 1e-5)
    for key in data:
        if match := re.fullmatch(r"(.+?)(\d+)_traj", key):
            name, steps = match[1], int(match[2])
            if name not in _PUBLISHED:
                continue
            config = SchedulerConfig.from_dict(_PUBLISHED[name], name)
            yield from _trajectory(f"{name}{steps}", config, steps, data, reference)
        elif match := re.fullmatch(r"noising_(\d+)", key):
            config = SchedulerConfig.from_dict(_DDPM, "noising")
            noised = add_noise(config, data["noising_x"], data["noising_noise"], int(match[1]))
            yield compare(key, noised, data[key], 1e-5)


def _trajectory(
    case: str, config: SchedulerConfig, steps: int, data: Mapping[str, Array], reference: Reference
) -> Iterator[Row]:
    """The reference's stand-in for a network: a wave that drifts with the step, and half the sample."""
    schedule = make_schedule(config, steps)
    yield compare(f"{case} timesteps", schedule.timesteps, data[f"{case}_timesteps"], 0)
    visited: list[Array] = []

    def network(sample: Array, timestep: int) -> tuple[Array, Array | None]:
        drift, half = np.float32(1 + 0.03 * len(visited)), np.float32(0.5) * sample
        if not config.learned_variance:
            return np.sin(_as_clip(data["wave3"]) * drift) + half, None
        wave = np.sin(_as_clip(data["wave6"]) * drift)
        return wave[:, :3] + half, wave[:, 3:] + half

    denoise(
        network,
        _as_clip(data["start"]),
        schedule,
        guidance_scale=1,
        noise=NoiseStream(reference.seed),
        on_step=lambda index, total, x: visited.append(x.copy()),
    )
    expected = np.stack([_as_clip(x) for x in data[f"{case}_traj"]])
    # The latent trajectory reaches 13, where float32 has steps of 1e-6.
    yield compare(case, np.stack(visited), expected, 1e-5 + 1e-6 * float(np.abs(expected).max()))


def _as_clip(images: Array) -> Array:
    """[N, C, H, W] -> [1, C, N, H, W]."""
    return images.swapaxes(0, 1)[None]


# --- text


def _text(reference: Reference, engines: EnginePool) -> Iterator[Row]:
    meta = reference.meta
    cleaning = reference.folder / "text_cleaning.json"
    if cleaning.is_file():
        cases = json.loads(cleaning.read_text(encoding="utf-8"))
        wrong = sum(normalize_t5_prompt(case["input"]) != case["clean_false"] for case in cases)
        yield Row("prompt normalisation", wrong, wrong, 0)
    if data := reference.load("text_t5"):
        tokenizer = Tokenizer.from_file(engines.bundle.tokenizer("t5"))
        tokens = tokenizer.encode([normalize_t5_prompt(meta["prompt"]), ""], meta["tokens"])
        for kind, actual in (("input_ids", tokens.input_ids), ("attention_mask", tokens.attention_mask)):
            yield compare(f"t5 {kind}", actual, np.concatenate([data[kind], data[f"neg_{kind}"]]), 0)
        text = run_text(engines, meta["prompt"])
        yield compare("t5 prompt", text.prompt, data["prompt_embeds"], 1e-5)
        yield compare("t5 negative", text.negative, data["negative_embeds"], 1e-5)


# --- single pipelines


def _with_scheduler(engines: EnginePool, name: str, **changes: Any) -> EnginePool:
    """The same engines under another scheduler."""
    manifest = engines.bundle.manifest
    schedulers = {**manifest.schedulers, name: {**manifest.schedulers[name], **changes}}
    return EnginePool(Bundle(engines.bundle.root, replace(manifest, schedulers=schedulers)))


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
            on_step=lambda index, total, x: visited.append(x.copy()),
        )
    return visited


def _base(reference: Reference, engines: EnginePool) -> Iterator[Row]:
    data = reference.load("pipe_base")
    if data is None:
        return
    text, stage = _embeds(data), reference.stage("base")
    schedule = make_schedule(scheduler_of(engines.bundle, "base"), stage.num_inference_steps)
    yield compare("pipe_base timesteps", schedule.timesteps, data["timesteps"], 0)
    visited = _denoise_base(engines, text, stage, reference.seed, data["frames"].shape)
    yield compare("pipe_base every step", np.stack(visited), data["trajectory"], 1e-2)
    yield compare("pipe_base frames", visited[-1], data["frames"], 1e-2)
    yield compare("pipe_base uint8", clip_to_frames(visited[-1]), data["uint8"], _uint8_tolerance(1e-2))
    if "frames_lambda51" in data:
        expected = data["frames_lambda51"]
        published = _with_scheduler(engines, "base", lambda_min_clipped=-5.1)
        frames = _denoise_base(published, text, StageSettings(12, 1.5), reference.seed + 5, expected.shape)[-1]
        yield compare("pipe_base lambda -5.1", frames, expected, 1e-4)


@contextlib.contextmanager
def _with_variance(
    reference: Reference, engines: EnginePool, name: str, scheduler: Mapping[str, Any]
) -> Iterator[EnginePool]:
    """An engine of the reference's checkpoint that keeps its variance output, which DPM-Solver bundles leave out.

    Built for these cases alone, in the bundle's precision.
    """
    from export.build import Job, build_engine  # torch, for these cases only
    from export.networks import Source

    entry = engines.bundle.engine(name)
    manifest = engines.bundle.manifest
    with tempfile.TemporaryDirectory() as folder:
        if "variance_frac" not in {binding.name for binding in entry.graphs["step"].spec.outputs}:
            source = Source.find(CATALOG[name], reference.models, entry.precision)
            entry = build_engine(Job(source, entry.precision, manifest.size, {}, keep_variance=True), Path(folder))
            root = Path(folder)
        else:
            root = engines.bundle.root
        schedulers = {**manifest.schedulers, name: dict(scheduler)}
        bundle = Bundle(root, Manifest(engines={name: entry}, schedulers=schedulers))
        with EnginePool(bundle) as pool:
            yield pool


def _base_ddpm(reference: Reference, engines: EnginePool) -> Iterator[Row]:
    data = reference.load("pipe_base_ddpm")
    if data is None:
        return
    stage = StageSettings(len(data["timesteps"]), reference.meta["guidance"]["base"])
    with _with_variance(reference, engines, "base", _PUBLISHED["ddpm_if1_"]) as pool:
        frames = _denoise_base(pool, _embeds(data), stage, reference.seed, data["frames"].shape)[-1]
    yield compare("pipe_base_ddpm frames", frames, data["frames"], 1e-3)


class _RecordingPool(EnginePool):
    """Keeps what a stage feeds to its network in the first step."""

    first: Array | None = None

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[Engine]:
        with super().use(name) as engine:
            run = engine.run

            def record(graph: str, **feeds: Array) -> dict[str, Array]:
                if graph == "step" and self.first is None:
                    self.first = feeds["sample"].copy()
                return run(graph, **feeds)

            engine.run = record  # type: ignore[method-assign]
            yield engine


def _interp(reference: Reference, engines: EnginePool) -> Iterator[Row]:
    data = reference.load("pipe_interp")
    if data is None:
        return
    text, settings = _embeds(data), reference.settings()
    keyframes = data["pixel_values"][0][:, [0, -1]]
    with _RecordingPool(engines.bundle) as recording:
        frames = fill_gaps(recording, text, keyframes, settings, reference.seed, data["init_noise"])
        yield compare("pipe_interp first input", recording.first, data["first_unet_input"], 1e-5)
    yield compare("pipe_interp frames", frames, data["frames_init_noise"], 1e-3)
    frames = fill_gaps(engines, text, keyframes, settings, reference.seed)
    yield compare("pipe_interp own noise", frames, data["frames_no_init_noise"], 1e-3)


def _if2(reference: Reference, engines: EnginePool) -> Iterator[Row]:
    data = reference.load("pipe_if2")
    if data is None:
        return
    frame = run_if2(engines, _embeds(data), data["image"][:, :, None], reference.settings(), reference.seed)
    yield compare("pipe_if2 images", frame[:, :, 0], data["images"], 1e-3)


def _window(
    reference: Reference,
    engines: EnginePool,
    text: PromptEmbeds,
    clip: Array,
    first_frame: Array | None,
    stage: StageSettings,
) -> Array:
    level = reference.meta["noise_level"]["sr1"]
    with engines.use("sr1") as engine:
        unet = prompted(engine, text, stage.guidance_scale, noise_level=level)
        return upscale(engines.bundle, "sr1", unet, clip, first_frame, stage, level, reference.seed)


def _sr1(reference: Reference, engines: EnginePool) -> Iterator[Row]:
    data = reference.load("pipe_sr1_cond")
    if data is None:
        return
    text, stage = _embeds(data), reference.stage("sr1")
    with _RecordingPool(engines.bundle) as recording:
        frames = _window(reference, recording, text, data["video"], data["first_frame_cond"], stage)
        yield compare("pipe_sr1 first input", recording.first[:1], data["first_unet_input"], 1e-5)
    yield compare("pipe_sr1 window 0", frames, data["frames_window0"], 3e-2, 2e-3)
    frames = _window(reference, engines, text, data["video_window1"], data["first_frame_cond_window1"], stage)
    yield compare("pipe_sr1 window 1", frames, data["frames_window1"], 3e-2, 2e-3)
    frames = _window(reference, engines, text, data["video"], None, stage)
    yield compare("pipe_sr1 no first frame", frames, data["frames_nocond"], 3e-2, 2e-3)


def _sr1_ddpm(reference: Reference, engines: EnginePool) -> Iterator[Row]:
    data = reference.load("pipe_sr1_uncond_ddpm")
    if data is None:
        return
    stage = StageSettings(3, reference.meta["guidance"]["sr1"])
    with _with_variance(reference, engines, "sr1", _PUBLISHED["if2_"]) as pool:
        frames = _window(reference, pool, _embeds(data), data["video"], None, stage)
    yield compare("pipe_sr1 ddpm frames", frames, data["frames"], 2e-3)


def _sr2(reference: Reference, engines: EnginePool) -> Iterator[Row]:
    data = reference.load("pipe_sr2")
    if data is None:
        return
    meta, settings = reference.meta, reference.settings()
    resized = data["frames_resized"]
    size = (resized.shape[2], resized.shape[1])
    yield compare("pipe_sr2 resized", resize_frames(data["frames_in"], size), resized, 0)
    tokens = Tokenizer.from_file(engines.bundle.tokenizer("clip")).encode([meta["prompt"], meta["negative_prompt"]])
    yield compare("clip ids", tokens.input_ids, data["clip_input_ids"], 0)
    text = run_clip_text(engines, meta["prompt"], meta["negative_prompt"])
    yield compare("clip embeds", np.concatenate([text.prompt, text.negative]), data["clip_embeds"], 1e-5)
    mean, logvar = encode(engines, frames_to_clip(resized))
    yield compare("vae mean", mean, data["vae_mean"], 1e-4)
    yield compare("vae logvar", logvar, data["vae_logvar"], 1e-4)
    visited: list[Array] = []
    noise = NoiseStream(reference.seed)
    latents = mean + np.exp(0.5 * logvar) * noise.normal(mean.shape)
    latents = refine(engines, text, latents, settings, noise, lambda i, n, x: visited.append(x.copy()))
    yield compare("pipe_sr2 first step", visited[0], data["latents_step0"], 2e-3)
    yield compare("pipe_sr2 latents", visited[-1], data["latents_final"], 2e-3)
    video = decode(engines, latents)
    yield compare("pipe_sr2 video", video, data["video"], 1e-3)
    yield compare("pipe_sr2 uint8", clip_to_frames(video), data["uint8"], _uint8_tolerance(1e-3))


# --- the cascade: every stage from the reference's input, then the part that may run free


def _cascade(reference: Reference, engines: EnginePool) -> Iterator[Row]:
    data = reference.load("cascade")
    if data is None:
        return
    meta = reference.meta["cascade"]
    text, seed = _embeds(data), reference.seed
    settings = replace(reference.settings(meta), keyframes=data["keyframes"].shape[2])
    height, width = data["keyframes"].shape[3:]

    keyframes = run_base(engines, text, settings, seed, (width, height))
    yield compare("cascade keyframes", keyframes, data["keyframes"], 1e-3)
    noise = NoiseStream(seed).normal(data["interp_init_noise"].shape)
    yield compare("cascade interp noise", noise, data["interp_init_noise"], 1e-6)
    clip = run_interp(engines, text, data["keyframes"], settings, seed)
    yield compare("cascade interpolated", clip, data["interpolated"], 1e-3)
    first = run_if2(engines, text, data["interpolated"][:, :, :1], settings, seed)
    yield compare("cascade first frame", first, data["first_frame_sr"], 1e-3)
    yield from _cascade_windows(reference, engines, text, data, settings)

    frames = resize_frames(clip_to_frames(data["sr1"]), tuple(meta["sr2_size"]))
    yield compare("cascade sr2 input", frames, data["sr2_input_uint8"], 0)
    latent_text = run_clip_text(engines, reference.meta["prompt"], reference.meta["negative_prompt"])
    settings = replace(settings, size=tuple(meta["sr2_size"]))
    video = run_sr2(engines, latent_text, data["sr2_input_uint8"], settings, seed)
    yield compare("cascade sr2", video[:, :, [0, 1, -1]], data["sr2_first2_last1"], 1e-3)
    yield compare("cascade sr2 uint8", clip_to_frames(video), data["sr2_uint8"], _uint8_tolerance(1e-3))

    clip = run_interp(engines, text, keyframes, settings, seed)
    yield compare("free run interpolated", clip, data["interpolated"], 5e-3)
    first = run_if2(engines, text, clip[:, :, :1], settings, seed)
    yield compare("free run first frame", first, data["first_frame_sr"], 5e-3)


def _cascade_windows(
    reference: Reference, engines: EnginePool, text: PromptEmbeds, data: Mapping[str, Array], settings: Settings
) -> Iterator[Row]:
    conditions, frames = data["sr1_window_conds"], data["interpolated"].shape[2]
    stride = settings.sr1_window - 1
    for number, start in enumerate(range(0, frames - 1, stride)):
        clip = data["interpolated"][:, :, start : start + settings.sr1_window]
        out = _window(reference, engines, text, clip, conditions[:, :, number : number + 1], settings.sr1)
        expected = data["sr1"][:, :, start : start + settings.sr1_window].copy()
        if number + 1 < conditions.shape[2]:
            # The shared frame was overwritten in `sr1`, and is kept as the next window's condition.
            expected[:, :, -1] = conditions[:, :, number + 1]
        yield compare(f"cascade sr1 window {number}", out, expected, 3e-2, 2e-3)
