"""Plots: well-formed SVG whose marks lie where the numbers say."""

from xml.etree import ElementTree

import pytest

from bench.plots import Axis, Bars, Chart

SVG = "{http://www.w3.org/2000/svg}"


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def test_bars_are_as_long_as_their_values() -> None:
    root = parsed(Bars("t", "s", ["a", "b"], {"ours": [1.0, 2.0], "theirs": [4.0, None]}).svg())
    bars = [rect for rect in root.iter(f"{SVG}rect") if rect.get("x") == "90"]
    assert [float(bar.get("width", "")) for bar in bars] == pytest.approx([142.5, 570.0, 285.0, 0.0])
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"t", "a", "b", "ours", "theirs", "1.00 s", "4.00 s", "not measured"} <= set(texts)


def test_points_of_a_logarithmic_chart_are_spaced_by_ratio() -> None:
    chart = Chart("t", Axis("x", log=True), Axis("y"), points={"p": [(1, 1), (10, 2), (100, 3)]})
    x, y = ([float(c.get(k, "")) for c in parsed(chart.svg()).iter(f"{SVG}circle")] for k in ("cx", "cy"))
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2) and y[0] > y[1] > y[2]


def test_intervals_stand_behind_their_points() -> None:
    chart = Chart("t", Axis("x"), Axis("y"), points={"a": [(1, 5)]}, intervals={"a": [(1, 2, 9)]})
    root = parsed(chart.svg())
    (circle,) = root.iter(f"{SVG}circle")
    (line,) = (line for line in root.iter(f"{SVG}line") if line.get("stroke-width") == "1.6")
    assert line.get("x1") == line.get("x2") == circle.get("cx") and line.get("stroke") == circle.get("fill")
    assert float(line.get("y1", "")) > float(circle.get("cy", "")) > float(line.get("y2", ""))


def test_a_line_goes_through_its_points_and_marks_are_named() -> None:
    chart = Chart("t", Axis("s"), Axis("GiB"), {"line": [(0, 0), (2, 4)]}, marks=[(1, "<base>")])
    root = parsed(chart.svg())
    (line,) = root.iter(f"{SVG}polyline")
    assert len(line.get("points", "").split()) == 2
    assert "<base>" in [text.text for text in root.iter(f"{SVG}text")]


def test_the_legend_has_the_colours_of_lines_and_points() -> None:
    root = parsed(Chart("t", Axis("x"), Axis("y"), {"a": [(0, 0), (1, 2)]}, {"b": [(1, 1)]}).svg())
    legend = [rect.get("fill") for rect in root.iter(f"{SVG}rect") if rect.get("y") == "35"]
    (line,), (point,) = root.iter(f"{SVG}polyline"), root.iter(f"{SVG}circle")
    assert legend == [line.get("stroke"), point.get("fill")]


def test_heights_are_shown_from_zero() -> None:
    assert Axis("y").range([2.0, 4.0])[0] == 0


@pytest.mark.parametrize(
    ("axis", "low", "high", "ticks"),
    [
        (Axis("x"), 0, 10, [0, 2, 4, 6, 8, 10]),
        (Axis("x"), 0, 0.13, [0, 0.05, 0.1]),
        (Axis("x", log=True), 1, 1000, [1, 10, 100, 1000]),
    ],
)
def test_ticks_are_round(axis: Axis, low: float, high: float, ticks: list[float]) -> None:
    assert axis.ticks(low, high) == pytest.approx(ticks)


def test_a_constant_of_zero_can_be_drawn() -> None:
    parsed(Chart("t", Axis("x"), Axis("y"), {"line": [(0, 0), (1, 0)]}).svg())
    parsed(Bars("t", "s", ["a"], {"ours": [0.0]}).svg())
