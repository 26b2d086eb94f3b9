"""Commands that the documents name are ones that the programs take; packages are what pyproject.toml ships."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib import import_module

import pytest
from conftest import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "kernels" / "README.md"]
PROGRAMS = {"show1-rt": "runtime.cli", "python -m export": "export.__main__", "python -m bench": "bench.__main__"}


BEFORE = r"(?:[A-Z_]+=\S+ |taskset -c \S+ )*(?:\.venv\\Scripts\\)?"


def commands() -> Iterator[tuple[str, list[str]]]:
    """(module, arguments) of every command in an indented or fenced block."""
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        for program, module in PROGRAMS.items():
            for line in re.findall(rf"^(?: {{4,}}|\$ ){BEFORE}{program} (.+)$", text, re.MULTILINE):
                yield module, shlex.split(line, comments=True)


@pytest.mark.parametrize("module", PROGRAMS.values())
def test_every_command_of_the_documents_is_one(module: str) -> None:
    parser = import_module(module)._parser()
    found = [arguments for of, arguments in commands() if of == module]
    assert len(found) > 5
    for arguments in found:
        parser.parse_args(arguments)  # exits where it is not


def test_all_packages_and_their_data_are_shipped() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    homes = [path.parent for top in ("engines", "export", "runtime") for path in (ROOT / top).rglob("__init__.py")]
    assert sorted(setuptools["packages"]) == sorted(
        home.relative_to(ROOT).as_posix().replace("/", ".") for home in homes
    )
    listed = {ROOT / package.replace(".", "/") / f for package, fs in setuptools["package-data"].items() for f in fs}
    files = [path for home in homes for path in home.iterdir() if path.is_file() and not path.name.startswith(".")]
    assert listed == {path for path in files if path.suffix not in (".py", ".pyc")}
