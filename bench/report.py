"""Numbers as tables, in the terminal and as Markdown; results as files: JSON, a page with its tables, plots."""

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bench.machine import ROOT
from bench.timing import Summary
from engines.errors import OutputError
from engines.store import write_atomically

FORMAT = 1

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


def share(part: float, whole: float) -> str:
    return f"{number(100 * part / whole, 2)} %"


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


class Plot(Protocol):
    def svg(self) -> str: ...


Content = tuple[Mapping[str, Any], Sequence[Table], Mapping[str, Plot]]  # of a result: numbers, tables, plots


class Report:
    """A benchmark's result under one name: `x.json` with every number, `x.md` with tables and plots, `x-plot.svg`.

    Conditions are printed when it is made, before anything is measured; `save` may be called again with more.
    """

    def __init__(self, benchmark: str, out: Path, conditions: Mapping[str, Mapping[str, Any]], markdown: bool = False):
        check_output(out)
        self.benchmark, self.out, self.conditions, self.markdown = benchmark, out, dict(conditions), markdown
        for name, values in self.conditions.items():
            print(f"{name}\n\n{facts(values)}\n", flush=True)

    def save(
        self,
        numbers: Mapping[str, Any],
        tables: Sequence[Table],
        plots: Mapping[str, Plot],
        pictures: Sequence[Path] = (),
    ) -> None:
        """`pictures` lie beside the page already, or in folders there."""
        parts = [f"# {self.benchmark}"]
        parts += [f"**{name}**\n\n```\n{facts(values)}\n```" for name, values in self.conditions.items()]
        parts += [table.as_markdown() for table in tables]
        for name, plot in plots.items():
            path = self.out.with_name(f"{self.out.stem}-{name}.svg")
            write_text(path, plot.svg())
            parts.append(f"![{name}]({path.name})")
        parts += [f"![{path}]({path})" for path in (p.relative_to(self.out.parent).as_posix() for p in pictures)]
        write_text(self.out.with_suffix(".md"), "\n\n".join(parts) + "\n")
        write_json(self.out, {"format": FORMAT, "benchmark": self.benchmark, **self.conditions, **numbers})

    def finish(
        self,
        numbers: Mapping[str, Any],
        tables: Sequence[Table],
        plots: Mapping[str, Plot],
        pictures: Sequence[Path] = (),
    ) -> None:
        self.save(numbers, tables, plots, pictures)
        for table in tables:
            print((table.as_markdown() if self.markdown else table.as_text()) + "\n")
        beside = "pictures" if pictures else ".svg"
        print(f"written to {self.out}, with .md and {beside} beside it")


def check_output(path: Path) -> None:
    """Said before the measurement, which may take hours."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent}: cannot be made ({error.strerror}). Choose another --out.") from None
    if path.is_dir():
        raise OutputError(f"{path} is a folder. Name a file, e.g. --out {path / 'result.json'}.")
    if path.suffix != ".json":
        raise OutputError(f"--out {path}; allowed: a .json file, beside which .md and .svg are written.")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}). Choose another --out.") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Numbers that are none, or infinite, become null: JSON has neither. Raises OutputError."""
    write_text(path, json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Without paths of this machine: results are for others to read."""
    for folder, name in ((str(ROOT), "."), (os.path.expanduser("~"), "~")):
        if len(folder) > 1:
            written = "|".join(map(re.escape, (folder, json.dumps(folder)[1:-1])))  # Windows' in JSON
            text = re.sub(rf"(?:{written})(?![\w.-])", name, text)
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """The whole file or none. Raises OutputError."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}). Choose another --out.") from None
