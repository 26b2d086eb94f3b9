"""Published tokenizer folders -> one self-contained `tokenizer.json` each, for the `tokenizers` library.

The ids are those of the tokenizers that the reference runs on, the slow ones of transformers 4.29: T5Tokenizer, which
hands the text to sentencepiece, and CLIPTokenizer with ftfy, which Show-1 requires.

The json says how text becomes ids, which special tokens surround them and which token pads. It fixes no length:
`runtime.tokenizer` truncates and pads to the length that the text encoder was built for.
"""

import contextlib
import unicodedata
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engines.errors import CheckpointError
from export.config_file import read_config

# Numbers in sentencepiece's model file: the kind of model, the kinds of pieces.
_UNIGRAM = 1
_NORMAL, _UNKNOWN, _CONTROL = 1, 2, 3

# CLIP's words: special tokens, English endings, runs of letters, single digits, runs of anything else but space.
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

# What ftfy replaces by its NFKC form: Latin ligatures and digraphs, then the CJK space, full and half widths.
_LIGATURES = (0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07))
_WIDTHS = (0x3000, *range(0xFF01, 0xFFF0))


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """What readers of files in another form run into, as CheckpointError."""
    try:
        yield
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: not a tokenizer as published ({type(error).__name__}: {error}). Download the folder again."
        ) from error


def convert_t5(folder: Path) -> str:
    """The text of `tokenizer.json` for a T5 tokenizer folder (spiece.model, tokenizer_config.json).

    To sentencepiece every stretch of text between special tokens is a sentence: it applies the character map of the
    model, collapses and trims spaces, puts one in front and finds the likeliest pieces. `</s>` ends the ids.
    """
    with _readable(folder):
        return _convert_t5(folder)


def _convert_t5(folder: Path) -> str:
    proto = _read_sentencepiece(_require(folder, "spiece.model"))
    settings = _read_settings(folder)
    pad = settings.get("pad_token", "<pad>")
    eos = settings.get("eos_token", "</s>")
    unk = settings.get("unk_token", "<unk>")
    vocab = [(piece.piece, piece.score) for piece in proto.pieces]
    ids = {piece: index for index, (piece, _) in enumerate(vocab)}
    _check_known([pad, eos, unk], ids, folder / "spiece.model")

    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=ids[unk], byte_fallback=False))
    charsmap = proto.normalizer_spec.precompiled_charsmap
    tokenizer.normalizer = normalizers.Sequence(
        [
            *([normalizers.Precompiled(charsmap)] if charsmap else []),
            normalizers.Replace(Regex(" +"), " "),
            normalizers.Replace(Regex("^ | $"), ""),
            normalizers.Prepend("▁"),  # leaves empty text empty
            normalizers.Replace(" ", "▁"),
            normalizers.Replace(Regex("▁+$"), ""),  # sentencepiece also trims a "▁" that the user typed
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {eos}", special_tokens=[(eos, ids[eos])])
    tokenizer.decoder = decoders.Metaspace()
    # The sentinels follow the pieces in falling order: <extra_id_0> has the last id.
    sentinels = [f"<extra_id_{n}>" for n in reversed(range(settings.get("extra_ids", 100)))]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in [pad, eos, unk, *sentinels]])
    tokenizer.enable_padding(pad_id=ids[pad], pad_token=pad)
    return tokenizer.to_str()


def convert_clip(folder: Path) -> str:
    """The text of `tokenizer.json` for a CLIP tokenizer folder (vocab.json, merges.txt, tokenizer_config.json).

    Text is tidied as ftfy does (quotes, ligatures, widths, control characters), lower-cased and split into words for
    byte-level BPE. Two repairs of ftfy are left out: HTML entities, and text decoded with the wrong encoding.

    The pad token is the configured one. As in the reference it is special wherever it stands: OpenCLIP checkpoints
    pad with "!", so each "!" of a prompt becomes that token instead of the word "!".
    """
    with _readable(folder):
        return _convert_clip(folder)


