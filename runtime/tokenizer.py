"""Prompts to token ids, with a `tokenizer.json` that holds everything the ids depend on but the length."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import tokenizers

from engines.errors import BundleError, SettingsError


@dataclass(frozen=True)
class TokenBatch:
    """What a text encoder reads, and what of each text did not fit."""

    input_ids: npt.NDArray[np.int64]  # [B, L]
    attention_mask: npt.NDArray[np.int64]  # [B, L], 1 on tokens, 0 on padding
    cut: tuple[str, ...]  # per text the end that truncation dropped, "" if it fitted


class Tokenizer:
    """Truncates and pads every text to one length; special tokens survive truncation."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, pad_id: int, pad_token: str) -> None:
        self._tokenizer = tokenizer
        self._pad_id = pad_id
        self._pad_token = pad_token

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a `tokenizer.json` made by `export.tokenizers`."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{path}: cannot read the tokenizer ({error}). Export the bundle again.") from error
        return cls.from_text(text, str(path))

    @classmethod
    def from_text(cls, text: str, where: str) -> Self:
        """The same from the content of such a file; `where` names it in errors."""
        try:
            tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise BundleError(f"{where}: not a tokenizer.json ({error}). Export the bundle again.") from error
        padding = tokenizer.padding
        if padding is None:
            raise BundleError(f"{where}: does not say which token pads. Export the bundle again.")
        return cls(tokenizer, padding["pad_id"], padding["pad_token"])

    def encode(self, texts: Sequence[str], max_length: int) -> TokenBatch:
        """Ids and mask of each text, `max_length` long including the special tokens."""
        special = self._tokenizer.num_special_tokens_to_add(False)
        if max_length <= special:
            raise SettingsError(f"max_length: got {max_length}, need more than the {special} special tokens.")
        self._tokenizer.enable_padding(length=max_length, pad_id=self._pad_id, pad_token=self._pad_token)
        self._tokenizer.enable_truncation(max_length)
        encodings = self._tokenizer.encode_batch(texts)
        shape = len(texts), max_length
        return TokenBatch(
            input_ids=np.array([encoding.ids for encoding in encodings], np.int64).reshape(shape),
            attention_mask=np.array([encoding.attention_mask for encoding in encodings], np.int64).reshape(shape),
            cut=tuple(_cut(text, encoding) for text, encoding in zip(texts, encodings, strict=True)),
        )


def normalize_t5_prompt(prompt: str) -> str:
    """What the reference does to a prompt before T5; CLIP gets the prompt as it is."""
    return prompt.lower().strip()


def _cut(text: str, encoding: tokenizers.Encoding) -> str:
    """The part of `text` behind the last token that was kept."""
    if not encoding.overflowing:
        return ""
    kept_until = max(end for _, end in encoding.offsets)  # special tokens that were added have offsets (0, 0)
    return text[kept_until:].strip()
