"""What every test shares: the golden fixtures, a bundle built from them, and when tests are skipped."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest
from filelock import FileLock

from engines.gpu import find_gpus
from export.unpack import unpack
from runtime.engine import why_not_half

ROOT = Path(__file__).resolve().parent.parent
HALF = pytest.mark.skipif(bool(why_not_half()), reason="half precision is inexact on this processor")
NO_TORCH = "torch: needs the export extra, `pip install -e '.[export]'`"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the golden fixtures (tests/golden/README.md); SHOW1_GOLDEN names one that is unpacked already."""
    elsewhere = os.environ.get("SHOW1_GOLDEN")
    if elsewhere:
        folder = Path(elsewhere)
        if not (folder / "meta.json").is_file():
            pytest.fail(f"SHOW1_GOLDEN is {elsewhere}: no meta.json there. Name an unpacked folder, or unset it.")
        return folder
    return unpack(ROOT / "tests" / "golden" / "golden.tar.xz", ROOT / "build" / "golden")


@pytest.fixture(scope="session")
def bundle(golden: Path) -> Path:
    """All nine engines of the golden models in float32. Copy them before changing anything.

    Built in minutes once, and again when the exporter changes; SHOW1_BUNDLE names one to be taken as it is.
    """
    elsewhere = os.environ.get("SHOW1_BUNDLE")
    if elsewhere:
        return Path(elsewhere)
    from export.build import build  # every test with this fixture is marked torch, see below

    folder = ROOT / "build" / "bundle"
    with FileLock(ROOT / "build" / ".bundle.lock"):  # a second test run waits here, then finds all up to date
        build(golden / "models", folder)
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow_wanted = config.getoption("--run-slow") or re.search(r"\bslow\b", config.getoption("-m") or "")
    if not slow_wanted:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: ask for it with --run-slow or -m slow"))

    if not os.environ.get("SHOW1_BUNDLE"):
        for item in items:
            if "bundle" in getattr(item, "fixturenames", ()):
                item.add_marker("torch")
    if importlib.util.find_spec("torch") is None:
        for item in items:
            if item.get_closest_marker("torch"):
                item.add_marker(pytest.mark.skip(reason=NO_TORCH))

    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not find_gpus():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="gpu: no GPU that an NVIDIA driver shows"))
