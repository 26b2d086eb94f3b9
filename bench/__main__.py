"""`python -m bench`: measure a bundle, or the CUDA kernels, on this machine. Alone it lists the benchmarks."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.errors import EngineError, SettingsError
from engines.gpu import find_gpus
from runtime.command import DEMO, add_stage_options, checkpoint_path, path, run_command, stage_options, unused
from runtime.config import ALL_STEPS, DIFFUSION_STAGES, PRESETS, SEED, Settings
from runtime.engine import INDUCTOR

if TYPE_CHECKING:
    from bench.quality import Task
    from bench.report import Report
    from bench.work import Setup

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
NETWORK_SIZES = ("golden", "published")


def _choices(option: str, text: str, allowed: Sequence[str], *others: str) -> list[str]:
    """ "a,b" in the order of `allowed`, whatever the order asked for; "all" is a word for them all.

    `others` are words that choose nothing.
    """
    wanted = {part.strip() for part in text.split(",")}
    unknown = wanted - {"all", *others, *allowed}
    if unknown:
        names = ", ".join(("all", *others, *allowed))
        raise SettingsError(f"--{option} {', '.join(sorted(unknown))}; allowed: {names}.")
    return [name for name in allowed if "all" in wanted or name in wanted]


def _settings(defaults: Mapping[str, Any], arguments: argparse.Namespace, guided: bool = False) -> Settings:
    """Of a bundle and as asked for; `guided` in every step, each of the whole network, and of the strength, of the
    reference, whatever bundle and preset recommend."""
    settings = Settings.from_dict(defaults).with_options(
        preset=arguments.preset, steps=arguments.steps, keyframes=arguments.keyframes, size=arguments.video
    )
    if guided:
        settings = settings.with_guidance({name: getattr(Settings(), name).guidance_scale for name in DIFFUSION_STAGES})
        settings = settings.with_guided(dict.fromkeys(DIFFUSION_STAGES, ALL_STEPS))
        settings = settings.with_cache(dict.fromkeys(DIFFUSION_STAGES, 1))
        settings = replace(settings, strength=Settings().strength)
    return settings


def _out(arguments: argparse.Namespace, benchmark: str, *parts: str) -> Path:
    """As asked for, else a name that no result of the day has yet."""
    return arguments.out or unused(RESULTS / "-".join([benchmark, *parts, f"{datetime.now(UTC):%Y-%m-%d}.json"]))


def _networks(arguments: argparse.Namespace) -> list[str]:
    """The size of random networks, to name a result by."""
    return [] if arguments.bundle else [arguments.size]


def _size(settings: Settings) -> str:
    return "{}x{}".format(*settings.size)


def _latency(arguments: argparse.Namespace) -> None:
    # Heavy imports wait until arguments have been read: the list and --help answer at once.
    from bench import latency
    from bench.exporter import random_bundle
    from bench.machine import describe_bundle, describe_machine, device
    from bench.report import Report, number
    from bench.work import STAGES
    from engines.store import Bundle

    _check_numbers(arguments)
    stages = _choices("stages", arguments.stages, STAGES)
    bundle = Bundle.open(arguments.bundle or random_bundle(arguments.size))
    settings = _settings(bundle.manifest.defaults, arguments)
    machine = describe_machine(bundle)
    counts = (arguments.seed, arguments.warmup, arguments.repeats)
    asked = latency.describe_run(settings, stages, arguments.preset, *counts)
    out = _out(arguments, "latency", device(bundle, machine), *_networks(arguments), _size(settings), arguments.preset)
    conditions = {"machine": machine, "bundle": describe_bundle(bundle), "run": asked}
    report = Report("latency", out, conditions, arguments.markdown)

    def said(result: latency.StageResult) -> None:
        times = ", ".join(number(run.wall) for run in result.runs)
        print(f"{result.stage}: {times} s", file=sys.stderr, flush=True)

    results = latency.run_latency(bundle, settings, stages, *counts, on_stage=said)
    report.finish(latency.to_json(results), latency.tables(results), {"stages": latency.plot(results)})


def _memory(arguments: argparse.Namespace) -> None:
    from bench import memory
    from bench.exporter import random_bundle
    from bench.machine import describe_bundle, describe_machine, device
    from bench.report import Report
    from engines.store import Bundle

    _check_numbers(arguments)
    bundle = Bundle.open(arguments.bundle or random_bundle(arguments.size))
    settings = _settings(bundle.manifest.defaults, arguments, guided=True)
    machine = describe_machine(bundle)
    asked = {"preset": arguments.preset, "seed": arguments.seed, "interval_s": memory.INTERVAL, **settings.to_dict()}
    out = _out(arguments, "memory", device(bundle, machine), *_networks(arguments), _size(settings), arguments.preset)
    conditions = {"machine": machine, "bundle": describe_bundle(bundle), "run": asked}
    report = Report("memory", out, conditions, arguments.markdown)
    result = memory.run_memory(bundle, settings, arguments.seed)
    report.finish(result.to_json(), [result.table()], {"time": result.plot()})


def _e2e(arguments: argparse.Namespace) -> None:
    from bench import e2e  # says what to install where the baselines' libraries are missing
    from bench.exporter import random_bundle, random_checkpoint
    from bench.kernels import card_name, describe_gpu, torch_with_gpu
    from bench.machine import describe_host, describe_torch
    from bench.report import Report
    from bench.work import STAGES
    from engines.tensorrt import choose_backend

    _check_numbers(arguments)

    place = e2e.Place.here()
    place.limit_threads()

    def built() -> list[Path]:  # which takes long: what would be refused afterwards is refused before
        _check_windows(_settings({}, arguments, guided=True), _choices("stages", arguments.stages, STAGES))
        backend = choose_backend()[0]
        if place.device == "cuda" and find_gpus() and backend == "onnxruntime":
            _check_onnxruntime_uses_it(_ON_CPU)
        elif place.device == "cpu":
            _check_card_is_idle([backend])
        return [random_bundle(arguments.size)]

    setup, asked = _setup(arguments, arguments.repeats, built)
    _check_windows(setup.settings, setup.stages)
    if setup.checkpoint is None and setup.size == "golden":
        setup = replace(setup, checkpoint=random_checkpoint("golden"))
    asked = {"repeats": setup.repeats, "baselines_in": place.dtype, **asked}
    conditions = {"machine": describe_host(), "torch": describe_torch(), **_described(setup.bundles), "run": asked}
    device = "cpu"
    if place.device == "cuda":
        device = card_name(describe_gpu(torch_with_gpu()))
        _check_card_is_used(setup.bundles, _ON_CPU)
    else:
        _check_card_is_idle(
            [entry.backend for entry in _unets(setup.bundles) if entry.needs_gpu or entry.backend == _ORT]
        )
    out = _out(arguments, "e2e", device, arguments.size, _size(setup.settings), arguments.preset)
    report = Report("e2e", out, conditions, arguments.markdown)

    def said(what: str, result: e2e.Result) -> None:
        print(what, file=sys.stderr, flush=True)
        report.save(result.to_json(), result.tables(), result.plots())

    result = e2e.run_e2e(setup, said)
    report.finish(result.to_json(), result.tables(), result.plots())


def _setup(
    arguments: argparse.Namespace, repeats: int, otherwise: Callable[[], list[Path]] = list
) -> tuple["Setup", dict[str, Any]]:
    """As asked for, and the same as a report's conditions; `otherwise` makes the bundles where none are given.

    A bundle `none` stands for none.
    """
    from bench.work import BASELINES, STAGES, Setup, is_installed
    from engines.store import Bundle
    from export.unpack import demo_checkpoint

    stages = _choices("stages", arguments.stages, STAGES)
    kinds = _choices("baseline", arguments.baseline, BASELINES, "none")
    if "xformers" in kinds and arguments.baseline != "all" and not is_installed("xformers"):
        raise SettingsError("--baseline xformers: not installed. `pip install xformers`, or leave it out.")
    kinds = [kind for kind in kinds if is_installed(kind)]
    bundles = [Bundle.open(folder) for folder in arguments.bundle or otherwise() if str(folder) != "none"]
    settings = _settings(bundles[0].manifest.defaults if bundles else {}, arguments, guided=True)
    asked = {"networks": arguments.size, "preset": arguments.preset, "stages": stages, "baselines": kinds}
    checkpoint = demo_checkpoint() if arguments.checkpoint == DEMO else arguments.checkpoint
    setup = Setup(arguments.size, checkpoint, bundles, settings, stages, kinds, arguments.seed, repeats)
    return setup, {**asked, **settings.to_dict()}


def _check_windows(settings: Settings, stages: Sequence[str]) -> None:
    """What a video takes is reckoned from windows of one length."""
    frames, window = settings.num_frames, settings.sr1_window
    if "sr1" in stages and frames > window and (frames - 1) % (window - 1):
        raise SettingsError(
            f"--keyframes {settings.keyframes}: sr1's last window would be shorter than the others, which is not "
            "counted; allowed: 2, 8, 15, 22 and so on, or --stages without sr1."
        )


def _described(bundles: Sequence[Any]) -> dict[str, dict[str, Any]]:
    from bench.machine import describe_bundle

    return {f"bundle {index}": describe_bundle(bundle) for index, bundle in enumerate(bundles, 1)}


def _gpu(arguments: argparse.Namespace) -> None:
    from bench import gpu, kernels
    from bench.machine import describe_host
    from bench.report import Report

    _check_numbers(arguments)
    if not arguments.minutes > 0:
        raise SettingsError(f"--minutes {arguments.minutes:g}; allowed: above 0.")
    parts = _choices("parts", arguments.parts, gpu.PARTS)
    card = kernels.describe_gpu(kernels.torch_with_gpu())
    clock = gpu.Clock(arguments.minutes)
    setup, asked = _setup(arguments, repeats=3)
    if "e2e" in parts:
        _check_windows(setup.settings, setup.stages)
    if {"e2e", "memory"} & set(parts):
        _check_card_is_used(setup.bundles)
    asked = {"minutes": arguments.minutes, "parts": parts, **asked}
    conditions = {"machine": describe_host(), "gpu": card, **_described(setup.bundles), "run": asked}
    report = Report("gpu", _out(arguments, "gpu", kernels.card_name(card)), conditions, arguments.markdown)
    if bad := gpu.run_parts(gpu.make_parts(gpu.Plan(parts, setup)), clock, report):
        raise EngineError(f"not all is well: {'; '.join(bad)} {report.out} has the rest.")


def _kernels(arguments: argparse.Namespace) -> None:
    from bench import kernels
    from bench.machine import describe_host
    from bench.report import Report

    _check_numbers(arguments)
    torch = kernels.torch_with_gpu()
    card = kernels.describe_gpu(torch)
    asked = {"architectures": arguments.arch, "warmup": arguments.warmup, "repeats": arguments.repeats}
    conditions = {"machine": describe_host(), "gpu": card, "run": asked}
    report = Report("kernels", _out(arguments, "kernels", kernels.card_name(card)), conditions, arguments.markdown)
    counts = (arguments.warmup, arguments.repeats)
    report.finish(*kernels.run_kernels(torch, arguments.arch, *counts, lambda sofar: report.save(*sofar)))


def _cost(arguments: argparse.Namespace) -> None:
    from bench import cost
    from bench.report import Report

    settings = {preset: Settings().with_preset(preset) for preset in PRESETS}
    costs = {preset: cost.Cost(chosen) for preset, chosen in settings.items()}
    video = {"video": "29 frames, 576x320", "networks": "published", "guidance": "the reference's"}
    report = Report("cost", _out(arguments, "cost"), {"run": video}, arguments.markdown)
    tables = [cost.work_table(costs), cost.steps_table(settings)]
    report.finish(cost.to_json(costs), tables, {"stages": cost.plot(costs)})


def _check_numbers(arguments: argparse.Namespace) -> None:
    from runtime.noise import NoiseStream

    if "seed" in arguments:
        NoiseStream(arguments.seed)  # raises for a seed out of range
    for name, least in (("warmup", 0), ("repeats", 1)):
        if getattr(arguments, name, least) < least:
            raise SettingsError(f"--{name} {getattr(arguments, name)}; allowed: {least} or more.")


def _quality(arguments: argparse.Namespace) -> None:
    from bench.quality import judge

    task = _task(arguments)
    settings = task.settings(arguments.preset)
    asked = {"preset": arguments.preset, "prompts": len(task.prompts), **settings.to_dict()}
    judge(task, settings, arguments.reference, _task_report("quality", arguments, task, asked))


def _presets(arguments: argparse.Namespace) -> None:
    from bench.presets import compare

    presets = _choices("presets", arguments.presets, PRESETS)
    if arguments.reference:
        raise SettingsError(f"--reference goes with one --preset; --presets are compared with the first, {presets[0]}.")
    task = _task(arguments)
    settings = {preset: task.settings(preset) for preset in presets}
    first = settings[presets[0]]
    asked = {"prompts": len(task.prompts), "presets": presets, "size": _size(first), "keyframes": first.keyframes}
    compare(task, settings, _task_report("presets", arguments, task, asked))


def _task(arguments: argparse.Namespace) -> "Task":
    from bench.exporter import bundle_of
    from bench.quality import KEYFRAMES, VIDEOS, Task
    from engines.store import Bundle
    from export.demo.faithfulness import load_prompts, training_prompts

    prompts = (training_prompts if arguments.combinations == "training" else load_prompts)(arguments.prompts)
    bundle = Bundle.open(bundle_of(arguments.checkpoint) if arguments.checkpoint else arguments.bundle)
    options = {**stage_options(arguments), "keyframes": arguments.keyframes, "size": arguments.video}
    return Task(bundle, prompts, KEYFRAMES if arguments.only_keyframes else VIDEOS, options, arguments.out)


def _task_report(benchmark: str, arguments: argparse.Namespace, task: "Task", asked: Mapping[str, Any]) -> "Report":
    from bench.machine import describe_bundle, describe_machine
    from bench.quality import describe_clips
    from bench.report import Report

    asked = {**asked, "combinations": arguments.combinations, "judged": task.judged.name}
    conditions = {"machine": describe_machine(task.bundle), "bundle": describe_bundle(task.bundle), "run": asked}
    if arguments.reference:
        conditions["reference"] = describe_clips(arguments.reference)
    return Report(benchmark, task.out / "report.json", conditions)


_ORT = "onnxruntime"
_ON_CPU = " Or CUDA_VISIBLE_DEVICES=-1, for everything on the CPU."


def _unets(bundles: Sequence[Any]) -> list[Any]:
    """Their engines' entries."""
    return [bundle.engine(name) for bundle in bundles for name in DIFFUSION_STAGES if name in bundle.manifest.engines]


