"""Quality of a bundle's videos: do they show what held-out prompts ask for, and how far are they from a reference?

Faithfulness (`export.demo.faithfulness`) counts questions about the finished pixels: colour, shape and motion of every
thing asked for, and the background. As a control every video is also asked the questions of all other prompts: chance.
A distance to a reference says what a change of precision or steps did to the pixels, the same seeds on both sides.
"""

import io
import json
import math
import statistics
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from bench.machine import ROOT, describe_moment, git_commit
from bench.report import NOTHING, Report, Table, number, write_bytes
from bench.work import STAGES
from engines.catalog import CATALOG
from engines.errors import OutputError
from engines.store import Bundle
from export.demo.faithfulness import ASKED, KEYS, Faithfulness, Prompt, faithfulness
from export.demo.judge import Reading, read
from runtime.config import Settings
from runtime.engine import EnginePool
from runtime.ops import Frames, clip_to_frames, psnr, resize_frames
from runtime.pipeline import Show1Pipeline, check_finite, check_run
from runtime.stages.base import run_base
from runtime.stages.text import run_text

_SHEET_FRAMES, _SHEET_ROWS, _SHEET_WIDTH = 8, 8, 192
_UNKNOWN = "unknown"
_CONDITIONS = ("date", "load_average_1min", "commit")  # of a clip, as it was finished
_CLIP = ("frames", "prompt", "seed", "maker", "seconds", "conditions")  # what its file holds


# Faithfulness


def faithfulness_table(result: Faithfulness) -> Table:
    names = {"direction": "motion and direction", "motion": "kind of motion", "count": "number of things"}
    rows, all_right, all_asked = [], result.right, result.asked
    for key in KEYS:
        right, asked = all_right[key], all_asked[key]
        rows.append(
            [
                names.get(key, key),
                f"{right} / {asked}",
                percent(right / asked),
                percent_range(wilson(right, asked)),
                percent(result.chance[key]),
                *("{} / {}".format(*counts[key]) for counts in result.of_things.values()),
            ]
        )

    def whole(name: str, scores: Sequence[float], chance: str) -> list[str]:
        return [
            name,
            f"{len(scores)} videos",
            percent(statistics.mean(scores)),
            percent_range(bootstrap(scores)) if len(scores) > 1 else NOTHING,
            chance,
            *(NOTHING for _ in result.of_things),
        ]

    rows.append(whole("faithfulness", result.scores, percent(result.chance_score)))
    things = {count: f"{count} thing{'s' * (count > 1)}" for count in result.of_things}
    for count, name in things.items():
        of = [score for score, there in zip(result.scores, result.things, strict=True) if there == count]
        rows.append(whole(f"faithfulness, {name}", of, NOTHING))
    title = f"Read off the pixels: {', '.join(ASKED)} make up faithfulness"
    columns = ["attribute", "right", "share", "95 % interval", "other prompts", *(f"of {n}" for n in things.values())]
    return Table(title, columns, rows)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def percent_range(interval: tuple[float, float]) -> str:
    return "{:.0f}-{:.0f} %".format(*(100 * bound for bound in interval))


