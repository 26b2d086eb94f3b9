"""Videos made again from one engine on: what the engines before it gave is kept, and not made again."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray
from tqdm import tqdm

from runtime.config import NEGATIVE_PROMPT, Settings
from runtime.engine import EnginePool
from runtime.noise import NoiseStream
from runtime.ops import clip_to_frames
from runtime.stages.base import run_base
from runtime.stages.diffusion import Progress, step_counter
from runtime.stages.interp import run_interp
from runtime.stages.sr1 import run_if2, run_sr1
from runtime.stages.sr2 import decode, draw_latents, refine
from runtime.stages.text import run_clip_text, run_text

# As a video needs them; CLIP, which reads the prompt alone, where the fewest follow.
ORDER = ("t5", "base", "interp", "if2", "sr1", "vae_encoder", "clip", "sr2", "vae_decoder")


@dataclass(frozen=True)
class Take:
    """A video; `made` has what each engine gave to it, in `ORDER`.

    Text encoders give PromptEmbeds; base, interp, if2 and sr1 clips, float32 [1, 3, F, H, W]; vae_encoder and sr2
    latents, float32 [F, 4, h, w]; vae_decoder the finished frames, uint8 [F, H, W, 3].
    """

    prompt: str
    seed: int
    settings: Settings
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def frames(self) -> NDArray:
        return self.made["vae_decoder"]


def make_videos(engines: EnginePool, takes: Iterable[Take], first: str = ORDER[0]) -> list[Take]:
    """The same videos by these engines from `first` on; what those before it gave is taken over.

    One engine is in memory at a time, for all videos where the pool keeps it until it is closed. On a terminal a bar
    shows how far they are.
    """
    kept, again = ORDER[: ORDER.index(first)], ORDER[ORDER.index(first) :]
    takes = [replace(take, made={name: take.made[name] for name in kept}) for take in takes]
    with tqdm(total=len(again) * len(takes), disable=None, leave=False) as bar:

        def say(stage: str, done: int, total: int) -> None:
            bar.set_description(f"{stage} {done}/{total}")

        for name in again:
            with engines:
                for take in takes:
                    take.made[name] = _run(name, engines, take, say)
                    bar.update()
    return takes


def _run(name: str, engines: EnginePool, take: Take, progress: Progress) -> Any:
    """The part of `runtime.pipeline` that is this engine's."""
    made, settings, seed = take.made, take.settings, take.seed
    match name:
        case "t5":
            return run_text(engines, take.prompt)
        case "base":
            return run_base(engines, made["t5"], settings, seed, progress=progress)
        case "interp":
            return run_interp(engines, made["t5"], made["base"], settings, seed, progress)
        case "if2":
            return run_if2(engines, made["t5"], made["interp"][:, :, :1], settings, seed, progress)
        case "sr1":
            return run_sr1(engines, made["t5"], made["interp"], made["if2"], settings, seed, progress)
        case "vae_encoder":
            return draw_latents(engines, clip_to_frames(made["sr1"]), settings, NoiseStream(seed))
        case "clip":
            return run_clip_text(engines, take.prompt, NEGATIVE_PROMPT)
        case "sr2":
            latents, noise = made["vae_encoder"], NoiseStream(seed)
            noise.normal(latents.shape)  # drawn before, for the latents
            return refine(engines, made["clip"], latents, settings, noise, step_counter(progress, "sr2"))
        case "vae_decoder":
            return clip_to_frames(decode(engines, made["sr2"]))
    raise ValueError(f"{name} is none of {', '.join(ORDER)}")
