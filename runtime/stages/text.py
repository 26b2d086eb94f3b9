"""Prompts to embeddings: T5 for the pixel stages, CLIP for the latent one."""

from collections.abc import Callable

import numpy as np

from runtime.engine import EnginePool
from runtime.stages.diffusion import PromptEmbeds
from runtime.tokenizer import Tokenizer, normalize_t5_prompt

MAX_TOKENS = 77  # of both encoders, the end marker included; the UNets see all of them, padding too

OnCut = Callable[[str, str], None]  # (encoder, as "T5" or "CLIP, negative prompt"; the end that did not fit)


def run_text(engines: EnginePool, prompt: str, on_cut: OnCut | None = None) -> PromptEmbeds:
    """T5 embeddings [1, 77, D]. The pixel stages' negative prompt is the empty one, as in the reference."""
    tokenizer = Tokenizer.from_file(engines.bundle.tokenizer("t5"))
    tokens = tokenizer.encode(["", normalize_t5_prompt(prompt)], MAX_TOKENS)
    _report_cut("T5", tokens.cut, on_cut)
    with engines.use("t5") as t5:
        feeds = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
        negative, embeds = np.split(t5.run("encode", **feeds)["prompt_embeds"], 2)
    return PromptEmbeds(embeds, negative)


def run_clip_text(engines: EnginePool, prompt: str, negative_prompt: str, on_cut: OnCut | None = None) -> PromptEmbeds:
    """CLIP embeddings [1, 77, D] of the prompt as typed and of the negative prompt."""
    tokenizer = Tokenizer.from_file(engines.bundle.tokenizer("clip"))
    with engines.use("clip") as clip:
        tokens = tokenizer.encode([negative_prompt, prompt], min(MAX_TOKENS, clip.properties["max_tokens"]))
        _report_cut("CLIP", tokens.cut, on_cut)
        negative, embeds = np.split(clip.run("encode", input_ids=tokens.input_ids)["prompt_embeds"], 2)
    return PromptEmbeds(embeds, negative)


def _report_cut(encoder: str, cut: tuple[str, ...], on_cut: OnCut | None) -> None:
    """Of the negative prompt's text and the prompt's."""
    for reader, text in zip((f"{encoder}, negative prompt", encoder), cut, strict=True):
        if text and on_cut is not None:
            on_cut(reader, text)
