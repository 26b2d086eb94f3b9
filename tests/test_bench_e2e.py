"""Whole videos against the reference: how seconds and rates are reckoned, and one real comparison of small networks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("diffusers", reason="needs the bench extra")

from bench import gpu
from bench.__main__ import main
from bench.baseline import Measured, Place, Source
from bench.e2e import (
    Contender,
    Result,
    StageTime,
    Work,
    _stage_time,
    difference_of,
    from_latency,
    loops,
    run_e2e,
    sources,
)
from bench.latency import EngineCall, StageResult, StageRun
from bench.timing import Summary
from bench.work import Calls, Setup, matrix_rate
from engines.errors import EngineError, SettingsError
from engines.gpu import Gpu
from engines.store import Bundle
from export.random_checkpoint import random_checkpoint
from runtime.config import Settings

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the bundle's engines are, whatever card is here."""
    monkeypatch.setattr("bench.__main__.find_gpus", list)
    monkeypatch.setattr(Place, "here", classmethod(lambda cls: cls("cpu", "float32")))


INTERP = {"interp": Work(Calls("interp", 14, (2, 7, 5, 8, 8)), 10**12)}  # two gaps, seven steps each in the reference


def interp_run(steps: int) -> StageResult:
    """Both gaps at once, 2 s a step; 1 s before the first, 0.5 s after the last."""
    calls = [EngineCall("step", 1.0 + 2 * i, 1.5) for i in range(steps)]
    ends = [3.0 + 2 * i for i in range(steps)]
    return StageResult("interp", [StageRun(0.0, ends[-1] + 0.5, calls, ends, [True] * steps)], 0.1, 2**30)


def test_a_stage_that_ran_in_full_is_what_the_clock_said() -> None:
    time = from_latency(interp_run(7), 7, INTERP)
    assert (time.seconds, time.full) == (15.5, True)
    assert time.call == 1.0, "a step takes two of the reference's calls"


def test_fewer_steps_are_reckoned_up_to_the_reference() -> None:
    time = from_latency(interp_run(3), 7, INTERP)
    assert time.full is False
    assert time.seconds == pytest.approx(1 + 7 * 2 + 0.5)
    calls = [EngineCall("step", start, 1.5) for start in (1.0, 11.0, 13.0)]
    slow_start = StageResult("interp", [StageRun(0.0, 15.5, calls, [11.0, 13.0, 15.0], [True] * 3)], 0.1, 2**30)
    assert from_latency(slow_start, 7, INTERP).seconds == pytest.approx(1 + 7 * 2 + 0.5), "as baselines: the median"
    # Two windows of two steps: 1 s before each, 0.5 s after the last.
    calls = [EngineCall("step", start, 1.5) for start in (1.0, 3.0, 6.0, 8.0)]
    windows = StageResult("interp", [StageRun(0.0, 10.5, calls, [3.0, 5.0, 8.0, 10.0], [True] * 2)], 0.1, 2**30)
    assert from_latency(windows, 7, INTERP).seconds == pytest.approx(2 + 2 * 7 * 2 + 0.5), "every window's steps"
    single = from_latency(interp_run(1), 7, INTERP)
    assert (single.seconds, single.call, single.spread) == (pytest.approx(15.5), 1.0, None)


def test_gaps_that_do_not_part_evenly_are_reckoned_loop_by_loop() -> None:
    """Batches of 2, 2, 2 and 1: of all their steps together the median is that of a large one."""
    ends, calls, now = [], [], 0.0
    for seconds in (2.0, 2.0, 2.0, 1.0):
        for _ in range(3):
            calls.append(EngineCall("step", now, seconds))
            now += seconds
            ends.append(now)
    run = StageResult("interp", [StageRun(0.0, now, calls, ends, [True] * 3)], 0.1, 2**30)
    work = {"interp": Work(Calls("interp", 49, (2, 7, 5, 8, 8)), 10**12)}
    time = from_latency(run, 7, work)
    assert time.seconds == pytest.approx(7 * (2 + 2 + 2 + 1)) and time.call == pytest.approx(1.0)
    assert time.spread == pytest.approx((1.0, 1.0)), "nothing varied but what is in a loop"


