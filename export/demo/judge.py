"""What a video of the demo's kind shows, read off its pixels: things, their colour, shape and motion, the background.

Classical image analysis, nothing learned and nothing known of the prompt. Positions are in half frame heights from the
centre, x to the right and y down, as in `export.demo.scenes`.
"""

import math
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from export.demo.captions import BACKGROUNDS, COLOURS, ROUND, Scene, Thing
from runtime.ops import Frames

Mask = NDArray[np.bool_]

_ROWS = 160  # the picture's height for measuring
_CONTRAST = 0.2  # distance in RGB that sets a thing off; backgrounds reach 0.21 in single pixels, which are eroded
_APART = 0.28  # distance between the colours of two things; shading stays below
_LEAST_AREA = 0.003  # of the frame, eroded: below this nothing is called a thing
_PRESENT = 0.7  # share of frames that a thing must be seen in

_RESIZED = 0.4  # natural logarithm of the last size over the first
_SWUNG = 0.07  # deviation from steady motion that bouncing leaves
_MOVED = 0.2
_TURNED = 0.6  # radians
# Corner count -> share of the outline's mean radius in that harmonic, of an ideal triangle, square and star.
_HARMONICS = {3: ("triangle", 0.22), 4: ("square", 0.1), 5: ("star", 0.27)}
_ROUNDER = 0.45  # below this share of the ideal harmonic an outline counts as round
_DIRECTIONS = 72  # bins of an outline


@dataclass(frozen=True)
class Seen:
    """One thing of a video, in the words of captions."""

    colour: str
    shape: str
    motion: str


@dataclass(frozen=True)
class Reading:
    things: tuple[Seen, ...]  # the larger first
    background: str


def read(frames: Frames) -> Reading:
    """Judge uint8 [F, H, W, 3]. Never fails: a video of nothing has no things."""
    clip = _shrink(frames)
    border = np.concatenate([clip[:, :2].reshape(-1, 3), clip[:, -2:].reshape(-1, 3)])
    background = np.median(border, axis=0)
    behind = str(_nearest(background[None], BACKGROUNDS)[0])
    palette = {name: rgb for name, rgb in COLOURS.items() if name != behind}
    stands_out = np.linalg.norm(clip - background, axis=-1) > _CONTRAST  # [F, h, w]
    inside = _erode(stands_out, 2)
    enough = _LEAST_AREA * inside.size

    found: list[tuple[str, NDArray]] = []
    rest = clip[inside]
    while len(rest) > enough and len(found) < 2:
        names = _nearest(rest, palette)
        values, counts = np.unique(names, return_counts=True)
        name = str(values[counts.argmax()])
        colour = np.median(rest[names == name], axis=0)
        found.append((name, colour))
        rest = rest[(names != name) & (np.linalg.norm(rest - colour, axis=-1) > _APART)]
    if not found:
        return Reading((), behind)

    # Each pixel to the nearest thing; blends at the edges belong to a thing only next to its inside.
    owner = np.stack([np.linalg.norm(_dim(clip) - _dim(colour), axis=-1) for _, colour in found]).argmin(axis=0)
    masks = [stands_out & _dilate(inside & (owner == i), 4) & (owner == i) for i in range(len(found))]
    seen = [(mask.sum(), _describe(name, mask)) for (name, _), mask in zip(found, masks, strict=True)]
    return Reading(tuple(thing for _, thing in sorted(seen, key=lambda s: -s[0]) if thing is not None), behind)


def answers(scene: Scene, reading: Reading) -> dict[str, list[bool]]:
    """For each attribute, right or wrong for every thing asked for, paired as suits best; a missing thing is wrong."""
    slots: list[Seen | None] = [*reading.things, *[None] * len(scene.things)]
    pairings = [[_compare(t, s) for t, s in zip(scene.things, order, strict=False)] for order in permutations(slots)]
    best = max(pairings, key=lambda rows: sum(map(sum, (row.values() for row in rows))))
    result = {key: [row[key] for row in best] for key in best[0]}
    result["count"] = [len(reading.things) == len(scene.things)]
    result["background"] = [reading.background == scene.background]
    return result


def _compare(thing: Thing, seen: Seen | None) -> dict[str, bool]:
    return {
        "colour": seen is not None and seen.colour == thing.colour,
        "shape": seen is not None and seen.shape == thing.shape,
        "motion": seen is not None and motion_kind(seen.motion) == motion_kind(thing.motion),
        "direction": seen is not None and seen.motion == thing.motion,
    }


def motion_kind(motion: str) -> str:
    """The kind without its direction: "move", "bounce", "resize", "turn" or "still"."""
    first = motion.split()[0]
    kinds = {"bounce": "bounce", "grow": "resize", "shrink": "resize", "still": "still"}
    return kinds.get(first, "turn" if "clockwise" in motion else "move")


