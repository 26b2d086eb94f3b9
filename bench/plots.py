"""Plots as SVG: a few kilobytes of text each, that browsers and code hosts show, without a plotting library."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from bench.report import number

_COLOURS = ("#1f6fb4", "#d9772b", "#3d8f4e", "#8a63a8", "#b03a48", "#6b6b6b")
_WIDTH, _LEFT, _RIGHT, _TOP = 760, 90, 30, 64
_GREY = "#d5d5d5"


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _line(x0: float, y0: float, x1: float, y1: float, colour: str, more: str = "") -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{colour}"{more}/>'


def _document(height: float, title: str, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" font-family="sans-serif">'
    background = f'<rect width="{_WIDTH}" height="{height:.0f}" fill="white"/>'
    return "\n".join([head, background, _text(12, 22, title, size=15), *parts, "</svg>"]) + "\n"


def _legend(names: Sequence[str]) -> list[str]:
    parts, x = [], 12.0
    for index, name in enumerate(names):
        parts += [f'<rect x="{x:.1f}" y="35" width="11" height="11" fill="{_colour(index)}"/>', _text(x + 16, 45, name)]
        x += 34 + 6.6 * len(name)
    return parts


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, one group per row; a missing value is named as such."""

    title: str
    unit: str
    groups: Sequence[str]
    series: Mapping[str, Sequence[float | None]]

    def svg(self) -> str:
        bar, gap = 15, 12
        most = max((v for values in self.series.values() for v in values if v is not None), default=0) or 1
        scale = (_WIDTH - _LEFT - _RIGHT - 70) / most  # 70: for the number at its end
        parts, y = _legend(list(self.series)), float(_TOP)
        for row, group in enumerate(self.groups):
            parts.append(_text(_LEFT - 8, y + bar * len(self.series) / 2 + 4, group, "end"))
            for index, values in enumerate(self.series.values()):
                value = values[row]
                width = scale * (value or 0)
                label = "not measured" if value is None else f"{number(value)} {self.unit}"
                parts.append(
                    f'<rect x="{_LEFT}" y="{y:.1f}" width="{width:.1f}" height="{bar - 2}" fill="{_colour(index)}"/>'
                )
                parts.append(_text(_LEFT + width + 5, y + bar - 4, label, size=11))
                y += bar
            y += gap
        parts.append(_line(_LEFT, _TOP - 4, _LEFT, y - gap, "black"))
        return _document(y + 4, self.title, parts)


@dataclass(frozen=True)
class Axis:
    label: str
    log: bool = False

    def ticks(self, low: float, high: float) -> list[float]:
        if self.log:
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            return [10.0**d for d in decades if low <= 10.0**d * 1.0001 and 10.0**d <= high * 1.0001]
        step = 10 ** math.floor(math.log10((high - low) / 4))
        step *= next(f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= 6)
        return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]

    def range(self, values: Sequence[float]) -> tuple[float, float]:
        low, high = min(values), max(values)
        if self.log:  # whole decades
            return 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high) + 1e-9)
        return min(low, 0.0), (high if high > 0 else 1.0) * 1.05

    def scale(self, low: float, high: float, start: float, end: float) -> Callable[[float], float]:
        of: Callable[[float], float] = math.log10 if self.log else float
        a, b = of(low), of(high)
        return lambda value: start + (of(value) - a) / ((b - a) or 1) * (end - start)


@dataclass(frozen=True)
class Chart:
    """Lines and points over two axes. `marks` are vertical lines with a name, each where a span begins.

    `intervals` (x, low, high) belong to the points of the same name.
    """

    title: str
    x: Axis
    y: Axis
    lines: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    points: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    intervals: Mapping[str, Sequence[tuple[float, float, float]]] = field(default_factory=dict)
    marks: Sequence[tuple[float, str]] = ()

    def svg(self) -> str:
        height, bottom, top = 420, 370, _TOP + 8
        every = [p for series in (*self.lines.values(), *self.points.values()) for p in series]
        every += [(x, y) for series in self.intervals.values() for x, low, high in series for y in (low, high)]
        ranges = self.x.range([p[0] for p in every]), self.y.range([p[1] for p in every])
        at_x = self.x.scale(*ranges[0], _LEFT, _WIDTH - _RIGHT)
        at_y = self.y.scale(*ranges[1], bottom, top)
        parts = _legend([*self.lines, *self.points])
        for value in self.x.ticks(*ranges[0]):
            parts.append(_line(at_x(value), top, at_x(value), bottom, _GREY))
            parts.append(_text(at_x(value), bottom + 18, f"{value:g}", "middle", 11))
        for value in self.y.ticks(*ranges[1]):
            parts.append(_line(_LEFT, at_y(value), _WIDTH - _RIGHT, at_y(value), _GREY))
            parts.append(_text(_LEFT - 6, at_y(value) + 4, f"{value:g}", "end", 11))
        for index, (value, name) in enumerate(self.marks):
            parts.append(_line(at_x(value), top, at_x(value), bottom, "#777777", ' stroke-dasharray="3 3"'))
            parts.append(_text(at_x(value) + 3, top + 10 + 12 * (index % 3), name, size=11))
        for index, series in enumerate(self.lines.values()):
            path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in series)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{_colour(index)}" stroke-width="1.6"/>')
        for index, (name, series) in enumerate(self.points.items(), start=len(self.lines)):
            for x, low, high in self.intervals.get(name, ()):
                parts.append(_line(at_x(x), at_y(low), at_x(x), at_y(high), _colour(index), ' stroke-width="1.6"'))
            parts += [
                f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="4" fill="{_colour(index)}" fill-opacity="0.75"/>'
                for x, y in series
            ]
        parts += [_line(_LEFT, bottom, _WIDTH - _RIGHT, bottom, "black"), _line(_LEFT, top, _LEFT, bottom, "black")]
        parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, bottom + 38, self.x.label, "middle"))
        turn = f' transform="rotate(-90 20 {(top + bottom) / 2:.0f})"'
        parts.append(_text(20, (top + bottom) / 2, self.y.label, "middle", more=turn))
        return _document(height, self.title, parts)
