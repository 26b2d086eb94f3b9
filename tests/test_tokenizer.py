"""Token ids against the golden files and against independent implementations of the reference's tokenizers."""

# ruff: noqa: RUF001 (the look-alike characters are the point)

import json
import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from engines.errors import BundleError, CheckpointError, SettingsError
from runtime.stages.text import MAX_TOKENS
from runtime.tokenizer import Tokenizer, normalize_t5_prompt

pytest.importorskip("sentencepiece", reason="conversion needs the export extra")

from export.demo import cascade
from export.tokenizers import convert_clip, convert_t5

AWKWARD = [
    "",
    " ",
    "  two  spaces\tand\n lines  ",
    "Toad practicing karate.",
    "a </s> b</s>c <pad><unk> d",
    "<|endoftext|> x<|startoftext|>y <|ENDOFTEXT|>",
    "日本語のテキスト, 中文，한국어!",
    "emoji 👍🏽 👨‍👩‍👧 🇩🇪 ❤️",
    "ＡＢＣ ｱｲｳ ﬁne ﬂow “quoted” ‘text’ don’t…",
    "e\u0301 and é, ЖЁЛТЫЙ, İ ß, ΟΔΟΣ ΣΑΣ Σ ΟΔΟΣ's 合計Σ ΟΔΟΣ日本 Ο..Σ",
    "\u200b\ufeffzero\u200dwidth\u00adhyphen\u00a0nbsp\u3000wide",
    "▁literal ▁ underline ▁",
    "control \x01\x1f\x7f\x85 end \x1b[31mred",
    "it's we'LL 12345 3.14 !!! ?!... ###",
    "<extra_id_0> {braces} [x] ~^|\\",
    "word" * 200,
    "many words " * 100,
]


@pytest.fixture(scope="module")
def t5_folder(golden: Path) -> Path:
    return golden / "models/base/tokenizer"


