"""`export verify`: all golden cases hold, and it notices when one does not."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="needs the export extra")

from engines.catalog import CATALOG
from engines.errors import CheckpointError
from engines.manifest import EngineEntry
from engines.spec import INT8
from engines.store import Bundle
from export.__main__ import main
from export.job import Job
from export.networks import Source
from export.verify import _AXES, Arrays, Row, _build_with_variance, verify

pytestmark = pytest.mark.torch

Array = NDArray[Any]


@pytest.fixture
def trimmed(golden: Path, tmp_path: Path) -> Path:
    """A reference folder with the one file that is checked fastest."""
    folder = tmp_path / "reference"
    folder.mkdir()
    for name in ("meta.json", "text_t5.npz"):
        shutil.copyfile(golden / name, folder / name)
    return folder


def change(folder: Path, key: str, how: Callable[[Array], Array]) -> None:
    path = folder / "text_t5.npz"
    with np.load(path) as data:
        arrays = {**data, key: how(data[key])}
    np.savez(path, **arrays)


def run_verify(bundle: Path, reference: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `python -m export verify`."""
    try:
        code = main(["verify", str(bundle), "--reference", str(reference)])
    except SystemExit as exit:
        code = exit.code
    return code, *capsys.readouterr()


def test_all_golden_cases_hold(golden: Path, bundle: Path) -> None:
    rows = verify(Bundle.open(bundle), golden)
    misses = [row for row in rows if not row.ok]
    assert not misses, "\n".join(map(str, misses))
    assert len(rows) >= 73  # as of the first version: cases may be added, none may vanish


def test_an_unchanged_reference_passes_and_absent_files_are_left_out(
    bundle: Path, trimmed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run_verify(bundle, trimmed, capsys)
    assert code == 0
    assert "MISS" not in out
    cases = [line.split("  ")[0] for line in out.splitlines()[1:]]
    assert cases == ["t5 input_ids", "t5 attention_mask", "t5 prompt", "t5 negative", "4 of 4 cases ok"]


@pytest.mark.parametrize(
    ("key", "case", "how"),
    [
        ("prompt_embeds", "t5 prompt", lambda x: x + np.float32(2e-5)),
        ("negative_embeds", "t5 negative", lambda x: np.where(np.arange(x.size).reshape(x.shape) == 7, np.nan, x)),
        ("input_ids", "t5 input_ids", lambda x: x[:, ::-1]),
    ],
    ids=["off by two tolerances", "one NaN", "other tokens"],
)
def test_a_changed_reference_is_a_miss_and_exit_code_1(
    bundle: Path,
    trimmed: Path,
    capsys: pytest.CaptureFixture[str],
    key: str,
    case: str,
    how: Callable[[Array], Array],
) -> None:
    change(trimmed, key, how)
    code, out, _ = run_verify(bundle, trimmed, capsys)
    assert code == 1
    assert [line.split("  ")[0] for line in out.splitlines() if line.endswith("MISS")] == [case]
    assert out.splitlines()[-1] == "3 of 4 cases ok"


def test_a_reference_of_another_shape_fails_and_names_the_case(
    bundle: Path, trimmed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(trimmed, "prompt_embeds", lambda x: x[:, :5])
    code, out, err = run_verify(bundle, trimmed, capsys)
    assert code == 1
    assert "t5 prompt" in out + err


def test_a_reference_of_other_networks_is_told_as_such(
    bundle: Path, trimmed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not as a video's size that the engines do not take."""
    clip = np.zeros((1, 5, 2, 8, 8), np.float32)
    case = {"sample": clip, "out": clip, "ehs": np.zeros((1, 3, 7), np.float32), "timestep": np.ones(1, np.float32)}
    np.savez(trimmed / "unet_base.npz", **case)
    code, _, err = run_verify(bundle, trimmed, capsys)
    assert code == 1
    assert re.search(r"engines do not take what \S+ gives them: base/.* has shape .*, or a bundle built from", err), err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "meta.json").unlink(), "no meta.json there"),
        (lambda folder: (folder / "meta.json").write_text("{"), "meta.json cannot be read as JSON"),
        (lambda folder: (folder / "text_t5.npz").unlink(), "no reference arrays"),
        (lambda folder: (folder / "text_t5.npz").write_bytes(b"PK\x03\x04"), "text_t5.npz"),
    ],
    ids=["no meta.json", "broken meta.json", "no arrays", "truncated arrays"],
)
def test_an_unusable_reference_folder_is_one_clear_line(
    bundle: Path, trimmed: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(trimmed)
    code, _, err = run_verify(bundle, trimmed, capsys)
    assert code == 1
    (line,) = err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_mean_beyond_its_tolerance_is_a_miss() -> None:
    assert Row("sr1", 1e-2, 1e-3, 3e-2, 2e-3).ok
    assert not Row("sr1", 1e-2, 3e-3, 3e-2, 2e-3).ok and not Row("sr1", 4e-2, 1e-3, 3e-2, 2e-3).ok


@pytest.mark.parametrize(
    ("file", "arrays", "message"),
    [
        (
            "pipe_sr1_cond",
            {"video": np.zeros((1, 3, 8, 5, 6)), "first_frame_cond": np.zeros((1, 3, 1, 20, 20))},
            r"x\.npz: first_frame_cond has shape \(1, 3, 1, 20, 20\), wanted \[1, 3, 1, 4H, 4W\], .*H = 5, W = 6\.",
        ),
        ("pipe_if2", {"image": np.zeros((1, 3, 8))}, r"image has shape \(1, 3, 8\), wanted \[1, 3, H, W\]\."),
        ("pipe_if2", {"image": np.zeros((1, 3, 0, 8))}, r"image has shape \(1, 3, 0, 8\)"),
        ("pipe_sr2", {"frames_in": np.zeros((2, 8, 8, 3))}, r"frames_in is float64, wanted uint8\."),
    ],
    ids=["of another size", "an axis less", "nothing", "no bytes"],
)
def test_inputs_of_other_axes_are_told_before_they_are_used(file: str, arrays: dict[str, Array], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Arrays(arrays).check_axes("x.npz", _AXES[file])


@pytest.mark.parametrize(("backend", "precision"), [("onnxruntime", "fp32"), ("tensorrt-rtx", "fp16")])
def test_an_int8_bundles_variance_is_that_of_the_precision_it_was_made_from(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, precision: str
) -> None:
    jobs: list[Job] = []
    monkeypatch.setattr("export.job.build_engine", lambda job, folder: jobs.append(job))
    entry = EngineEntry("base", backend, "1", INT8, (), {}, {}, {})
    _build_with_variance(entry, golden / "models", (576, 320), tmp_path / "base")
    source = Source.find(CATALOG["base"], golden / "models", precision)
    assert [(job.precision, job.source, job.keep_variance) for job in jobs] == [(precision, source, True)]