def _shrink(frames: Frames) -> NDArray[np.float32]:
    """Block averages with about `_ROWS` rows, float32 in [0, 1]."""
    factor = max(1, frames.shape[1] // _ROWS)
    f, h, w = frames.shape[0], frames.shape[1] // factor, frames.shape[2] // factor
    blocks = frames[:, : h * factor, : w * factor].reshape(f, h, factor, w, factor, 3)
    return (blocks.mean(axis=(2, 4)) / 255).astype(np.float32)


def _nearest(pixels: NDArray, palette: dict[str, tuple[float, float, float]]) -> NDArray[np.str_]:
    """The name of the nearest colour, [N, 3] -> [N]."""
    names, colours = [*palette], np.array([*palette.values()])
    return np.array(names)[np.linalg.norm(_dim(pixels)[:, None] - _dim(colours), axis=-1).argmin(axis=1)]


def _dim(rgb: NDArray) -> NDArray:
    """Colours, [..., 3], with half of their brightness: light and shade leave the hue."""
    return rgb - 0.5 * rgb.mean(axis=-1, keepdims=True)


def _erode(mask: Mask, times: int) -> Mask:
    return ~_dilate(~mask, times)


def _dilate(mask: Mask, times: int) -> Mask:
    """Grow by `times` pixels up, down, left and right, frame by frame."""
    for _ in range(times):
        grown = mask.copy()
        grown[:, 1:] |= mask[:, :-1]
        grown[:, :-1] |= mask[:, 1:]
        grown[:, :, 1:] |= mask[:, :, :-1]
        grown[:, :, :-1] |= mask[:, :, 1:]
        mask = grown
    return mask


def _describe(colour: str, mask: Mask) -> Seen | None:
    """Shape and motion of the thing that `mask` [F, h, w] shows; None where it is hardly there."""
    f, h, w = mask.shape
    areas = mask.sum(axis=(1, 2))
    seen = np.flatnonzero(areas > _LEAST_AREA / 3 * h * w)
    if len(seen) < max(3, _PRESENT * f):
        return None
    unit = 2 / h  # a pixel in half frame heights
    centres = np.empty((len(seen), 2))
    outlines = np.empty((len(seen), _DIRECTIONS))
    holes = np.empty(len(seen))
    for row, number in enumerate(seen):
        y, x = _one_piece(mask[number])
        centres[row] = x.mean(), y.mean()
        dx, dy = x - centres[row, 0], y - centres[row, 1]
        length = np.hypot(dx, dy)
        outlines[row] = _outline(dx, dy, length)
        core = 0.35 * outlines[row].mean()
        holes[row] = 1 - np.count_nonzero(length < core) / max(1.0, math.pi * core**2)
    time = seen / (f - 1)
    centres = (centres - np.array([w, h]) / 2) * unit
    shape, turn = _shape(outlines, holes, areas[seen])
    growth = float(np.polyfit(time, 0.5 * np.log(areas[seen]), 1)[0])
    slopes = np.polyfit(time, centres, 1)
    swing = (centres - np.outer(time, slopes[0]) - slopes[1]).std(axis=0)
    travel = (float(slopes[0][0]), float(slopes[0][1]))
    return Seen(colour, shape, _motion(travel, swing, growth, turn, shape))


def _one_piece(mask: Mask) -> tuple[NDArray, NDArray]:
    """Rows and columns of the set pixels without those far from most: no shape reaches so far from its middle."""
    y, x = np.nonzero(mask)
    length = np.hypot(y - np.median(y), x - np.median(x))
    near = length <= 2.6 * max(1.0, np.median(length))
    return y[near], x[near]


def _outline(dx: NDArray, dy: NDArray, length: NDArray) -> NDArray:
    """The largest radius in each direction, clockwise from the right, in pixels; empty directions are interpolated."""
    bins = ((np.arctan2(dy, dx) / (2 * math.pi)) % 1 * _DIRECTIONS).astype(int) % _DIRECTIONS
    radius = np.zeros(_DIRECTIONS)
    np.maximum.at(radius, bins, length)
    there = np.flatnonzero(radius)
    return np.interp(np.arange(_DIRECTIONS), there, radius[there], period=_DIRECTIONS)


def _shape(outlines: NDArray, holes: NDArray, areas: NDArray) -> tuple[str, float]:
    """The shape's name, and by what angle its corners turn, clockwise."""
    large = areas >= np.median(areas)  # small pictures of a growing thing say less
    if np.median(holes[large]) > 0.6:
        return "ring", 0.0
    spectrum = np.fft.rfft(outlines, axis=1)
    strength = np.abs(spectrum[large]).mean(axis=0) * 2 / np.abs(spectrum[large, 0]).mean()
    corners = max(_HARMONICS, key=lambda n: strength[n] / _HARMONICS[n][1])
    name, ideal = _HARMONICS[corners]
    if strength[corners] < _ROUNDER * ideal:
        return "circle", 0.0
    phase = np.unwrap(-np.angle(spectrum[:, corners])) / corners
    steady = np.polyfit(np.arange(len(phase)), phase, 1)[0] * (len(phase) - 1)
    return name, float(steady)


def _motion(travel: tuple[float, float], swing: NDArray, growth: float, turn: float, shape: str) -> str:
    if abs(growth) > _RESIZED:
        return "grow" if growth > 0 else "shrink"
    if swing.max() > _SWUNG:
        return "bounce horizontal" if swing[0] > swing[1] else "bounce vertical"
    words = []
    if abs(travel[1]) > _MOVED:
        words.append("down" if travel[1] > 0 else "up")
    if abs(travel[0]) > _MOVED:
        words.append("right" if travel[0] > 0 else "left")
    if words:
        return " ".join(words)
    if shape not in ROUND and abs(turn) > _TURNED:
        return "clockwise" if turn > 0 else "counterclockwise"
    return "still"
