"""The benchmark: statistics, tables, where a stage's time is booked, and one real run on a small bundle."""

import argparse
import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.__main__ import _settings, main
from bench.exporter import bundle_of, run_export
from bench.latency import Cascade, EngineCall, StageResult, StageRun, _guided, loop_lengths, tables, total_wall
from bench.machine import describe_host, describe_machine, device, git_commit
from bench.report import Table, check_output, facts, number, share, spread, write_json, write_text
from bench.timing import Summary, measure, summarize
from engines.errors import EngineError, OutputError, SettingsError
from engines.gpu import Gpu
from engines.memory import peak_memory
from engines.store import Bundle
from runtime.command import checkpoint_path
from runtime.config import ALL_STEPS, DIFFUSION_STAGES, PRESETS, Settings
from runtime.engine import EnginePool

ROOT = Path(__file__).resolve().parent.parent


def test_warm_up_runs_are_not_measured() -> None:
    calls: list[int] = []

    def call() -> int:
        calls.append(0)
        return len(calls)

    timed = measure(call, warmup=2, repeats=3)
    assert [t.result for t in timed] == [3, 4, 5]
    assert all(t.end >= t.start for t in timed)


def test_summary_is_median_and_outer_deciles() -> None:
    assert summarize([float(n) for n in range(11)]) == Summary(n=11, median=5.0, p10=1.0, p90=9.0)
    assert summarize([2.0]) == Summary(n=1, median=2.0, p10=2.0, p90=2.0)
    assert summarize([]) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123456, "0.0123"), (1.2, "1.20"), (9.999, "10.0"), (123.4, "123"), (98765, "98800"), (0, "0"), (None, "-")],
)
def test_numbers_have_three_significant_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_spread_of_one_time_is_not_shown() -> None:
    assert spread(Summary(1, 2.0, 2.0, 2.0)) == "-"
    assert spread(Summary(3, 2.0, 1.0, 3.0), scale=1e3) == "1000-3000"


def test_share_keeps_small_parts_visible() -> None:
    assert share(0.004, 1) == "0.40 %"
    assert share(0.995, 1) == "100 %"


def test_text_table_lines_up_and_markdown_table_is_markdown() -> None:
    table = Table("Times", ["stage", "s"], [["base", "1.20"], ["interp", "-"]])
    assert table.as_text() == "Times\n\nstage      s\nbase    1.20\ninterp     -"
    assert table.as_markdown() == "**Times**\n\n| stage | s |\n| --- | ---: |\n| base | 1.20 |\n| interp | - |"


def test_facts_say_none_where_nothing_is_known() -> None:
    assert facts({"gpu": None, "cores": {"physical": 2, "logical": 4}, "sizes": ["a", "b"]}) == (
        "gpu    none\ncores  physical 2, logical 4\nsizes  a, b"
    )


# Two loops of two steps: set-up 1 s and 0.5 s, steps of 2.25 s in all (2 s in the engine), 4 s to finish.
TWO_LOOPS = StageRun(
    start=100.0,
    end=114.5,
    calls=[
        EngineCall("context", 100.25, 0.5),
        EngineCall("step", 101.0, 2.0),
        EngineCall("step", 103.375, 2.0),
        EngineCall("step", 106.0, 2.0),
        EngineCall("step", 108.5, 2.0),
        EngineCall("decode", 111.0, 3.0),
    ],
    step_ends=[103.25, 105.5, 108.25, 110.5],
    guided=[True, True],
)


def test_every_second_of_a_stage_is_booked_once() -> None:
    run = TWO_LOOPS
    in_steps = 4 * 2.25
    assert run.set_up() == 1.5
    assert run.finish() == 4.0
    assert run.set_up() + in_steps + run.finish() == run.wall


def test_a_step_is_measured_from_the_end_of_the_one_before() -> None:
    steps = TWO_LOOPS.steps()
    assert len(steps) == 2, "the first step of each loop has no visible start"
    assert all((step.engine, step.outside) == (2.0, 0.25) for step in steps)


def test_a_stage_without_steps_has_no_set_up() -> None:
    run = StageRun(0.0, 2.0, [EngineCall("encode", 0.5, 1.0)], [], guided=[])
    assert (run.set_up(), run.finish(), run.steps()) == (0.0, 0.0, [])


