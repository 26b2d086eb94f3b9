"""`python -m bench`: measure a bundle, or the CUDA kernels, on this machine. Alone it lists the benchmarks."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from engines.errors import OutputError, SettingsError
from runtime.cli import run_command
from runtime.config import PRESETS, SEED, parse_size, parse_stage_values

RESULTS = Path(__file__).parent / "results"
FORMAT = 1


def _stages(text: str) -> list[str]:
    """In the cascade's order, whatever the order asked for."""
    from bench.latency import STAGES

    wanted = {part.strip() for part in text.split(",")}
    unknown = wanted - {"all", *STAGES}
    if unknown:
        raise SettingsError(f"--stages {', '.join(sorted(unknown))}; allowed: all, {', '.join(STAGES)}.")
    return [stage for stage in STAGES if "all" in wanted or stage in wanted]


def _latency(arguments: argparse.Namespace) -> None:
    # Heavy imports wait until arguments have been read: the list and --help answer at once.
    from bench import latency, report
    from bench.machine import describe_bundle, describe_machine, device
    from engines.store import Bundle
    from runtime.config import Settings

    _check_counts(arguments)
    stages = _stages(arguments.stages)
    bundle = Bundle.open(arguments.bundle)
    settings = Settings.from_dict(bundle.manifest.defaults).with_preset(arguments.preset)
    if arguments.steps is not None:
        settings = settings.with_steps(parse_stage_values(arguments.steps, int))
    if arguments.size:
        settings = replace(settings, size=parse_size(arguments.size))
    if arguments.keyframes is not None:
        settings = replace(settings, keyframes=arguments.keyframes)

    machine, engines = describe_machine(), describe_bundle(bundle)
    size, day = "{}x{}".format(*settings.size), machine["date"].split()[0]
    out = arguments.out or RESULTS / f"latency-{device(machine)}-{size}-{arguments.preset}-{day}.json"
    _check_output(out)
    counts = (arguments.seed, arguments.warmup, arguments.repeats)
    asked = latency.describe_run(settings, stages, arguments.preset, *counts)
    for name, values in (("machine", machine), ("bundle", engines), ("run", asked)):
        print(f"{name}\n\n{report.facts(values)}\n", flush=True)

    def said(result: latency.StageResult) -> None:
        times = ", ".join(report.number(run.wall) for run in result.runs)
        print(f"{result.stage}: {times} s", file=sys.stderr, flush=True)

    results = latency.run_latency(bundle, settings, stages, *counts, on_stage=said)
    for table in latency.tables(results):
        print((table.as_markdown() if arguments.markdown else table.as_text()) + "\n")
    facts = {"machine": machine, "bundle": engines, "run": asked}
    _write(out, {"format": FORMAT, "benchmark": "latency", **facts, **latency.to_json(results)})
    print(f"written to {arguments.out or f'bench/results/{out.name}'}")


def _kernels(arguments: argparse.Namespace) -> None:
    from bench import kernels, report
    from bench.machine import describe_host

    _check_counts(arguments)
    torch = kernels.torch_with_gpu()
    machine, gpu = describe_host(), kernels.describe_gpu(torch)
    card = "-".join(re.findall(r"[a-z0-9]+", gpu["name"].lower()))
    out = arguments.out or RESULTS / f"kernels-{card}-{machine['date'].split()[0]}.json"
    _check_output(out)
    asked = {"architectures": arguments.arch, "warmup": arguments.warmup, "repeats": arguments.repeats}
    for name, values in (("machine", machine), ("gpu", gpu), ("run", asked)):
        print(f"{name}\n\n{report.facts(values)}\n", flush=True)

    bench = kernels.KernelBench(torch, *kernels.build_kernels(arguments.arch), arguments.warmup, arguments.repeats)
    large_copy = kernels.COPY_BYTES / bench.copy(kernels.COPY_BYTES).median
    rows = bench.run(on_row=lambda row: print(f"{row.kernel}: {row.shape}", file=sys.stderr, flush=True))
    result = kernels.table(rows, large_copy)
    print((result.as_markdown() if arguments.markdown else result.as_text()) + "\n")
    facts = {"machine": machine, "gpu": gpu, "run": asked}
    _write(out, {"format": FORMAT, "benchmark": "kernels", **facts, **kernels.to_json(rows, large_copy)})
    print(f"written to {arguments.out or f'bench/results/{out.name}'}")


def _check_counts(arguments: argparse.Namespace) -> None:
    for name, least in (("warmup", 0), ("repeats", 1)):
        if getattr(arguments, name) < least:
            raise SettingsError(f"--{name} {getattr(arguments, name)}; allowed: {least} or more.")