def test_threads_are_no_more_than_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr("bench.baseline.processors", lambda: 1)
    try:
        Place("cpu", "float32").limit_threads()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_packages_for_the_cpu_are_not_compared_with_a_card(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = Bundle.open(bundle)
    engines = {name: replace(entry, backend="inductor") for name, entry in opened.manifest.engines.items()}
    (tmp_path / "manifest.json").write_text(replace(opened.manifest, engines=engines).to_json())
    monkeypatch.setattr("bench.__main__.find_gpus", lambda: [Gpu("H200", (9, 0), 2**37, (13, 0))])
    monkeypatch.setattr("bench.kernels.torch_with_gpu", lambda: None)
    monkeypatch.setattr("bench.kernels.describe_gpu", lambda torch: {})
    assert main(["gpu", "--bundle", str(tmp_path), "--parts", "memory"]) == 1
    assert "these engines of inductor are for the CPU" in capsys.readouterr().err
    engines = {name: replace(entry, targets=("sm90",)) for name, entry in engines.items()}
    (tmp_path / "manifest.json").write_text(replace(opened.manifest, engines=engines).to_json())
    monkeypatch.setattr("runtime.runner_inductor.why_idle", lambda gpu: f"torch leaves {gpu.name} idle")
    assert main(["e2e", "--bundle", str(tmp_path)]) == 1
    assert "torch leaves H200 idle, the engines would run on it" in capsys.readouterr().err


def test_ratios_and_rates_are_of_useful_work() -> None:
    ours = Contender("ours", {"interp": StageTime(14.0, True, 1.0, (0.9, 1.1))})
    eager = Contender("eager", {"interp": StageTime(56.0, False, 4.0, (3.9, 4.1))})
    no_memory = Contender("compile", {"interp": None})
    result = Result(["interp"], INTERP, [ours, eager, no_memory], 2e12, {"interp": 1e-6}, "5 frames")
    video, calls = result.tables()
    # 14 TFLOP at 2 TFLOP/s: a floor of 7 s.
    row = ["interp", "14.0", "7.00", "14.0", "56.0", "-", "4.00", "-", "2.00"]
    assert video.rows == [row, ["sum", *row[1:]]]
    assert calls.rows[0][3:11] == ["1000", "900-1100", "1.00", "50 %", "4000", "3900-4100", "0.250", "12 %"]
    assert calls.rows[0][-1] == "1.0e-06"
    assert "ours ran in full" in video.title and "eager" not in video.title
    assert json.loads(json.dumps(result.to_json()))["contenders"]["compile"]["total_s"] is None
    assert "not measured" in result.plots()["stages"].svg()


def test_a_stage_is_not_told_by_a_part_of_its_networks() -> None:
    work = {name: Work(Calls(name, 2, (1, 4, 8, 8)), 1) for name in ("sr2", "vae_decoder")}
    measured = {name: Measured(Summary(3, 5.0, 4.0, 6.0), 9.0) for name in work}
    assert _stage_time("sr2", measured, work) == StageTime(20.0, False, 5.0, (4.0, 6.0))
    measured["vae_decoder"] = Measured(None, None, "OutOfMemoryError")
    assert _stage_time("sr2", measured, work) is None


def test_only_networks_of_the_same_weights_are_compared(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "other.safetensors").touch()
    other = Source("base", {}, (tmp_path / "other.safetensors",))
    assert difference_of(Bundle.open(bundle), other, None, Place("cpu", "float32")) is None


def test_a_bundle_that_fails_does_not_stop_the_next(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(opened: Bundle, setup: Setup, lengths: Any, work: Any, contender: Contender, on_stage: Any) -> None:
        if contender.name == "onnxruntime":
            raise EngineError("too small a card")
        contender.stages["base"] = StageTime(1.0, True, 1.0)

    monkeypatch.setattr("bench.e2e.run_bundle", run)
    monkeypatch.setattr("bench.e2e.matrix_rate", lambda *_: 1e12)
    setup = Setup("golden", None, [Bundle.open(bundle)] * 2, Settings(), ["base"], [], 1, 1)
    told: list[str] = []
    result = run_e2e(setup, lambda what, _: told.append(what)).to_json()["contenders"]
    assert told == ["onnxruntime: too small a card"]
    assert result["onnxruntime"]["failures"] == {"engines": "too small a card"}
    assert result["onnxruntime 2"]["total_s"] == 1.0


def test_matrix_rate_is_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.work.MATRIX_SIZE", {"cpu": 64})
    assert 1e6 < matrix_rate("cpu", "float32", repeats=3) < 1e14


def test_a_stage_alone_needs_no_other_networks(bundle: Path, tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "base", stages=["base"])
    found = sources("golden", tmp_path / "base", "fp16", ["base"])
    assert found["base"].files and not found["sr2"].files and found["sr2"].config
    whole = Bundle.open(bundle)
    part = Bundle(whole.root, replace(whole.manifest, engines={"base": whole.engine("base")}))
    lengths = loops(Setup("golden", None, [part], Settings(), ["base"], [], 1, 1))
    assert lengths["base"] == 75 and lengths["sr2"] == 40


def test_a_bundle_against_eager_torch(bundle: Path, golden: Path, tmp_path: Path) -> None:
    out = tmp_path / "e2e.json"
    options = ["--video", "64x64", "--keyframes", "2", "--steps", "base=2,if2=2", "--stages", "text,base,if2"]
    options += ["--baseline", "eager", "--repeats", "3", "--checkpoint", str(golden / "models")]
    assert main(["e2e", "--bundle", str(bundle), *options, "--out", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert list(result["contenders"]) == ["onnxruntime", "eager"]
    assert result["work"]["base"]["count"] == 75 and result["work"]["base"]["flop"] > 10**6
    ours, eager = (c["stages"] for c in result["contenders"].values())
    assert not ours["base"]["full"] and ours["text"]["full"] and not eager["base"]["full"]
    assert ours["base"]["seconds"] > 0 and eager["base"]["seconds"] == pytest.approx(75 * eager["base"]["call"])
    assert {"base", "if2"} == set(result["largest_difference"])
    assert all(difference < 1e-4 for difference in result["largest_difference"].values())
    assert {"onnxruntime", "torch"} <= set(result["machine"]["backends"])
    assert "eager / onnxruntime" in out.with_suffix(".md").read_text(encoding="utf-8")
    assert (tmp_path / "e2e-stages.svg").is_file()


def test_what_a_bundle_took_is_told_after_every_stage(bundle: Path) -> None:
    settings = Settings(size=(64, 64), keyframes=2).with_steps({"base": 2, "if2": 2})
    told: dict[str, list[str]] = {}
    setup = Setup("golden", None, [Bundle.open(bundle)] * 2, settings, ["base", "if2"], [], 1, 1)
    run_e2e(setup, lambda what, result: told.update({what: [*result.to_json()["contenders"]]}))
    first, both = ["onnxruntime"], ["onnxruntime", "onnxruntime 2"]
    assert told == {
        "onnxruntime: base": first,
        "onnxruntime: if2": first,
        "onnxruntime 2: base": both,
        "onnxruntime 2: if2": both,
    }


def test_without_bundle_and_baseline_there_is_nothing_to_measure() -> None:
    with pytest.raises(SettingsError, match="nothing to measure: give a --bundle, or a --baseline"):
        run_e2e(Setup("golden", None, [], Settings(), ["base"], [], 1, 1), lambda *_: None)


def test_nothing_is_built_for_onnx_runtime_where_it_would_leave_the_card_idle(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cards = [Gpu("H200", (9, 0), 141 * 2**30, (13, 0))]
    for module in ("engines.tensorrt", "bench.__main__", "runtime.runner_ort"):
        monkeypatch.setattr(f"{module}.find_gpus", lambda: cards)
    monkeypatch.setattr(Place, "here", classmethod(lambda cls: cls("cuda", "float16")))
    monkeypatch.setattr("engines.tensorrt.installed_version", lambda name: None)
    monkeypatch.setattr("runtime.runner_ort.tries_cuda", lambda: False)
    monkeypatch.setattr("bench.exporter.random_bundle", lambda size: pytest.fail("built"))
    assert main(["e2e"]) == 1
    assert "ONNX Runtime here leaves the GPU idle" in capsys.readouterr().err
    assert main(["e2e", "--keyframes", "4"]) == 1
    assert "--keyframes 4: sr1's last window" in capsys.readouterr().err
    monkeypatch.setattr("runtime.runner_ort.tries_cuda", lambda: True)
    for cards[0] in (Gpu("B200", (10, 0), 2**37, (13, 0)), Gpu("H200", (9, 0), 2**37, (12, 8))):
        assert main(["e2e"]) == 1
        assert "does not run on the GPU: " in capsys.readouterr().err
    cards[0] = Gpu("H200", (9, 0), 2**37, (13, 0))

    def build(size: str) -> Path:
        raise EngineError("built")

    monkeypatch.setattr("bench.exporter.random_bundle", build)
    assert main(["e2e", "--baseline", "none"]) == 1
    assert capsys.readouterr().err == "error: built\n"
    cards.clear()
    monkeypatch.setattr(Place, "here", classmethod(lambda cls: cls("cpu", "float32")))
    assert main(["e2e"]) == 1
    assert capsys.readouterr().err == "error: built\n"


def test_baselines_are_asked_to_look_at_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*arguments: Any) -> dict[str, Measured]:
        asked.append(arguments[-1]())
        return {"eager": Measured(None, None, "the time was up")}

    asked: list[bool] = []
    monkeypatch.setattr("bench.baseline.measure_network", measure)
    setup = Setup("golden", None, [], Settings(size=(64, 64), keyframes=2), ["base"], ["eager"], 1, 1)
    run_e2e(setup, lambda *_: None, lambda: False)
    with pytest.raises(gpu.TimeIsUp):
        gpu.e2e(gpu.Plan(["e2e"], setup), gpu.Clock(0), lambda content: None)
    assert asked == [False, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--baseline", "jax"], "--baseline jax; allowed: all, none, eager, compile, xformers."),
        (["--baseline", "eager,xformers"], "--baseline xformers: not installed. `pip install xformers`"),
        (
            ["--keyframes", "4"],
            "--keyframes 4: sr1's last window would be shorter than the others, which is not counted",
        ),
        (["--stages", "base", "--size", "published"], "{bundle}: base reads text of 64 channels, the networks to"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("bench.work.is_installed", lambda baseline: baseline != "xformers")
    out = ["--out", str(tmp_path / "e2e.json")]
    assert main(["e2e", "--bundle", str(bundle), *arguments, *out]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message.format(bundle=bundle)}") and error.count("\n") == 1