def test_tables_show_stages_their_sum_and_steps() -> None:
    text = StageResult("text", [StageRun(0.0, 2.0, [EngineCall("encode", 0.5, 1.0)], [], [])], 0.5, 2**30)
    base = StageResult("base", [TWO_LOOPS], 1.5, 2 * 2**30)
    stages, steps = tables([text, base])
    assert stages.rows[0] == ["text", "2.00", "-", "-", "-", "50 %", "1", "0.500", "1.00"]
    assert stages.rows[1] == ["base", "14.5", "-", "1.50", "4.00", "79 %", "6", "1.50", "2.00"]
    assert stages.rows[2] == ["these stages", "16.5", "-", "-", "-", "76 %", "7", "2.00", "2.00"]
    assert steps.rows == [["base", "4", "2", "2000", "2000-2000", "250", "250-250", "11 %"]]
    assert total_wall([text, base]) == [16.5]


def test_steps_of_different_work_have_rows_of_their_own() -> None:
    graphs = ("step", "shallow", "step", "shallow")
    calls = [EngineCall(graph, float(i), 0.75 if graph == "step" else 0.25) for i, graph in enumerate(graphs)]
    ends = [1.0, 2.0, 3.0, 4.0]
    run = StageRun(0.0, 4.0, calls, ends, guided=[True, True, False, False])
    _, steps = tables([StageResult("sr1", [run, run], 0.1, 2**30)])
    assert [row[:4] for row in steps.rows] == [
        ["sr1, guided", "1", "0", "-"],  # the first of the loop: its start is not known
        ["sr1, guided, shallow", "1", "2", "250"],
        ["sr1, unguided", "1", "2", "750"],
        ["sr1, unguided, shallow", "1", "2", "250"],
    ]


def test_steps_are_guided_where_the_scale_is_above_one() -> None:
    settings = Settings().with_guidance({"base": 1.0}).with_guided({"interp": (0.0, 0.5)})
    assert [_guided(settings, stage, 2) for stage in ("base", "interp", "sr1")] == [
        [False, False],
        [True, False],
        [True, True],
    ]


def test_a_stage_takes_what_the_one_before_made(bundle: Path) -> None:
    kept = {"t5_text": object(), "keyframes": object()}
    cascade = Cascade(EnginePool(Bundle.open(bundle)), Settings(), 1, dict(kept))
    cascade.prepare("interp")
    assert cascade.arrays == kept
    cascade.prepare("if2")
    assert cascade.arrays.pop("clip").shape == (1, 3, 29, 40, 64) and cascade.arrays == kept


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_compared_with_the_reference_runs_whole_guided_steps(preset: str) -> None:
    asked = argparse.Namespace(preset=preset, steps=None, keyframes=None, video=None)
    own = Settings(strength=0.1).with_guidance({"sr1": 1.0}).to_dict()
    settings, reference = _settings(own, asked, guided=True), Settings()
    for name in DIFFUSION_STAGES:
        stage, wanted = getattr(settings, name), getattr(reference, name)
        assert (stage.guidance_scale, stage.guided, stage.cache_interval) == (wanted.guidance_scale, ALL_STEPS, 1)
    assert settings.strength == reference.strength
    assert _settings(own, asked).sr1.cache_interval == (2 if preset == "fast" else 1)