def _quality(arguments: argparse.Namespace) -> None:
    from bench import quality, report
    from bench.machine import describe_bundle, describe_machine
    from engines.store import Bundle
    from runtime.config import Settings
    from runtime.pipeline import Show1Pipeline

    prompts = quality.load_prompts(arguments.prompts)
    bundle = Bundle.open(_built(arguments.checkpoint) if arguments.checkpoint else arguments.bundle)
    settings = Settings.from_dict(bundle.manifest.defaults).with_preset(arguments.preset)
    if arguments.steps is not None:
        settings = settings.with_steps(parse_stage_values(arguments.steps, int))
    if arguments.guidance is not None:
        settings = settings.with_guidance(parse_stage_values(arguments.guidance, float))
    machine, engines = describe_machine(), describe_bundle(bundle)
    asked = {"preset": arguments.preset, "prompts": len(prompts), **settings.to_dict()}
    out = arguments.out
    _check_output(out / "report.json")

    with Show1Pipeline.from_bundle(bundle.root, keep_loaded=True) as pipeline:
        result = quality.run_quality(
            prompts,
            lambda p: pipeline(p.prompt, seed=p.seed, settings=settings).frames,
            out,
            arguments.reference,
            lambda i, seen: print(
                f"{i + 1} of {len(prompts)}: {prompts[i].prompt} -> {seen}", file=sys.stderr, flush=True
            ),
        )
    tables = [quality.faithfulness_table(result["faithfulness"]), quality.distance_table(result["videos"])]
    conditions = {"machine": machine, "bundle": engines, "run": asked}
    parts = ["# Quality", *(f"{name}\n\n```\n{report.facts(values)}\n```" for name, values in conditions.items())]
    parts += [table.as_markdown() for table in tables]
    parts += [f"![videos]({path.name})" for path in sorted(out.glob("sheet-*.png"))]
    _write_text(out / "report.md", "\n\n".join(parts) + "\n")
    numbers = {"videos": result["videos"], "faithfulness": asdict(result["faithfulness"])}
    _write(out / "report.json", {"format": FORMAT, "benchmark": "quality", **conditions, **numbers})
    print("\n\n".join(table.as_text() for table in tables))
    print(f"\nwritten to {out}: report.md, report.json, contact sheets, clips")


def _built(checkpoint: Path) -> Path:
    """A bundle of this checkpoint, built or brought up to date."""
    from export.__main__ import main as export

    bundle = Path("build") / f"quality-{checkpoint.name}"
    if export(["build", "--checkpoint", str(checkpoint), "--out", str(bundle)]):
        raise OutputError(f"{checkpoint}: no bundle could be built of it; see above.")
    return bundle


def _check_output(path: Path) -> None:
    """Said before the measurement, which may take hours."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent}: cannot be made ({error.strerror}). Choose another --out.") from None
    if path.is_dir():
        raise OutputError(f"{path} is a folder. Name a file, e.g. --out {path / 'latency.json'}.")


def _write(path: Path, content: dict[str, object]) -> None:
    _write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    from engines.store import write_atomically

    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}). Choose another --out.") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.set_defaults(run=lambda _: parser.print_help())
    commands = parser.add_subparsers(metavar="COMMAND", title="benchmarks")

    latency = commands.add_parser("latency", help="time of every stage and step of the cascade, in and outside engines")
    latency.set_defaults(run=_latency)
    add = latency.add_argument
    add(
        "--bundle", type=Path, default=Path("bundle"), help="engines made by `python -m export build` (default: bundle)"
    )
    add("--preset", choices=PRESETS, default="draft", help="steps per stage (default: %(default)s)")
    add("--steps", metavar="STAGE=N,...", help="instead of the preset's, e.g. base=8,sr1=4")
    add("--stages", default="all", metavar="STAGE,...", help="of text, base, interp, if2, sr1, sr2 (default: all)")
    add("--size", metavar="WxH", help="of the video, multiples of 8 (default: the bundle's, 576x320)")
    add("--keyframes", type=int, metavar="N", help="N of them give 4(N-1)+1 frames (default: the bundle's, 8)")
    add("--seed", type=int, default=SEED, help="default: %(default)s")
    add("--warmup", type=int, default=1, metavar="N", help="runs of each stage before the measured ones (default: 1)")
    add("--repeats", type=int, default=5, metavar="N", help="measured runs of each stage (default: 5)")
    add("--out", type=Path, help="JSON file (default: bench/results/latency-<cpu|gpu>-<size>-<preset>-<date>.json)")
    add("--markdown", action="store_true", help="print the tables as Markdown")

    # All that there is to measure on a GPU so far is its kernels.
    kernels = commands.add_parser("kernels", aliases=["gpu"], help="the CUDA kernels on this GPU: build, check, time")
    kernels.set_defaults(run=_kernels)
    add = kernels.add_argument
    add("--arch", default="native", metavar="LIST", help="CMAKE_CUDA_ARCHITECTURES, or all (default: this card's)")
    add("--warmup", type=int, default=10, metavar="N", help="calls before the measured ones (default: 10)")
    add("--repeats", type=int, default=50, metavar="N", help="measured calls (default: 50)")
    add("--out", type=Path, help="JSON file (default: bench/results/kernels-<gpu>-<date>.json)")
    add("--markdown", action="store_true", help="print the table as Markdown")

    quality = commands.add_parser("quality", help="do videos show what held-out prompts ask for? (the demo checkpoint)")
    quality.set_defaults(run=_quality)
    add = quality.add_argument
    source = quality.add_mutually_exclusive_group()
    source.add_argument("--bundle", type=Path, default=Path("bundle"), help="default: bundle")
    source.add_argument("--checkpoint", type=Path, help="build a bundle of it first; demo, or a folder")
    add("--prompts", type=int, metavar="N", help="the first N of the list (default: all 48)")
    add("--preset", choices=PRESETS, default="draft", help="steps per stage (default: %(default)s)")
    add("--steps", metavar="STAGE=N,...", help="instead of the preset's, e.g. base=20,sr1=4")
    add("--guidance", metavar="STAGE=X,...", help="instead of the bundle's")
    add("--out", type=Path, default=Path("out") / "quality", help="folder; clips in it are kept (default: out/quality)")
    add("--reference", type=Path, metavar="FOLDER", help="--out of another run, to measure the distance to")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(_parser(), argv, "no result was written")


if __name__ == "__main__":
    sys.exit(main())
