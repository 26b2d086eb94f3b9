"""Memory over time: what a sample is booked to, and one real run on a small bundle."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from bench.__main__ import main
from bench.memory import Result, Sample, Sampler, device_memory
from engines.gpu import find_gpus
from engines.memory import GIB


def test_samples_are_booked_to_the_stage_in_which_they_were_taken() -> None:
    samples = [Sample(0.0, 1 * GIB, None), Sample(1.0, 3 * GIB, None), Sample(2.5, 2 * GIB, None)]
    result = Result(samples, {"base": 1.5, "interp": 3.0}, 3 * GIB)
    base, interp, whole = result.table().rows
    assert base[:5] == ["base", "1.00", "3.00", "2.00", "3.00"]
    assert interp[:5] == ["interp", "0", "2.00", "1.00", "2.00"]
    assert whole[2] == "3.00" and whole[-1] == "-"


def test_the_card_is_counted_above_what_others_use() -> None:
    samples = [Sample(0.0, GIB, 10 * GIB), Sample(1.0, GIB, 14 * GIB), Sample(3.0, GIB, 13 * GIB)]
    result = Result(samples, {"base": 2.0, "interp": 4.0}, GIB)
    assert [row[-2:] for row in result.table().rows] == [["14.0", "4.00"], ["13.0", "3.00"], ["14.0", "4.00"]]
    assert "card" in result.plot().lines
    assert result.plot().marks == [(0.0, "base"), (2.0, "interp")], "each where its stage begins"


def test_thinning_keeps_the_peak() -> None:
    samples = [Sample(float(i), 1000 + (i == 4321), None) for i in range(10_000)]
    thin = Result(samples, {"base": 10_000.0}, 0).thinned()
    assert len(thin) <= 600 and max(s.resident for s in thin) == 1001
    with_card = [Sample(float(i), 1000 + (i == 4321), 50 + (i == 4320)) for i in range(10_000)]
    thin = Result(with_card, {"base": 10_000.0}, 0).thinned()
    assert max(s.resident for s in thin) == 1001 and max(s.device or 0 for s in thin) == 51


def test_the_sampler_sees_memory_that_is_taken() -> None:
    with Sampler(interval=0.005) as sampler:
        before = sampler.samples[0].resident
        block = np.ones(256 * 2**20, np.uint8)  # far above what the allocator may give back meanwhile
        time.sleep(0.1)
        del block
    assert max(s.resident for s in sampler.samples) > before + 128 * 2**20
    assert len(sampler.samples) > 3


@pytest.mark.skipif(bool(find_gpus()), reason="there is a GPU")
def test_without_a_driver_there_is_no_device_memory() -> None:
    assert device_memory() is None


def test_memory_of_a_whole_video(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([2**49, 2**50, 2**50, 2**50])
    monkeypatch.setattr("bench.memory.peak_memory", lambda: next(peaks))
    out = tmp_path / "memory.json"
    options = ["--video", "64x64", "--keyframes", "2", "--steps", "base=1,interp=1,if2=1,sr1=1,sr2=2"]
    assert main(["memory", "--bundle", str(bundle), *options, "--out", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    ends = list(result["stage_ends_s"].values())
    assert list(result["stage_ends_s"]) == ["base", "interp", "if2", "sr1", "sr2"] and ends == sorted(ends)
    assert max(result["stage_peak_resident_bytes"].values()) <= result["peak_resident_bytes"]
    assert result["run"]["interp"]["guidance_scale"] == 4.0
    assert result["peak_resident_bytes"] == 2**50, "above what was taken before: this video's"
    assert str(bundle.resolve()) not in out.read_text(encoding="utf-8")
    assert "![time](memory-time.svg)" in out.with_suffix(".md").read_text(encoding="utf-8")
    assert main(["memory", "--bundle", str(bundle), *options, "--out", str(out)]) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["peak_resident_bytes"] < 2**49, "what ran before had more"