def test_conditions_name_what_runs_and_no_path(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps(describe_machine(Bundle.open(bundle)))
    assert str(ROOT) not in text
    machine = json.loads(text)
    assert machine["cores"]["logical"] >= 1
    assert list(machine["threads"]) == ["onnxruntime"] and "CPUExecutionProvider" in machine["providers_available"]
    assert {"onnxruntime", "onnxruntime-gpu"} & set(describe_host()["backends"])
    monkeypatch.setattr("runtime.runner_ort.processors", lambda: 1)  # fewer than the machine has
    monkeypatch.setattr("runtime.runner_ort.os.cpu_count", lambda: 2)
    assert describe_machine(Bundle.open(bundle))["threads"] == {"onnxruntime": 1}
    assert peak_memory() > 2**20


@pytest.mark.torch
def test_engines_of_another_backend_have_its_conditions_and_a_file_of_their_own(bundle: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs the export extra")
    opened = Bundle.open(bundle)

    def by(backend: str, *targets: str) -> Bundle:
        entries = opened.manifest.engines.items()
        engines = {name: replace(entry, backend=backend, targets=targets) for name, entry in entries}
        return Bundle(opened.root, replace(opened.manifest, engines=engines))

    inductor = describe_machine(by("inductor", "cpu-x86-64-v3"))
    assert inductor["threads"] == {"inductor": torch.get_num_threads()} and "providers_available" not in inductor
    assert inductor["backends"]["torch"] == torch.__version__
    cuda = {"providers_available": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
    assert device(opened, {"providers_available": ["CPUExecutionProvider"]}) == "cpu"
    assert device(opened, {**cuda, "gpu": None}) == "cpu", "onnxruntime-gpu on a machine without one"
    assert device(opened, {**cuda, "gpu": "NVIDIA H200"}) == "gpu"
    assert device(by("inductor", "cpu-x86-64-v3"), inductor) == "cpu-inductor"
    assert device(by("inductor", "sm90"), {}) == "gpu-inductor"
    assert device(by("tensorrt-rtx", "sm86", "sm89"), {}) == "gpu-tensorrt-rtx"


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    content = {"a": [float("nan"), 1.5], "b": {"c": float("-inf"), "d": "inf"}, "e": (float("inf"), 2)}
    write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    expected = {"a": [None, 1.5], "b": {"c": None, "d": "inf"}, "e": [None, 2]}
    assert json.loads(text, parse_constant=pytest.fail) == expected


def test_results_tell_no_folder_of_this_machine_and_others_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.report.os.path.expanduser", lambda _: "/home/me")
    write_text(tmp_path / "x.md", f"{ROOT}/bundle {ROOT} {ROOT}-2/bundle /home/me/x.mp4 /home/meg/x.mp4")
    assert (tmp_path / "x.md").read_text() == f"./bundle . {ROOT}-2/bundle ~/x.mp4 /home/meg/x.mp4"
    monkeypatch.setattr("bench.report.os.path.expanduser", lambda _: r"C:\Users\me")
    write_json(tmp_path / "x.json", {"plan": r"C:\Users\me\x C:\Users\meg"})
    assert json.loads((tmp_path / "x.json").read_text()) == {"plan": r"~\x C:\Users\meg"}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process begins anew")
def test_the_peak_is_this_processs_and_not_its_parents() -> None:
    block = np.ones(2**29, np.uint8)
    code = "from engines.memory import peak_memory; print(peak_memory())"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(child.stdout) < len(block)


def test_a_card_that_is_hidden_is_none_of_the_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.machine._gpu", lambda: "NVIDIA H200")
    for gpus, told in (([], None), ([Gpu("H200", (9, 0), 2**37, (13, 0))], "NVIDIA H200")):
        monkeypatch.setattr("bench.machine.find_gpus", lambda gpus=gpus: gpus)
        assert describe_host()["gpu"] == told


@pytest.fixture
def no_git_of_its_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks and `git rebase -x` name their repository in the environment, which goes before -C."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_git_of_its_callers")
def test_outside_a_checkout_there_is_no_commit(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None


@pytest.mark.usefixtures("no_git_of_its_callers")
@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_the_checkouts_own_and_results_are_no_change(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me@localhost"]
    for words in (["init", "-q"], ["commit", "-q", "--no-gpg-sign", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    assert git_commit(tmp_path / "bench") is None, "a copy of the code in another's checkout"
    (results / "x.json").touch()
    commit = git_commit(tmp_path)
    assert commit and commit.isalnum()
    (tmp_path / "code.py").touch()
    assert git_commit(tmp_path) == f"{commit} + changes"


def test_benchmarks_do_not_import_torch() -> None:
    modules = ", ".join(f"bench.{name}" for name in ("cost", "latency", "memory", "presets", "quality", "work"))
    code = f"""import sys, bench.__main__, bench.exporter as exporter, {modules}
exporter.run_export = lambda *words, clock: None
exporter.random_checkpoint("golden")
sys.exit("torch" in sys.modules)"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_folder_named_demo_is_not_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("bench.exporter.run_export", lambda *words: asked.append(words[2]))
    monkeypatch.chdir(tmp_path)
    for given in ("demo", "./demo", "demo/"):
        bundle_of(checkpoint_path(given))
    assert asked == ["demo", tmp_path / "demo", tmp_path / "demo"]


def test_without_a_clock_the_exporter_itself_tells_what_failed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EngineError, match=r"^`python -m export list` failed; see above\.$"):
        run_export("list", tmp_path)
    assert "is not a bundle" in capfd.readouterr().err


def test_bench_alone_lists_the_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("latency", "kernels", "memory", "e2e", "gpu", "quality"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "base,sr3"], "--stages sr3; allowed: all, text, base, interp, if2, sr1, sr2."),
        (["--steps", "base"], "steps 'base'; allowed: STAGE=NUMBER, stages base,"),
        (["--video", "big"], "size 'big'; allowed: WIDTHxHEIGHT, e.g. 576x320."),
        (["--repeats", "0"], "--repeats 0; allowed: 1 or more."),
        (["--out", "."], ". is a folder."),
        (["--seed", "-1"], "seed is -1; allowed: 0 to"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    bundle: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["latency", "--bundle", str(bundle), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_a_place_that_takes_no_result_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_output(tmp_path / "new" / "x.json")
    assert not list((tmp_path / "new").iterdir())
    with pytest.raises(OutputError, match=r"--out .*x\.md; allowed: a \.json file"):
        check_output(tmp_path / "x.md")

    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("bench.report.tempfile.TemporaryFile", refuse)
    with pytest.raises(OutputError, match=r"x\.json: cannot be written \(Permission denied\)\. Choose another --out"):
        check_output(tmp_path / "x.json")


def test_a_missing_bundle_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["latency", "--bundle", str(tmp_path)]) == 1
    assert "is not a bundle" in capsys.readouterr().err


def test_too_many_steps_are_refused_before_anything_runs(bundle: Path) -> None:
    with pytest.raises(SettingsError, match="base: num_inference_steps"):
        loop_lengths(Bundle.open(bundle), Settings().with_steps({"base": 10**6}), ["text", "base"])


def test_latency_of_the_whole_cascade(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "latency.json"
    steps = "base=2,interp=1,if2=2,sr1=1,sr2=2"  # of sr2's, 80 % are run: one
    options = ["--video", "128x64", "--keyframes", "2", "--steps", steps, "--warmup", "0", "--repeats", "1"]
    assert main(["latency", "--bundle", str(bundle), *options, "--out", str(out)]) == 0

    text = out.read_text(encoding="utf-8")
    assert str(bundle.resolve()) not in text
    result = json.loads(text)
    assert result["run"]["frames"] == 5
    assert result["run"]["sizes"]["sr1"] == "64x32"
    stages = result["stages"]
    assert {name: stage["steps"] for name, stage in stages.items()} == (
        {"text": 0, "base": 2, "interp": 1, "if2": 2, "sr1": 1, "sr2": 1}
    )
    assert stages["base"]["engine_calls"] == {"context": 1, "step": 2}
    assert stages["sr2"]["engine_calls"] == {"encode": 5, "context": 1, "step": 1, "decode": 5}
    for stage in stages.values():
        assert 0 < stage["engine_s"][0] < stage["wall_s"][0]
        assert stage["set_up_s"][0] + stage["finish_s"][0] < stage["wall_s"][0]
    assert stages["if2"]["steps_by_kind"]["guided"]["outside_s"]["n"] == 1
    single = stages["sr1"]["steps_by_kind"]["guided"]
    assert (single["steps"], single["outside_s"]) == (1, None), "a loop of one step shows no step from end to end"
    assert result["total_wall_s"][0] == pytest.approx(sum(stage["wall_s"][0] for stage in stages.values()), abs=1e-6)
    printed = capsys.readouterr().out
    assert "end to end" in printed
    assert "outside ms" in printed
    page = out.with_suffix(".md").read_text(encoding="utf-8")
    assert "| end to end |" in page and "![stages](latency-stages.svg)" in page
    assert (out.parent / "latency-stages.svg").is_file()


def test_a_stage_alone_gets_random_input(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "latency.json"
    options = ["--video", "128x64", "--keyframes", "2", "--warmup", "1", "--repeats", "2", "--steps", "if2=2"]
    assert main(["latency", "--bundle", str(bundle), "--stages", "if2", *options, "--out", str(out)]) == 0
    ((stage, result),) = json.loads(out.read_text(encoding="utf-8"))["stages"].items()
    assert stage == "if2" and len(result["wall_s"]) == 2
    assert result["engine_calls"] == {"context": 1, "step": 2}, "of one run"