@pytest.fixture(scope="module")
def t5(t5_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(convert_t5(t5_folder), tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def clip(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(convert_clip(golden / "models/sr2/tokenizer"), tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def settings(golden: Path) -> dict:
    return json.loads((golden / "meta.json").read_text(encoding="utf-8"))


def load(text: str, folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    path.write_text(text, encoding="utf-8")
    return Tokenizer.from_file(path)


def ids_of(tokenizer: Tokenizer, text: str, max_length: int = 4096) -> list[int]:
    """The ids without the padding."""
    batch = tokenizer.encode([text], max_length)
    return batch.input_ids[0, : batch.attention_mask[0].sum()].tolist()


# T5


def test_t5_ids_and_masks_are_the_golden_ones(t5: Tokenizer, golden: Path, settings: dict) -> None:
    expected = np.load(golden / "text_t5.npz")
    batch = t5.encode([normalize_t5_prompt(settings["prompt"]), ""], MAX_TOKENS)
    np.testing.assert_array_equal(batch.input_ids, np.concatenate([expected["input_ids"], expected["neg_input_ids"]]))
    np.testing.assert_array_equal(
        batch.attention_mask, np.concatenate([expected["attention_mask"], expected["neg_attention_mask"]])
    )
    assert batch.input_ids.dtype == batch.attention_mask.dtype == np.int64
    assert batch.cut == ("", "")


def test_t5_prompts_are_only_lowered_and_stripped(golden: Path) -> None:
    for case in json.loads((golden / "text_cleaning.json").read_text(encoding="utf-8")):
        assert normalize_t5_prompt(case["input"]) == case["clean_false"]


def sentencepiece_ids(t5_folder: Path, text: str) -> list[int]:
    """What the slow T5Tokenizer does: special tokens out of the text, the rest to sentencepiece, "</s>" at the end."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(str(t5_folder / "spiece.model"))
    special = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    ids = []
    for part in re.split("(<pad>|</s>|<unk>)", text):
        ids += [special[part]] if part in special else processor.encode(part)
    return [*ids, special["</s>"]]


@pytest.mark.parametrize("text", AWKWARD)
def test_t5_ids_are_those_of_sentencepiece(t5: Tokenizer, t5_folder: Path, text: str) -> None:
    assert ids_of(t5, text) == sentencepiece_ids(t5_folder, text)


def test_t5_ids_are_those_of_sentencepiece_on_random_text(t5: Tokenizer, t5_folder: Path) -> None:
    # No combining marks: after a character that the model's map replaces, `tokenizers` drops them, sentencepiece not.
    characters = [chr(code) for code in range(1, 0x20000) if unicodedata.category(chr(code))[0] not in "MC"]
    pools = [characters, "abcdefghijklmnopqrstuvwxyz  .,!?'-", " ▁<>éü中Ａﬁ…“’👍\u00a0\u3000\t\n"]
    draw = random.Random(0)
    for _ in range(1000):
        text = "".join(draw.choices(draw.choice(pools), k=draw.randrange(40)))
        assert ids_of(t5, text) == sentencepiece_ids(t5_folder, text), ascii(text)


def test_t5_ids_are_those_of_sentencepiece_where_no_map_makes_marks_spaces(tmp_path: Path) -> None:
    cascade.save_tokenizers(tmp_path)  # the demo's model has none, the published one has
    folder = tmp_path / "base/tokenizer"
    demo = load(convert_t5(folder), tmp_path)
    for text in ("a red circle", "▁", "circle▁", " red ▁▁ ", "▁a▁b▁"):
        assert ids_of(demo, text) == sentencepiece_ids(folder, text), text


def test_t5_ids_are_those_of_transformers(t5: Tokenizer, t5_folder: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with the bench extra")
    other = transformers.T5Tokenizer.from_pretrained(t5_folder)
    for text in AWKWARD:
        # transformers 5 takes a "▁" that was typed and U+0085 for spaces, sentencepiece does not.
        if "▁" not in text and "\x85" not in text:
            assert ids_of(t5, text) == other(text)["input_ids"], text


def test_t5_sentinels_take_the_last_ids_in_falling_order(t5_folder: Path, tmp_path: Path) -> None:
    pieces = copy_folder(t5_folder, tmp_path / "from", extra_ids=3)
    assert pieces == 104
    tokenizer = load(convert_t5(tmp_path / "from"), tmp_path)
    assert ids_of(tokenizer, "<extra_id_0><extra_id_2>") == [106, 104, 1]


def copy_folder(source: Path, target: Path, **changes: object) -> int:
    """A T5 tokenizer folder with other settings; returns the number of its pieces."""
    import sentencepiece

    target.mkdir()
    (target / "spiece.model").write_bytes((source / "spiece.model").read_bytes())
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    (target / "tokenizer_config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return sentencepiece.SentencePieceProcessor(str(target / "spiece.model")).vocab_size()


# CLIP


def test_clip_ids_and_masks_are_the_golden_ones(clip: Tokenizer, golden: Path, settings: dict) -> None:
    expected = np.load(golden / "pipe_sr2.npz")
    batch = clip.encode([settings["prompt"], settings["negative_prompt"]], MAX_TOKENS)
    np.testing.assert_array_equal(batch.input_ids, expected["clip_input_ids"])
    np.testing.assert_array_equal(batch.attention_mask, expected["clip_attention_mask"])


class SlowClip:
    """CLIP's tokenizer written down plainly: ftfy's character repairs, CLIP's words, byte pairs by rank."""

    MERGES = "t h|th e</w>|c a|ca t</w>|! !</w>|a n|an d</w>|Ã ©</w>|i n|' s</w>|o o|oo o|. .|.. .</w>|o u|h e|t he"
    BOS, EOS = "<|startoftext|>", "<|endoftext|>"

    def __init__(self, folder: Path, pad: str) -> None:
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in visible]
        self.letter = {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
        self.rank = {tuple(line.split()): rank for rank, line in enumerate(self.MERGES.split("|"))}
        letters = list(self.letter.values())
        tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, self.rank), self.BOS, self.EOS]
        self.ids = {token: index for index, token in enumerate(tokens)}
        self.special = [self.BOS, self.EOS, pad]

        folder.mkdir()
        (folder / "vocab.json").write_text(json.dumps(self.ids), encoding="utf-8")
        (folder / "merges.txt").write_text("#version: 0.2\n" + self.MERGES.replace("|", "\n") + "\n", encoding="utf-8")
        (folder / "tokenizer_config.json").write_text('{"pad_token": "<|endoftext|>"}', encoding="utf-8")
        (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": pad}), encoding="utf-8")

    def __call__(self, text: str) -> list[int]:
        regex = pytest.importorskip("regex", reason="compares with the bench extra")
        pattern = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
        tokens = [self.BOS]
        for part in re.split(f"({'|'.join(map(re.escape, self.special))})", text):
            if part in self.special:
                tokens.append(part)
                continue
            for word in regex.findall(pattern, self.tidy(part).lower()):
                tokens += [word] if word in self.special[:2] else self.merge(word)
        return [self.ids[token] for token in [*tokens, self.EOS]]

    def tidy(self, text: str) -> str:
        text = re.sub("[\uff01-\uffef\u3000ﬀ-ﬆĲĳŉǄ-ǌǱ-ǳ]", lambda match: unicodedata.normalize("NFKC", match[0]), text)
        text = re.sub("[\u201c-\u201f]", '"', re.sub("[\u02bc\u2018-\u201b]", "'", text))
        text = re.sub(r"\033\[((?:\d|;)*)([a-zA-Z])", "", text)
        text = re.sub("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]", "", text)
        return unicodedata.normalize("NFC", text)

    def merge(self, word: str) -> list[str]:
        parts = [self.letter[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while known := [pair for pair in zip(parts, parts[1:]) if pair in self.rank]:  # noqa: B905, RUF007
            best = min(known, key=self.rank.__getitem__)
            merged, index = [], 0
            while index < len(parts):
                take = 2 if tuple(parts[index : index + 2]) == best else 1
                merged.append("".join(parts[index : index + take]))
                index += take
            parts = merged
        return parts


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_clip_ids_are_those_of_the_slow_tokenizer(pad: str, tmp_path: Path) -> None:
    slow = SlowClip(tmp_path / "from", pad)
    fast = load(convert_clip(tmp_path / "from"), tmp_path)
    draw = random.Random(0)
    pools = [
        "the cat and thing's ooo... !! ?",
        "ABC ÉÀÜ éà 'LL don’t ŉ ǆ 42",
        "日本語 ＡＢＣ！ ﬁ “x” 👍🏽 \u200b\ufeff\u0301 \t\n\x0b",
    ]
    texts = ["".join(draw.choices(draw.choice(pools), k=draw.randrange(40))) for _ in range(500)]
    for text in AWKWARD + texts:
        assert ids_of(fast, text) == slow(text), ascii(text)
    assert fast.encode([""], 4).input_ids.tolist() == [[slow.ids[t] for t in (slow.BOS, slow.EOS, pad, pad)]]


def test_clip_ids_are_those_of_transformers_where_nothing_is_tidied(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with the bench extra")
    SlowClip(tmp_path / "from", "!")
    ours = load(convert_clip(tmp_path / "from"), tmp_path)
    other = transformers.CLIPTokenizer.from_pretrained(tmp_path / "from")
    for text in ["", "  The  CAT\n and ", "wow!! the cat's", "é e\u0301", "<|endoftext|>the", "日本語 👍🏽"]:
        assert ids_of(ours, text) == other(text)["input_ids"], text


# Truncation


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_what_is_kept_and_what_is_cut_make_up_the_text(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    text = "a tiny fox runs over the hill " * 10
    batch = tokenizer.encode([text, "short"], 40)
    cut = batch.cut[0]
    assert batch.cut[1] == ""
    assert 0 < len(cut) < len(text)
    assert text.strip().endswith(cut)
    kept = text[: text.rindex(cut)]
    everything, end = ids_of(tokenizer, text), ids_of(tokenizer, "")[-1]
    assert batch.input_ids[0].tolist() == [*everything[:39], end]
    assert batch.attention_mask[0].all()
    assert ids_of(tokenizer, kept)[:38] == everything[:38]  # the last token may end inside a word


def test_nothing_is_cut_from_a_text_that_just_fits(t5: Tokenizer) -> None:
    text = "a tiny fox"
    count = len(ids_of(t5, text))
    assert t5.encode([text], count).cut == ("",)
    assert t5.encode([text], count - 1).cut != ("",)


def test_a_typed_end_token_may_be_cut_too(t5: Tokenizer) -> None:
    assert t5.encode(["</s>" * 10], 8).cut == ("</s>" * 3,)


def test_an_empty_batch_keeps_its_length(t5: Tokenizer) -> None:
    assert t5.encode([], MAX_TOKENS).input_ids.shape == (0, 77)


def test_a_length_without_room_for_text_is_refused(clip: Tokenizer) -> None:
    with pytest.raises(SettingsError, match="got 2, need more than the 2 special tokens"):
        clip.encode(["a"], 2)


# Damaged files


@pytest.mark.parametrize("missing", ["spiece.model", "tokenizer_config.json"])
def test_a_missing_t5_file_is_named(missing: str, t5_folder: Path, tmp_path: Path) -> None:
    copy_folder(t5_folder, tmp_path / "from")
    (tmp_path / "from" / missing).unlink()
    with pytest.raises(CheckpointError, match=f"no {missing}"):
        convert_t5(tmp_path / "from")


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_a_missing_clip_file_is_named(missing: str, tmp_path: Path) -> None:
    SlowClip(tmp_path / "from", "!")
    (tmp_path / "from" / missing).unlink()
    with pytest.raises(CheckpointError, match=f"no {missing}"):
        convert_clip(tmp_path / "from")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", '{"a": 0', "vocab.json cannot be read as JSON"),
        ("vocab.json", "[]", "vocab.json: expected a JSON object, found list"),
        ("vocab.json", '{"a": 0}', "two tokens of vocab.json"),
        ("merges.txt", "#version: 0.2\nt h\nt\n", "line 3: got 't'"),
        ("special_tokens_map.json", '{"pad_token": {"content": "<pad>"}}', "no '<pad>'"),
        ("special_tokens_map.json", '{"pad_token": {"text": "<pad>"}}', "not a tokenizer as published .KeyError"),
        ("special_tokens_map.json", '{"pad_token": ["!"]}', "not a tokenizer as published .TypeError"),
        ("merges.txt", "\udcff\n", "not a tokenizer as published .UnicodeDecodeError"),
    ],
)
def test_a_damaged_clip_file_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    SlowClip(tmp_path / "from", "!")
    (tmp_path / "from" / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(CheckpointError, match=message):
        convert_clip(tmp_path / "from")


def test_a_damaged_sentencepiece_model_is_refused(t5_folder: Path, tmp_path: Path) -> None:
    copy_folder(t5_folder, tmp_path / "from")
    (tmp_path / "from/spiece.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="not a sentencepiece model"):
        convert_t5(tmp_path / "from")


@pytest.mark.parametrize("content", ["", "{}", "not json"])
def test_a_damaged_tokenizer_json_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a tokenizer"):
        load(content, tmp_path)


def test_a_missing_tokenizer_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot read the tokenizer"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
