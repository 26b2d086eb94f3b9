"""The benchmark: statistics, tables, where a stage's time is booked, and one real run on a small bundle."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.latency import EngineCall, StageResult, StageRun, loop_lengths, tables, total_wall
from bench.machine import describe_machine, git_commit
from bench.report import Table, facts, number, share, spread
from bench.timing import Summary, measure, summarize
from engines.errors import SettingsError
from engines.memory import peak_memory
from engines.store import Bundle
from runtime.config import Settings

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
    loop=2,
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
    run = StageRun(0.0, 2.0, [EngineCall("encode", 0.5, 1.0)], [], loop=0)
    assert (run.set_up(), run.finish(), run.steps()) == (0.0, 0.0, [])


def test_tables_show_stages_their_sum_and_steps() -> None:
    text = StageResult("text", [StageRun(0.0, 2.0, [EngineCall("encode", 0.5, 1.0)], [], 0)], 0.5, 2**30)
    base = StageResult("base", [TWO_LOOPS], 1.5, 2 * 2**30)
    stages, steps = tables([text, base])
    assert stages.rows[0] == ["text", "2.00", "-", "-", "-", "50 %", "1", "0.500", "1.00"]
    assert stages.rows[1] == ["base", "14.5", "-", "1.50", "4.00", "79 %", "6", "1.50", "2.00"]
    assert stages.rows[2] == ["these stages", "16.5", "-", "-", "-", "76 %", "7", "2.00", "2.00"]
    assert steps.rows == [["base", "4", "2", "2000", "2000-2000", "250", "250-250", "11 %"]]
    assert total_wall([text, base]) == [16.5]


def test_conditions_name_no_path() -> None:
    text = json.dumps(describe_machine())
    assert str(ROOT) not in text
    assert json.loads(text)["cores"]["logical"] >= 1
    assert peak_memory() > 2**20


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None


def test_benchmarks_do_not_import_torch() -> None:
    code = "import sys, bench.__main__, bench.latency, bench.memory, bench.work; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_bench_alone_lists_the_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("latency", "kernels", "memory", "e2e", "gpu", "quality"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "base,sr3"], "--stages sr3; allowed: all, text, base, interp, if2, sr1, sr2."),
        (["--steps", "base"], "'base'; allowed: STAGE=NUMBER, stages base,"),
        (["--video", "big"], "size 'big'; allowed: WIDTHxHEIGHT, e.g. 576x320."),
        (["--repeats", "0"], "--repeats 0; allowed: 1 or more."),
        (["--out", "."], ". is a folder."),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    bundle: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["latency", "--bundle", str(bundle), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


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
    assert stages["if2"]["step_outside_s"]["n"] == 1
    assert stages["sr1"]["step_outside_s"] is None, "a loop of one step shows no step from end to end"
    assert result["total_wall_s"][0] == pytest.approx(sum(stage["wall_s"][0] for stage in stages.values()), abs=1e-6)
    printed = capsys.readouterr().out
    assert "end to end" in printed
    assert "outside ms" in printed
    page = out.with_suffix(".md").read_text(encoding="utf-8")
    assert "| end to end |" in page and "![stages](latency-stages.svg)" in page
    assert (out.parent / "latency-stages.svg").is_file()


def test_a_stage_alone_gets_random_input(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "latency.json"
    options = ["--video", "128x64", "--keyframes", "2", "--warmup", "0", "--repeats", "1", "--steps", "if2=2"]
    assert main(["latency", "--bundle", str(bundle), "--stages", "if2", *options, "--out", str(out)]) == 0
    assert list(json.loads(out.read_text(encoding="utf-8"))["stages"]) == ["if2"]
