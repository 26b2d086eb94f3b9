"""`python -m bench gpu` where there is no GPU: its parts on the CPU, and what becomes of those that fail."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from bench import gpu
from bench.__main__ import main
from bench.exporter import run_export
from bench.report import Report, Table
from bench.work import Setup
from engines.errors import EngineError
from engines.gpu import Gpu, find_gpus
from engines.store import Bundle
from runtime.config import Settings
from runtime.runner import LoopStart
from runtime.sampler import denoise


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report("gpu", tmp_path / "gpu.json", {"gpu": {"name": "none"}})


def saved(report: Report) -> dict[str, Any]:
    return json.loads(report.out.read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", [EngineError, RuntimeError, OSError])  # as libraries have them
def test_a_part_that_fails_does_not_stop_the_next(report: Report, kind: type[Exception]) -> None:
    def fails(clock: gpu.Clock, save: Any) -> gpu.Content:
        save(({"half": 1}, [], {}))
        raise kind("no nvcc here")

    def works(clock: gpu.Clock, save: Any) -> gpu.Content:
        assert saved(report)["first"] == {"half": 1, "state": "not done: no nvcc here"}, "written before the next part"
        assert saved(report)["second"] == {"state": "begun"}
        return {"whole": 2}, [Table("Numbers", ["a", "b"], [["x", "1"]])], {}

    parts = [gpu.Part("first", fails), gpu.Part("second", works)]
    assert gpu.run_parts(parts, gpu.Clock(1), report) == ["first not done: no nvcc here"]
    result = saved(report)
    assert result["first"]["half"] == 1 and result["second"]["whole"] == 2
    assert result["second"]["state"].startswith("done in ")
    page = report.out.with_suffix(".md").read_text(encoding="utf-8")
    assert "| first | not done: no nvcc here |" in page and "**Numbers**" in page


def test_a_wrong_result_is_no_success(report: Report) -> None:
    checks = [{"what": what, "passed": what == "base"} for what in ("base", "sr1")]
    (bad,) = gpu.run_parts([gpu.Part("engines", lambda *_: ({"checks": checks}, [], {}))], gpu.Clock(1), report)
    assert bad.startswith("engines done in ") and bad.endswith("; WRONG: sr1")
    assert gpu._wrong({"failed": ["inductor"], "contenders": {"a": {}, "b": {"failures": {"sr1": "no room"}}}}) == [
        "inductor",
        "b",
    ]


def test_a_card_that_is_lost_ends_the_run(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_empty_card", lambda: "the card is lost")
    parts = [gpu.Part("kernels", lambda *_: ({}, [], {})), gpu.Part("engines", lambda *_: pytest.fail("begun"))]
    kernels, engines = gpu.run_parts(parts, gpu.Clock(1), report)
    assert kernels.startswith("kernels done in ") and kernels.endswith("; WRONG: the card is lost")
    assert engines == "engines not done: the card is lost"


def test_what_an_export_says_is_passed_on_and_its_error_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EngineError, match=r"^--jobs 0; allowed: 1 or more\.$"):
        run_export("build", "--checkpoint", "demo", "--jobs", "0", clock=gpu.Clock(1))
    assert "error: --jobs 0" in capsys.readouterr().err
    with pytest.raises(gpu.TimeIsUp):
        run_export("random-checkpoint", "--out", tmp_path / "late", clock=gpu.Clock(0.002))
    assert not (tmp_path / "late").exists()


def test_what_does_not_fit_the_time_is_not_begun(report: Report) -> None:
    gpu.run_parts([gpu.Part("late", lambda clock, save: pytest.fail("begun"))], gpu.Clock(0), report)
    assert "the time was up" in saved(report)["late"]["state"]


def test_a_bundle_agrees_with_itself_on_the_cpu(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    checks = gpu.compare_bundles(opened, opened, tolerance=1e-6)
    assert len(checks) == 4 + 3 * 5
    assert {"onnxruntime base/step", "onnxruntime vae_decoder/decode"} <= {check.what for check in checks}
    if not find_gpus():
        assert all(check.passed and check.difference == 0 for check in checks)


def test_every_graph_of_a_network_sees_the_context_that_it_made(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    run = gpu._on_backend

    def recording(engine: Any, graph: str, feeds: Any) -> Any:
        outputs, seconds = run(engine, graph, feeds)
        seen[graph] = outputs if graph == "context" else dict(feeds)
        return outputs, seconds

    monkeypatch.setattr(gpu, "_on_backend", recording)
    whole = Bundle.open(bundle)
    opened = Bundle(whole.root, replace(whole.manifest, engines={"base": whole.engine("base")}))
    gpu.compare_bundles(opened, opened, tolerance=1e-3)
    assert sorted(seen) == ["context", "shallow", "step"] and seen["context"]
    for graph in ("shallow", "step"):
        for name, array in seen["context"].items():
            np.testing.assert_allclose(seen[graph][name], array, rtol=1e-3, atol=1e-4)


def test_a_wrong_engine_is_told(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu._on_backend

    def wrong(*arguments: Any) -> Any:
        outputs, seconds = right(*arguments)
        return {name: array + np.nan for name, array in outputs.items()}, seconds

    monkeypatch.setattr(gpu, "_on_backend", wrong)
    whole = Bundle.open(bundle)
    opened = Bundle(whole.root, replace(whole.manifest, engines={"clip": whole.engine("clip")}))
    checks = gpu.compare_bundles(opened, opened, tolerance=1e-6)
    assert not any(check.passed for check in checks)
    _, (table,), _ = gpu._engines_content(checks, {"tensorrt": "no card"})
    assert table.rows[0][3] == "NO" and table.rows[-1][3] == "not run: no card"
    right, none = np.ones(3), np.full(3, np.nan)
    for given in ({"a": right, "b": none}, {"a": none, "b": right}):
        assert np.isnan(gpu._difference(given, {"a": right, "b": right})), "one output of two"


def test_loops_are_compared_where_a_backend_has_them(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle.open(bundle)
    assert gpu.compare_loops(opened, "base", 1e-6, steps=2) is None, "ONNX Runtime has none"
    plain = gpu.prompted

    class Looping:
        """Has a loop of its own where `factor` is a number: what the sampler computes, that many times as much."""

        factor: float | None = None
        shallow: ClassVar[list[bool]] = []

        def __init__(self, *arguments: Any, **keywords: Any):
            self.unet = plain(*arguments, **keywords)

        def start_loop(self, start: LoopStart) -> "Looping | None":
            if self.factor is None:
                return None
            self.shallow.append(not start.whole.all())
            run = partial(denoise, x=start.x, schedule=start.schedule, cache_interval=1 if start.whole.all() else 2)
            result = run(lambda *a, **k: self.unet(*a, **k), guidance_scale=float(start.guidance[0]))
            self.result = result * self.factor
            return self

        def step(self, noise: Any) -> None:
            pass

        def sample(self) -> Any:
            return self.result

        def __call__(self, *arguments: Any, **keywords: Any) -> Any:
            return self.unet(*arguments, **keywords)

    monkeypatch.setattr(gpu, "prompted", Looping)
    assert gpu.compare_loops(opened, "base", 1e-6, steps=2) is None, "asked, it has none"
    monkeypatch.setattr(Looping, "factor", 1.0)
    same = gpu.compare_loops(opened, "base", 1e-6, steps=2)
    assert same is not None and same.passed and same.what == "onnxruntime base: loop of 2 steps"
    monkeypatch.setattr(Looping, "factor", 1.5)
    off = gpu.compare_loops(opened, "base", 1e-6, steps=2)
    assert off is not None and not off.passed
    assert all(Looping.shallow), "whole steps and shallow ones"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes 0; allowed: above 0."),
        (["--minutes", "nan"], "--minutes nan; allowed: above 0."),
        (["--seed", "-1"], "seed is -1; allowed: 0 to 18446744073709551615."),
        (
            ["--parts", "e2e", "--keyframes", "4"],
            "--keyframes 4: sr1's last window would be shorter than the others, which is not counted; allowed: 2, 8, "
            "15, 22 and so on, or --stages without sr1.",
        ),
        (["--parts", "engines,fans"], "--parts fans; allowed: all, rates, kernels, engines, e2e, memory."),
    ],
)
def test_wrong_requests_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr("bench.kernels.torch_with_gpu", lambda: None)
    monkeypatch.setattr("bench.kernels.describe_gpu", lambda torch: {})
    assert main(["gpu", *arguments]) == 1
    assert capsys.readouterr().err == f"error: {message}\n"


def a_plan(size: str, bundles: list[Bundle]) -> gpu.Plan:
    fast = Settings(size=(64, 64), keyframes=2).with_steps({"base": 2, "interp": 1, "if2": 1, "sr1": 1, "sr2": 2})
    return gpu.Plan(["e2e", "memory"], Setup(size, None, bundles, fast, ["base"], [], 1, 3))


def test_the_reference_is_built_off_the_card_and_inductor_without_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    monkeypatch.setattr(gpu, "run_export", lambda *words, **more: asked.update({words[-1].name: (words, more)}))
    monkeypatch.setattr(gpu.Bundle, "open", lambda folder: folder)
    clock = gpu.Clock(1)
    for backend, precision in (("onnxruntime", "fp32"), ("onnxruntime", "fp16"), ("inductor", "fp16")):
        gpu._golden_bundle(clock, Path("random"), backend, precision)
    assert asked["gpu-onnxruntime-fp32"][1] == {"clock": clock, "CUDA_VISIBLE_DEVICES": "-1"}
    for name in ("gpu-onnxruntime-fp16", "gpu-inductor-fp16"):
        words, more = asked[name]
        assert more == {"clock": clock} and ("--no-autotune" in words) == ("inductor" in name)


def test_the_reference_runs_on_the_cpu_whatever_else_there_is(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.runner_ort import ort

    asked: list[Any] = []
    session = ort.InferenceSession
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(
        ort, "InferenceSession", lambda *words, **more: (asked.append(more["providers"]), session(*words, **more))[1]
    )
    opened = Bundle.open(bundle)
    entry = opened.engine("clip")
    gpu._on_cpu(opened, entry, "encode", gpu._inputs(entry, "encode"))
    assert asked == [["CPUExecutionProvider"]]


def test_only_backends_that_may_use_a_card_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(gpu.tensorrt, "installed_version", lambda name: "1" if name == "torch" else None)
    for provider, capability, driver, found in (
        ("CPUExecutionProvider", (8, 9), (13, 0), []),
        ("CUDAExecutionProvider", (8, 9), (13, 0), ["onnxruntime"]),
        ("CUDAExecutionProvider", (10, 0), (13, 0), []),
        ("CUDAExecutionProvider", (8, 9), (12, 8), []),
    ):
        card = Gpu("card", capability, 2**37, driver)
        monkeypatch.setattr(gpu, "find_gpus", lambda card=card: [card])
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda provider=provider: [provider])
        assert gpu.backends() == [*found, "inductor"]


@pytest.mark.parametrize(("target", "found"), [("sm89", ["tensorrt-rtx"]), ("sm90", [])])
def test_plans_are_built_for_a_card_that_they_are_made_for(
    monkeypatch: pytest.MonkeyPatch, target: str, found: list[str]
) -> None:
    card = Gpu("card", (int(target[2]), int(target[3])), 2**37, (13, 0))
    monkeypatch.setattr(gpu, "find_gpus", lambda: [card])
    monkeypatch.setattr(gpu.tensorrt, "installed_version", lambda name: "1" if name == "tensorrt-rtx" else None)
    assert [backend for backend in gpu.backends() if backend != "onnxruntime"] == found
    monkeypatch.setattr(gpu.tensorrt, "installed_version", lambda name: "1" if "tensorrt" in name else None)
    assert len([backend for backend in gpu.backends() if "tensorrt" in backend]) == 1, "one to a process"


@pytest.mark.parametrize(("error", "goes_on"), [(EngineError("no kernel"), True), (gpu.TimeIsUp("late"), False)])
def test_a_backend_that_fails_is_a_row_and_the_end_of_the_time_an_end(
    monkeypatch: pytest.MonkeyPatch, error: Exception, goes_on: bool
) -> None:
    def build(clock: gpu.Clock, checkpoint: Path, backend: str, precision: str) -> Any:
        if backend == "inductor":
            raise error
        return backend

    checked = gpu.Check("tensorrt-rtx", 0.0, 1.0, None, None)
    monkeypatch.setattr(gpu, "backends", lambda: ["inductor", "tensorrt-rtx"])
    monkeypatch.setattr(gpu, "random_checkpoint", lambda size, clock: Path("random"))
    monkeypatch.setattr(gpu, "_golden_bundle", build)
    monkeypatch.setattr(gpu, "compare_bundles", lambda *_: [checked])
    monkeypatch.setattr(gpu, "compare_loops", lambda *_: None)
    built: list[Any] = []
    if not goes_on:
        with pytest.raises(gpu.TimeIsUp):
            gpu.engines(gpu.Clock(1), lambda content: None, built)
        return
    numbers, (table,), _ = gpu.engines(gpu.Clock(1), lambda content: None, built)
    assert built == ["tensorrt-rtx"] and numbers["failed"] == ["inductor"]
    assert [row[3] for row in table.rows] == [
        "yes",
        f"not run: {gpu._NOT_HERE}",
        f"not run: {gpu._NOT_HERE}",
        "not run: no kernel",
    ]


def test_memory_needs_a_bundle() -> None:
    _, part = gpu.make_parts(a_plan("published", []))
    with pytest.raises(EngineError, match="give --bundle"):
        part.run(gpu.Clock(1), lambda content: None)


def test_the_command_writes_what_its_parts_measured(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.kernels.torch_with_gpu", lambda: None)
    monkeypatch.setattr("bench.kernels.describe_gpu", lambda torch: {"name": "NVIDIA Test"})
    monkeypatch.setattr("bench.__main__.find_gpus", list)
    out = tmp_path / "gpu.json"
    options = ["--video", "64x64", "--keyframes", "2", "--steps", "base=1,interp=1,if2=1,sr1=1,sr2=2"]
    assert main(["gpu", "--parts", "memory", "--bundle", str(bundle), *options, "--out", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["gpu"] == {"name": "NVIDIA Test"} and result["run"]["parts"] == ["memory"]
    assert result["memory"]["state"].startswith("done in ") and result["memory"]["samples"]
    assert result["memory"]["bundle"]["id"] == Bundle.open(bundle).id
    assert (tmp_path / "gpu-memory-time.svg").is_file()
    assert "| memory | done in " in out.with_suffix(".md").read_text(encoding="utf-8")
    assert "peak GiB" in capsys.readouterr().out


def test_videos_of_golden_size_are_made_by_the_engines_that_were_checked(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "backends", lambda: ["inductor", "onnxruntime"])
    monkeypatch.setattr(
        gpu, "_golden_folder", lambda backend, _: bundle if backend == "onnxruntime" else tmp_path / "no"
    )
    assert [opened.root for opened in a_plan("golden", []).videos_by()] == [bundle]
    assert a_plan("published", []).videos_by() == []
    assert capsys.readouterr().err == ""
    # Of an interrupted build there is a part of the engines: it is left out, which is said.
    (tmp_path / "no").mkdir()
    whole = Bundle.open(bundle)
    part = Bundle(tmp_path / "no", replace(whole.manifest, engines={"base": whole.engine("base")}))
    with monkeypatch.context() as patch:
        patch.setattr(gpu.Bundle, "open", lambda folder: whole if folder == bundle else part)
        assert a_plan("golden", []).videos_by() == [whole]
    missing = ", ".join(sorted(whole.manifest.engines.keys() - {"base"}))
    assert capsys.readouterr().err == f"left out: {tmp_path / 'no'}: without {missing}; its build did not end.\n"
    # Where the engines' part runs, nothing of an earlier run is taken for this one's.
    plan = replace(a_plan("golden", []), parts=["engines", "e2e"])
    assert plan.videos_by() == []
    plan.built.append(Bundle.open(bundle))
    assert [opened.root for opened in plan.videos_by()] == [bundle]


def test_the_end_of_the_time_ends_the_kernels_after_a_row(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(torch: Any, architectures: str, warmup: int, repeats: int, save: Any) -> gpu.Content:
        clock._end = 0
        save(({"kernels": [1]}, [], {}))
        pytest.fail("goes on")

    clock = gpu.Clock(1)
    monkeypatch.setattr("bench.kernels.torch_with_gpu", lambda: None)
    monkeypatch.setattr("bench.kernels.run_kernels", run)
    gpu.run_parts([gpu.Part("kernels", gpu.kernels)], clock, report)
    result = saved(report)["kernels"]
    assert "the time was up" in result["state"] and result["kernels"] == [1]


@pytest.mark.torch
def test_the_end_of_the_time_keeps_what_was_measured(bundle: Path, report: Report) -> None:
    pytest.importorskip("diffusers", reason="needs the bench extra")

    class Late(gpu.Clock):
        """The time ends while the first video is made."""

        def check(self) -> None:
            if report.out.is_file():
                super().check()

    parts = gpu.make_parts(a_plan("golden", [Bundle.open(bundle)]))[:1]
    gpu.run_parts(parts, Late(0), report)
    result = saved(report)["e2e"]
    assert "the time was up" in result["state"]
    assert result["contenders"]["onnxruntime"]["stages"]["base"]["seconds"] > 0
