"""The kernels' benchmark where there is no GPU: its checks and baselines on the CPU, with a clock that stands still."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from test_kernels import _on_cpu, _reference

from bench import kernels
from bench.__main__ import main
from bench.timing import Summary
from engines.errors import EngineError
from engines.gpu import find_gpus

pytestmark = pytest.mark.torch


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[kernels.KernelBench]:
    """Small shapes, the CUDA sources on the CPU, torch on the CPU and uncompiled; every call takes 2 us."""
    import torch

    def measure(call: Any, warmup: int, repeats: int, graph: bool) -> list[float]:
        for _ in range(warmup + 1):
            call()
        return [2e-6] * repeats

    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    monkeypatch.setattr(kernels, "measure_gpu", measure)
    monkeypatch.setattr(kernels.KernelBench, "stream", None)
    monkeypatch.setattr(torch, "compile", lambda call, dynamic: call)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(
        kernels, "ATTENTION_SHAPES", [replace(s, height=1, width=2) for s in kernels.ATTENTION_SHAPES[::4]]
    )
    monkeypatch.setattr(kernels, "NORM_SHAPES", [replace(s, rows=3) for s in kernels.NORM_SHAPES[::3]])
    small = {stage: (*shape[:3], 6, 8) for stage, shape in kernels.STEP_SHAPES.items()}
    monkeypatch.setattr(kernels, "STEP_SHAPES", small)
    yield kernels.KernelBench(torch, _on_cpu(), _reference(), warmup=1, repeats=3)


def test_every_kernel_is_checked_and_compared(bench: kernels.KernelBench) -> None:
    rows = list(bench.rows())
    assert len(rows) == 2 * len(kernels.ATTENTION_SHAPES) + len(kernels.NORM_SHAPES) + len(kernels.STEP_SHAPES)
    attention, step = rows[0], rows[-1]
    assert attention.bytes == kernels.ATTENTION_SHAPES[0].bytes and attention.others["SDPA"] is not None
    # 2 predictions, sample and x0 in and out, 2 inputs: 24 bytes per element.
    assert step.bytes == 24 * 4 * 29 * 48 and step.others["torch"] is not None
    json.dumps(kernels.to_json(rows, 1e12))
    text = kernels.table(rows, large_copy=1e12).as_text()
    assert "large copy 1000 GB/s" in text and "sr2 1 x 4 x 29 x 6 x 8" in text
    svg = kernels.plot(rows, 1e12).svg()
    assert svg.count("<circle") == len(rows) and "denoising step" in svg


def test_the_yardstick_is_the_faster_of_two_copies(bench: kernels.KernelBench, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([[2e-6], [1e-6]])
    monkeypatch.setattr(kernels, "measure_gpu", lambda *_, graph: next(times))
    assert bench.copy(2**10).median == bench.copy(2**10).median == 1e-6


def test_a_baseline_that_does_not_take_a_shape_is_none_and_a_lost_card_an_end(
    bench: kernels.KernelBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise ValueError("not this shape")

    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    assert bench.try_to_time(refuse) is None
    monkeypatch.setattr(bench.torch.cuda, "synchronize", lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        bench.try_to_time(refuse)


def test_a_wrong_result_is_told_in_its_row_and_at_the_end(
    bench: kernels.KernelBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.kernels, "temporal_attention", lambda *_, **__: None)
    monkeypatch.setattr(kernels, "build_kernels", lambda _: (bench.kernels, bench.references))
    monkeypatch.setattr(kernels, "COPY_BYTES", 2**10)
    saved: list[kernels.Content] = []
    with pytest.raises(EngineError, match=r"results are wrong: temporal attention, base .*, by nan"):
        kernels.run_kernels(bench.torch, "native", 1, 3, saved.append)
    numbers, (table,), _ = saved[-1]
    count = 2 * len(kernels.ATTENTION_SHAPES)
    assert [row[1] for row in table.rows] == ["NO"] * count + ["yes"] * (len(table.rows) - count)
    assert [row["right"] for row in numbers["kernels"]] == [row[1] == "yes" for row in table.rows]


def test_shares_and_ratios_are_of_the_same_run() -> None:
    times = [Summary(5, value, value * 0.9, value * 1.2) for value in (1e-3, 8e-4, 4e-3)]
    row = kernels.Row("k", "s", 10**9, 0.0, 0.0, times[0], times[1], {"torch": times[2], "xformers": None})
    assert kernels.table([row], 2e12).rows == [
        ["k: s", "yes", "1000", "900-1200", "1000", "80 %", "50 %", "-", "4.00", "-", "-"]
    ]


@pytest.mark.skipif(bool(find_gpus()), reason="there is a GPU")
@pytest.mark.parametrize("command", ["kernels", "gpu"])
def test_without_a_gpu_that_is_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: no GPU: ") and error.count("\n") == 1
