"""The work of a video as the reference does it: which networks are called how often, on what, and for how many FLOP.

A FLOP count is twice the multiply-adds of matrix products, convolutions and attention (torch's FlopCounterMode over the
reference's own networks on the meta device, so nothing is computed). Rates of other implementations are in reference
FLOP per second too: work that they save shows as speed. Of presets, which leave out steps and guidance, it is counted
what they leave (`published_flop`).
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.store import Bundle
from runtime.config import DIFFUSION_STAGES, INTERP_FRAMES, SR1_SCALE, Settings, stage_sizes
from runtime.sampler import guidance_scales, whole_steps
from runtime.schedulers import executed_steps
from runtime.stages.text import MAX_TOKENS

ENGINES = {
    "text": ("t5", "clip"),
    "base": ("base",),
    "interp": ("interp",),
    "if2": ("if2",),
    "sr1": ("sr1",),
    "sr2": ("vae_encoder", "sr2", "vae_decoder"),
}
STAGES = tuple(ENGINES)
STAGE_OF = {engine: stage for stage, engines in ENGINES.items() for engine in engines}
BASELINES = ("eager", "compile", "xformers")  # the first two with scaled_dot_product_attention
GUIDED = 2  # every call of a UNet sees the negative prompt and the prompt
MATRIX_SIZE = {"cuda": 8192, "cpu": 2048}  # of the square product that gives the matrix rate


# FLOP of one guided call at published sizes, 29 frames of 576 x 320; tests count them on the networks.
PUBLISHED_FLOP = {
    "t5": 1_430_860_333_056,
    "base": 10_469_922_701_312,
    "interp": 6_547_815_514_112,
    "if2": 3_851_931_942_912,
    "sr1": 26_171_289_567_232,
    "clip": 90_254_467_072,
    "sr2": 51_727_786_557_440,
    "vae_encoder": 777_978_224_640,
    "vae_decoder": 1_760_848_865_280,
}
# Of one guided shallow step (`export.modules.unet.UNetShallow`), likewise.
SHALLOW_FLOP = {
    "base": 2_216_039_219_200,
    "interp": 1_385_626_009_600,
    "if2": 560_689_152_000,
    "sr1": 4_158_239_670_272,
    "sr2": 18_898_317_967_360,
}


@dataclass(frozen=True)
class Calls:
    """One network over a whole video of the reference: `count` calls on `shape` (of its image, latents or tokens)."""

    network: str
    count: int
    shape: tuple[int, ...]

    @property
    def stage(self) -> str:
        return STAGE_OF[self.network]


def reference_calls(settings: Settings, steps: Mapping[str, int], latents: int, factor: int) -> dict[str, Calls]:
    """The reference's calls by network: gaps and windows one by one, the autoencoder frame by frame.

    `steps` are the lengths of the denoising loops, sr2's without what `strength` skips; `latents` and `factor` are the
    autoencoder's channels and reduction.
    """
    width, height = stage_sizes(settings.size)["base"]
    large = (height * SR1_SCALE, width * SR1_SCALE)
    full_width, full_height = settings.size
    small = (full_height // factor, full_width // factor)
    frames = settings.num_frames
    window = min(settings.sr1_window, frames)
    windows = len(range(0, frames - 1, settings.sr1_window - 1))
    rows = (
        Calls("t5", 1, (GUIDED, MAX_TOKENS)),
        Calls("base", steps["base"], (GUIDED, 3, settings.keyframes, height, width)),
        Calls("interp", steps["interp"] * (settings.keyframes - 1), (GUIDED, 7, INTERP_FRAMES, height, width)),
        Calls("if2", steps["if2"], (GUIDED, 6, 1, *large)),
        Calls("sr1", steps["sr1"] * windows, (GUIDED, 6, window, *large)),
        Calls("clip", 1, (GUIDED, MAX_TOKENS)),
        Calls("sr2", steps["sr2"], (GUIDED, latents, frames, *small)),
        Calls("vae_encoder", frames, (1, 3, full_height, full_width)),
        Calls("vae_decoder", frames, (1, latents, *small)),
    )
    return {row.network: row for row in rows}


@dataclass(frozen=True)
class Setup:
    """Whole videos to measure: by `bundles` through the runtime, and by `kinds` of baselines.

    `settings` are those of the runtime, with guidance: the reference has it in every stage.
    """

    size: str
    checkpoint: Path | None
    bundles: Sequence[Bundle]
    settings: Settings
    stages: Sequence[str]
    kinds: Sequence[str]
    seed: int
    repeats: int


def step_counts(settings: Settings) -> dict[str, int]:
    """Steps of a denoising loop of each stage; sr2's without what `strength` skips."""
    lengths = {stage: getattr(settings, stage).num_inference_steps for stage in DIFFUSION_STAGES}
    return {**lengths, "sr2": executed_steps(lengths["sr2"], settings.strength)}


def published_flop(settings: Settings) -> dict[str, int]:
    """FLOP by stage of a video with these steps and guidance, made by the published networks at their sizes.

    Size and key frames of `settings` do not count. A step without guidance sees half a guided one's batch: half the
    work; one that reuses deep features is of `SHALLOW_FLOP`. Everything else is counted as the reference does it
    (`PUBLISHED_FLOP`).
    """
    lengths = step_counts(settings)
    flop = dict.fromkeys(STAGES, 0)
    for name, calls in reference_calls(Settings(), lengths, latents=4, factor=8).items():
        if name in DIFFUSION_STAGES:
            stage = getattr(settings, name)
            guidance = guidance_scales(lengths[name], stage.guidance_scale, stage.guided)
            whole = whole_steps(guidance, stage.cache_interval)
            steps = np.where(whole, PUBLISHED_FLOP[name], SHALLOW_FLOP[name]) * np.where(guidance > 1, 2, 1)
            flop[calls.stage] += calls.count // lengths[name] * int(steps.sum()) // 2
        else:
            flop[calls.stage] += calls.count * PUBLISHED_FLOP[name]
    return flop


def is_installed(baseline: str) -> bool:
    """Whether what the baseline needs beyond the others' libraries is there."""
    return baseline != "xformers" or importlib.util.find_spec("xformers") is not None


def matrix_rate(device: str, dtype: str, repeats: int = 10) -> float:
    """FLOP/s of a large square matrix product on random data: what the card or processor gives today."""
    import torch

    from bench.timing import measure, measure_gpu, summarize

    size = MATRIX_SIZE[device]
    a, b = torch.randn(2, size, size, device=device).to(getattr(torch, dtype))
    if device == "cuda":
        times = measure_gpu(lambda: a @ b, 3, repeats, graph=False)
        del a, b
        torch.cuda.empty_cache()  # other libraries than torch have to find their memory
    else:
        times = [timed.seconds for timed in measure(lambda: a @ b, 3, repeats)]
    summary = summarize(times)
    assert summary is not None
    return 2 * size**3 / summary.median


def count_flop(call: Callable[[], Any]) -> int:
    """FLOP of the torch operations that `call()` makes."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()