def _check_card_is_used(bundles: Sequence[Any], otherwise: str = "") -> None:
    """What is measured beside torch on a card shall be on it, too."""
    if not find_gpus():
        return
    if any(entry.backend == _ORT for entry in _unets(bundles)):
        _check_onnxruntime_uses_it(otherwise)
    if any(entry.backend == INDUCTOR and not entry.needs_gpu for entry in _unets(bundles)):
        raise EngineError(
            f"these engines of inductor are for the CPU, and this measures on the card. Build them here.{otherwise}"
        )


def _check_onnxruntime_uses_it(otherwise: str) -> None:
    from runtime.doctor import onnxruntime_idle
    from runtime.runner_ort import check_card, tries_cuda

    if not tries_cuda():
        raise EngineError(f"{onnxruntime_idle(find_gpus()[0])}.{otherwise}")
    check_card()


def _check_card_is_idle(backends: Sequence[str]) -> None:
    """What is measured beside torch on the CPU shall be there, too."""
    from runtime.runner_inductor import why_idle
    from runtime.runner_ort import tries_cuda

    gpus = find_gpus()
    if gpus and any(backend != _ORT or tries_cuda() for backend in backends):
        raise EngineError(f"{why_idle(gpus[0])}, the engines would run on it.{_ON_CPU}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.set_defaults(run=lambda _: parser.print_help())
    commands = parser.add_subparsers(metavar="COMMAND", title="benchmarks")

    def command(name: str, run: Any, what: str) -> Any:
        """A subcommand with the options that all have; returns its `add_argument`."""
        sub = commands.add_parser(name, help=what)
        sub.set_defaults(run=run)
        sub.add_argument("--out", type=path, help=f"JSON file (default: bench/results/{name}-<conditions>-<date>.json)")
        sub.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
        return sub.add_argument

    def add_clip(add: Any) -> None:
        add("--video", metavar="WxH", help="size of the video, multiples of 8 (default: the bundle's, 576x320)")
        add("--keyframes", type=int, metavar="N", help="N of them give 4(N-1)+1 frames (default: the bundle's, 8)")

    def add_stages(add: Any) -> None:
        add("--stages", default="all", metavar="STAGE,...", help="of text, base, interp, if2, sr1, sr2 (default: all)")

    def add_video(
        add: Any, preset: str, several: str = "", networks: str = "of random ones, built where --bundle is left out"
    ) -> None:
        """What is made, and by which networks; `several` says what of more than one bundle, where that is allowed."""
        networks = f"of the networks; {networks} (default: %(default)s)"
        add("--size", choices=NETWORK_SIZES, default="golden", help=networks)
        bundle, action = f"engines made by `python -m export build`{several}", "append" if several else "store"
        add("--bundle", type=path, action=action, help=bundle)
        add("--preset", choices=PRESETS, default=preset, help="steps per stage (default: %(default)s)")
        add("--steps", metavar="STAGE=N,...", help="instead of the preset's, e.g. base=8,sr1=4")
        add_clip(add)
        add("--seed", type=int, default=SEED, help="default: %(default)s")

    def add_baselines(add: Any) -> None:
        add_stages(add)
        kinds = "of eager, compile, xformers; or none (default: all that are installed)"
        add("--baseline", default="all", metavar="KIND,...", help=kinds)
        what = f"that the bundle was made from, or {DEMO!r}: baselines take its weights, results are checked"
        add("--checkpoint", type=checkpoint_path, metavar="FOLDER", help=what)

    add = command("latency", _latency, "time of every stage and step of the cascade, in and outside engines")
    add_video(add, "draft")
    add_stages(add)
    add("--warmup", type=int, default=1, metavar="N", help="runs of each stage before the measured ones (default: 1)")
    add("--repeats", type=int, default=5, metavar="N", help="measured runs of each stage (default: 5)")

    add = command("kernels", _kernels, "the CUDA kernels on this GPU: build, check, time")
    add("--arch", default="native", metavar="LIST", help="CMAKE_CUDA_ARCHITECTURES, or all (default: this card's)")
    add("--warmup", type=int, default=10, metavar="N", help="calls before the measured ones (default: 10)")
    add("--repeats", type=int, default=50, metavar="N", help="measured calls (default: 50)")

    command("cost", _cost, "work of a video by preset at published sizes, counted: nothing is run")

    add = command("memory", _memory, "memory over time while a video is made, engines loaded one by one")
    add_video(add, "draft")

    add = command("e2e", _e2e, "a whole video against the reference in eager and compiled torch")
    add_video(add, "reference", "; several are compared, `none` measures baselines alone")
    add_baselines(add)
    add("--repeats", type=int, default=5, metavar="N", help="measured calls of every baseline's networks (default: 5)")

    add = command("gpu", _gpu, "everything that an NVIDIA card can show: checks, then measurements")
    golden = "without --bundle, golden measures what the part engines has built, published baselines alone"
    add_video(add, "reference", "; several are compared", golden)
    add_baselines(add)
    add("--parts", default="all", metavar="PART,...", help="of rates, kernels, engines, e2e, memory (default: all)")
    add(
        "--minutes", type=float, default=60, metavar="N", help="after them nothing more is begun (default: %(default)g)"
    )

    quality = commands.add_parser("quality", help="do videos show what held-out prompts ask for? (the demo checkpoint)")
    quality.set_defaults(run=lambda arguments: (_presets if arguments.presets else _quality)(arguments))
    add = quality.add_argument
    source = quality.add_mutually_exclusive_group()
    source.add_argument("--bundle", type=path, default=Path("bundle"), help="default: bundle")
    source.add_argument("--checkpoint", type=checkpoint_path, help=f"build a bundle of it first: a folder, or {DEMO!r}")
    add("--prompts", type=int, metavar="N", help="the first N of the list (default: 48, all that are held out)")
    what = "of shape, colour and motion that prompts ask for; the held-out ones are no good any more once chosen by"
    add("--combinations", choices=("held-out", "training"), default="held-out", help=f"{what} (default: %(default)s)")
    add("--only-keyframes", action="store_true", help="judge base's key frames, enlarged without a network")
    which = quality.add_mutually_exclusive_group()
    which.add_argument("--preset", choices=PRESETS, default="draft", help="steps per stage (default: %(default)s)")
    which.add_argument("--presets", metavar="PRESET,...", help="compare them, or all, with that of most work")
    add_stage_options(add)
    add_clip(add)
    add("--out", type=path, default=Path("out") / "quality", help="folder; clips in it are kept (default: out/quality)")
    add("--reference", type=path, metavar="FOLDER", help="--out of another run, to measure the distance to")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    interrupted = "what was finished is kept where it was being written"
    return run_command(_parser(), argv, interrupted, extras="export,bench")


if __name__ == "__main__":
    sys.exit(main())
