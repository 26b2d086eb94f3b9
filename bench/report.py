"""Numbers as tables: plain text for the terminal, Markdown for the documentation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.timing import Summary

NOTHING = "-"  # in a cell that has nothing to say


@dataclass(frozen=True)
class Table:
    """The first column holds names, the others numbers."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]

    def as_text(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.headers, *self.rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(cells))
            for cells in (list(zip(row, widths, strict=True)) for row in (self.headers, *self.rows))
        ]
        return "\n".join([self.title, "", *(line.rstrip() for line in lines)])

    def as_markdown(self) -> str:
        rules = ["---"] + ["---:"] * (len(self.headers) - 1)
        lines = ["| " + " | ".join(row) + " |" for row in (self.headers, rules, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines])


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, never an exponent."""
    if value is None:
        return NOTHING
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    return f"{rounded:.{max(0, digits - 1 - math.floor(math.log10(abs(rounded))))}f}"


def median(summary: Summary | None, scale: float = 1) -> str:
    return number(summary.median * scale if summary else None)


def spread(summary: Summary | None, scale: float = 1) -> str:
    """p10-p90, of two or more times."""
    if summary is None or summary.n < 2:
        return NOTHING
    return f"{number(summary.p10 * scale)}-{number(summary.p90 * scale)}"


def share(part: float | None, whole: float) -> str:
    return NOTHING if part is None else f"{number(100 * part / whole, 2)} %"


def facts(values: Mapping[str, Any]) -> str:
    """One aligned line per entry; nested mappings and lists are joined."""
    width = max(map(len, values))
    return "\n".join(f"{name:{width}}  {_joined(value)}" for name, value in values.items())


def _joined(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_joined(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)