def wilson(right: int, asked: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    if asked == 0:
        return 0.0, 1.0
    p, n, z = right / asked, asked, 1.96
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def bootstrap(scores: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean, resampling videos (Efron 1979)."""
    values = np.asarray(scores)
    picks = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


# Distances, all of uint8 [F, H, W, 3]


def ssim(a: Frames, b: Frames) -> float:
    """Structural similarity of the brightness, mean over frames (Wang et al. 2004: Gaussian window, 11 wide)."""
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = (window / window.sum()).astype(np.float32)

    def blur(x: NDArray) -> NDArray:
        x = sum(w * x[i : x.shape[0] - 10 + i] for i, w in enumerate(window))
        return sum(w * x[:, i : x.shape[1] - 10 + i] for i, w in enumerate(window))

    scores = []
    for x, y in zip(_gray(a), _gray(b), strict=True):
        mx, my = blur(x), blur(y)
        vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        scores.append(((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())
    return float(np.mean(scores))


def feature_distance(a: Frames, b: Frames) -> float:
    """In the manner of LPIPS (Zhang et al. 2018), with fixed filters for learned ones: 0 is equal, about 1 unrelated.

    Colours, slopes and curvatures on four scales; the vector at each place has length 1 before it is compared.
    """
    total = 0.0
    for x, y in zip(a, b, strict=True):
        x, y = (v.astype(np.float32) / 255 for v in (x, y))
        for _ in range(4):
            difference = _features(x) - _features(y)
            total += float((difference**2).sum(axis=-1).mean()) / 4
            x, y = (_half(v) for v in (x, y))
    return total / len(a)


def _features(x: NDArray) -> NDArray:
    """[H, W, 3] -> unit vectors [H-2, W-2, 18]."""
    c = x[1:-1, 1:-1]
    left, right, above, below = x[1:-1, :-2], x[1:-1, 2:], x[:-2, 1:-1], x[2:, 1:-1]
    parts = [c - 0.5, right - left, below - above, right + left - 2 * c, below + above - 2 * c]
    parts.append(x[2:, 2:] + x[:-2, :-2] - x[2:, :-2] - x[:-2, 2:])
    features = np.concatenate(parts, axis=-1)
    return features / np.sqrt((features**2).sum(axis=-1, keepdims=True) + 1e-3)


def _half(x: NDArray) -> NDArray:
    h, w = x.shape[0] // 2, x.shape[1] // 2
    return x[: 2 * h, : 2 * w].reshape(h, 2, w, 2, -1).mean(axis=(1, 3))


def flicker(frames: Frames) -> float:
    """Root mean square of the second difference of brightness over time, in steps of 255: steady change counts 0."""
    gray = _gray(frames)
    if len(gray) < 3:
        return 0.0
    return float(np.sqrt(np.mean((gray[2:] - 2 * gray[1:-1] + gray[:-2]) ** 2)))


def _gray(frames: Frames) -> NDArray[np.float32]:
    return frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


# What is judged


def make_video(pipeline: Show1Pipeline, prompt: Prompt, settings: Settings) -> Frames:
    """uint8 [F, H, W, 3]."""
    return pipeline(prompt.prompt, seed=prompt.seed, settings=settings).frames


def make_keyframes(pipeline: Show1Pipeline, prompt: Prompt, settings: Settings) -> Frames:
    """Base's key frames, those of `make_video`, enlarged without a network to a video's size: uint8 [N, H, W, 3]."""
    clip = run_base(pipeline.engines, run_text(pipeline.engines, prompt.prompt), settings, prompt.seed)
    check_finite(pipeline.engines.bundle, "base", clip)
    return resize_frames(clip_to_frames(clip), settings.size)


@dataclass(frozen=True)
class Judged:
    """What is judged, and the engines and stages that make it."""

    name: str
    make: Callable[[Show1Pipeline, Prompt, Settings], Frames]
    engines: Sequence[str]
    stages: Sequence[str]


VIDEOS = Judged("videos", make_video, tuple(CATALOG), STAGES)
KEYFRAMES = Judged("key frames", make_keyframes, ("t5", "base"), ("text", "base"))


@dataclass(frozen=True)
class Task:
    """What `bundle` makes of prompts is to be judged; `options` are those of `Settings.with_options`.

    Clips are kept in `out`.
    """

    bundle: Bundle
    prompts: Sequence[Prompt]
    judged: Judged
    options: Mapping[str, Any]
    out: Path

    def settings(self, preset: str) -> Settings:
        """Raises what `check_run` does."""
        settings = Settings.from_dict(self.bundle.manifest.defaults).with_options(preset=preset, **self.options)
        check_run(self.bundle, settings)
        return settings

    @contextmanager
    def maker(self) -> Iterator[Callable[[Prompt, Settings], Frames]]:
        with Show1Pipeline(EnginePool(self.bundle, keep_loaded=True)) as pipeline:
            for engine in self.judged.engines:  # loading is no part of a video's time
                with pipeline.engines.use(engine):
                    pass
            yield partial(self.judged.make, pipeline)

    def made_by(self) -> dict[str, Any]:
        """Beside settings."""
        return {"bundle": self.bundle.id, "judged": self.judged.name}

    def said(self, index: int, seen: str, before: str = "") -> None:
        what = f"{before}{index + 1} of {len(self.prompts)}: {self.prompts[index].prompt} -> {seen}"
        print(what, file=sys.stderr, flush=True)


def judge(task: Task, settings: Settings, reference: Path | None, report: Report) -> None:
    """By itself, and compared with another run's clips where `reference` has them."""
    made_by = {**task.made_by(), **settings.to_dict()}
    with task.maker() as make:
        result = run_quality(
            task.prompts, lambda prompt: make(prompt, settings), task.out, reference, task.said, made_by
        )
    videos = result["videos"]
    tables = [faithfulness_table(result["faithfulness"]), distance_table(videos), clips_table({"all": videos})]
    numbers = {"videos": json_rows(videos), "faithfulness": asdict(result["faithfulness"])}
    report.finish(numbers, tables, {}, pictures=sheets(task.out))


# One run over a folder of clips


def clip_file(folder: Path, index: int) -> Path:
    return folder / f"{index:02}.npz"


def run_quality(
    prompts: Sequence[Prompt],
    make: Callable[[Prompt], Frames],
    out: Path,
    reference: Path | None = None,
    on_clip: Callable[[int, str], None] | None = None,
    made_by: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Make and judge every prompt's video; keep clips and contact sheets in `out`, which is there.

    A clip that is there already is not made again: an interrupted run continues. `reference` is another run's folder;
    `made_by` is kept with the clips, bundle and settings, and so are date, commit and load, which a later run's
    conditions say nothing of. Raises OutputError for clips of another prompt, seed or `made_by`, and for a reference
    with fewer clips or of another size.
    """
    _commit()  # asked before the first clip
    if reference is not None:
        if reference.resolve() == out.resolve():
            raise OutputError(f"--reference and --out are both {out}: distances would be to itself. Name another.")
        missing = [clip_file(reference, i).name for i in range(len(prompts)) if not clip_file(reference, i).is_file()]
        if missing:
            raise OutputError(f"{reference}: no {', '.join(missing)}. Run the reference with as many --prompts first.")
        for index, prompt in enumerate(prompts):
            _read_clip(clip_file(reference, index), prompt, frames=False)
    readings: list[Reading] = []
    rows: list[dict[str, Any]] = []
    maker = json.dumps(made_by or {}, sort_keys=True)
    for index, prompt in enumerate(prompts):
        file = clip_file(out, index)
        if not file.is_file():
            start = time.perf_counter()
            frames = make(prompt)
            _keep(file, prompt, maker, frames, time.perf_counter() - start)
        frames, making = _kept(file, prompt, maker)
        readings.append(read(frames))
        row: dict[str, Any] = {"prompt": prompt.prompt, "seed": prompt.seed, **making}
        row["flicker"] = flicker(frames)
        row["seen"] = [f"{thing.colour} {thing.shape}, {thing.motion}" for thing in readings[-1].things]
        row["background"] = readings[-1].background
        if reference is not None:
            other = _read_clip(clip_file(reference, index), prompt)["frames"]
            if other.shape != frames.shape:
                raise OutputError(
                    f"{clip_file(reference, index)} has frames of {other.shape}, this run's are of {frames.shape}. "
                    "Give the --video and --keyframes of the reference."
                )
            row |= {
                "psnr": psnr(frames, other),
                "ssim": ssim(frames, other),
                "feature_distance": feature_distance(frames, other),
            }
        rows.append(row)
        if on_clip is not None:
            on_clip(index, "; ".join(row["seen"]) or "nothing")
    result = faithfulness([prompt.scene for prompt in prompts], readings)
    for row, score in zip(rows, result.scores, strict=True):
        row["faithfulness"] = score
    _contact_sheets(out, rows)
    return {"faithfulness": result, "videos": rows}


@cache
def _commit() -> str | None:
    """As the first run began: what is checked out since is not what this process runs."""
    return git_commit(ROOT)


def _keep(file: Path, prompt: Prompt, maker: str, frames: Frames, seconds: float) -> None:
    content = io.BytesIO()
    np.savez_compressed(
        content,
        frames=frames,
        prompt=prompt.prompt,
        seed=prompt.seed,
        maker=maker,
        seconds=seconds,
        conditions=json.dumps({**describe_moment(), "commit": _commit()}),
    )
    write_bytes(file, content.getvalue())


def _kept(file: Path, prompt: Prompt, maker: str) -> tuple[Frames, dict[str, Any]]:
    """Frames, and how they were made: seconds and conditions, of which None is not known."""
    kept = _read_clip(file, prompt)
    if str(kept["maker"]) != maker:
        raise OutputError(f"{file} was made by another bundle or with other settings. Choose another --out.")
    return kept["frames"], {"seconds": float(kept["seconds"]), **json.loads(str(kept["conditions"]))}


def _read_clip(file: Path, prompt: Prompt | None = None, frames: bool = True) -> dict[str, NDArray[Any]]:
    """What `_keep` wrote; its frames, which have to be unpacked, only where they are wanted.

    Raises OutputError for another file, or a clip of another prompt or seed.
    """
    try:
        with np.load(file) as content:
            clip = {name: content[name] for name in _CLIP if frames or name != "frames"}
        ours = prompt is None or (str(clip["prompt"]) == prompt.prompt and int(clip["seed"]) == prompt.seed)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise OutputError(f"{file} is not a clip of this command ({type(error).__name__}). Move it away.") from None
    if not ours:
        raise OutputError(f"{file} is of another prompt or seed. Choose another folder.")
    return clip


def describe_clips(folder: Path) -> dict[str, Any]:
    """What made a run's clips, and at which commit, by its first one. Raises OutputError where there is none."""
    if not clip_file(folder, 0).is_file():
        raise OutputError(f"{folder}: no {clip_file(folder, 0).name}. Give the --out of another run.")
    clip = _read_clip(clip_file(folder, 0), frames=False)
    conditions, maker = (json.loads(str(clip[name])) for name in ("conditions", "maker"))
    return {"commit": conditions["commit"], **maker}


def json_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """JSON has no infinity: the PSNR of equal videos."""
    return [{**row, "psnr": "equal"} if np.isinf(row.get("psnr", 0)) else dict(row) for row in rows]


def clips_table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """When and by what the clips of each run were made: some may be older than the report's conditions."""
    lines = []
    for name, clips in rows.items():
        dates, loads, commits = ([clip[key] for clip in clips] for key in _CONDITIONS)
        distinct = ", ".join(dict.fromkeys(commit or _UNKNOWN for commit in commits))
        lines.append([name, str(len(clips)), _span(dates), _span(loads), distinct])
    return Table("Clips", ["clips", "number", "made", "load", "commit"], lines)


def _span(values: Sequence[Any]) -> str:
    known = sorted(value for value in values if value is not None)
    parts = [" to ".join(map(str, dict.fromkeys((known[0], known[-1]))))] if known else []
    return ", ".join([*parts, *([_UNKNOWN] if len(known) < len(values) else [])])


def distance_table(rows: Iterable[dict[str, Any]]) -> Table:
    """Median and worst video of each measure."""
    rows = list(rows)
    lines = []
    for key, name, worst in (
        ("flicker", "flicker", max),
        ("psnr", "PSNR to reference, dB", min),
        ("ssim", "SSIM to reference", min),
        ("feature_distance", "feature distance to reference", max),
    ):
        values = [row[key] for row in rows if key in row]
        lines.append(
            [name, *(("equal" if np.isinf(v) else number(v)) for v in (middle(values), worst(values)))]
            if values
            else [name, NOTHING, NOTHING]
        )
    return Table("Smoothness and distance", ["measure", "median", "worst"], lines)


def middle(values: Sequence[float]) -> float:
    """The median: of two in the middle their mean, but the finite one where the other is infinite."""
    found = float(np.median(values))
    return found if np.isfinite(found) else statistics.median_low(values)


def sheets(out: Path) -> list[Path]:
    """Contact sheets in their order."""
    return sorted(out.glob("sheet-*.png"), key=lambda sheet: int(sheet.stem.removeprefix("sheet-")))


def _contact_sheets(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Eight frames of every video with its prompt and what was read off it, eight videos to a PNG."""
    for old in out.glob("sheet-*.png"):  # of a run of more prompts
        old.unlink()
    for first in range(0, len(rows), _SHEET_ROWS):
        strips = []
        for index in range(first, min(first + _SHEET_ROWS, len(rows))):
            frames = _read_clip(clip_file(out, index))["frames"]
            height = round(_SHEET_WIDTH * frames.shape[1] / frames.shape[2])
            strip = Image.new("RGB", (_SHEET_WIDTH * _SHEET_FRAMES, height + 14), "white")
            for column, number_ in enumerate(np.linspace(0, len(frames) - 1, _SHEET_FRAMES).round().astype(int)):
                picture = Image.fromarray(frames[number_]).resize((_SHEET_WIDTH, height), Image.Resampling.BOX)
                strip.paste(picture, (column * _SHEET_WIDTH, 14))
            row = rows[index]
            text = f"{row['prompt']}   [read: {'; '.join(row['seen']) or 'nothing'} on {row['background']}]"
            ImageDraw.Draw(strip).text((2, 1), text, fill="black")
            strips.append(np.asarray(strip))
        content = io.BytesIO()
        Image.fromarray(np.concatenate(strips)).save(content, "png")
        write_bytes(out / f"sheet-{first // _SHEET_ROWS}.png", content.getvalue())