def _convert_clip(folder: Path) -> str:
    ids = read_config(_require(folder, "vocab.json"))
    merges = _read_merges(_require(folder, "merges.txt"), ids)
    settings = _read_settings(folder)
    bos = settings.get("bos_token", "<|startoftext|>")
    eos = settings.get("eos_token", "<|endoftext|>")
    unk = settings.get("unk_token", "<|endoftext|>")
    pad = settings.get("pad_token", "<|endoftext|>")
    _check_known([bos, eos, unk, pad], ids, folder / "vocab.json")

    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unk, end_of_word_suffix="</w>"))
    # Python, by which the reference lower-cases, has another small sigma at the end of a word.
    cased, between = r"[\p{Cased}&&\P{Case_Ignorable}]", r"\p{Case_Ignorable}*"
    final_sigma = normalizers.Replace(Regex(rf"{cased}{between}\KΣ(?!{between}{cased})"), "ς")
    tokenizer.normalizer = normalizers.Sequence([*_ftfy_steps(), final_sigma, normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, ids[bos]), (eos, ids[eos])]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # The frame is found after lower-casing ("<|ENDOFTEXT|>" counts), a pad token of its own in the text as typed.
    tokenizer.add_special_tokens([AddedToken(token, normalized=True) for token in dict.fromkeys([bos, eos, unk])])
    if pad not in (bos, eos, unk):
        tokenizer.add_special_tokens([AddedToken(pad, normalized=False)])
    tokenizer.enable_padding(pad_id=ids[pad], pad_token=pad)
    return tokenizer.to_str()


def _ftfy_steps() -> list[normalizers.Normalizer]:
    """The character repairs of `ftfy.fix_text` in its order: ligatures, widths, quotes, control characters, NFC."""
    forms = [(chr(code), unicodedata.normalize("NFKC", chr(code))) for code in (*_LIGATURES, *_WIDTHS)]
    return [
        *(normalizers.Replace(char, form) for char, form in forms if char != form),
        normalizers.Replace(Regex("[\u02bc\u2018-\u201b]"), "'"),
        normalizers.Replace(Regex("[\u201c-\u201f]"), '"'),
        normalizers.Replace(Regex(r"\x1b\[[\d;]*[a-zA-Z]"), ""),  # colours of a terminal
        normalizers.Replace(Regex(r"[\x00-\x08\x0b\x0e-\x1f\x7f\x{206a}-\x{206f}\x{feff}\x{fff9}-\x{fffc}]"), ""),
        normalizers.NFC(),
    ]


def _read_sentencepiece(path: Path) -> Any:
    """The model file, once sure that it is one of the kind that `convert_t5` can express."""
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise CheckpointError(f"{path}: not a sentencepiece model ({error}). Download the folder again.") from error
    spaces = proto.normalizer_spec
    expressible = (
        proto.trainer_spec.model_type == _UNIGRAM
        and {piece.type for piece in proto.pieces} <= {_NORMAL, _UNKNOWN, _CONTROL}
        and spaces.add_dummy_prefix
        and spaces.remove_extra_whitespaces
        and spaces.escape_whitespaces
    )
    if not expressible:
        raise CheckpointError(
            f"{path}: not a sentencepiece model as T5 has it (unigram, no bytes or user-defined pieces, spaces trimmed "
            "and marked with ▁). Give the tokenizer folder of a T5 checkpoint."
        )
    return proto


def _read_merges(path: Path, ids: Container[str]) -> list[tuple[str, str]]:
    """The pairs of merges.txt; its first line is a version."""
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[1:], start=2):
        match line.split():
            case []:
                continue
            case [left, right] if left in ids and right in ids and left + right in ids:
                pairs.append((left, right))
            case _:
                raise CheckpointError(
                    f"{path}, line {number}: got {line!r}, need two tokens of vocab.json that make a third. "
                    "Download the folder again."
                )
    return pairs


def _read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, overruled by special_tokens_map.json as in the reference; tokens as plain text."""
    settings = read_config(_require(folder, "tokenizer_config.json"))
    tokens_map = folder / "special_tokens_map.json"
    if tokens_map.is_file():
        settings |= read_config(tokens_map)
    return {
        name: value["content"] if name.endswith("_token") and isinstance(value, dict) else value
        for name, value in settings.items()
        if value is not None
    }


def _require(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: no {name}. A T5 tokenizer folder has spiece.model and tokenizer_config.json, a CLIP one has "
            "vocab.json, merges.txt and tokenizer_config.json. Download the whole tokenizer folder of the checkpoint."
        )
    return path


def _check_known(tokens: Iterable[str], ids: Container[str], vocabulary: Path) -> None:
    for token in tokens:
        if token not in ids:
            raise CheckpointError(
                f"{vocabulary}: has no {token!r}, which the configuration names as a special token. "
                "Download the whole folder again."
            )
