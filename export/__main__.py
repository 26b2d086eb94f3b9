"""`python -m export`: build, list, check and verify bundles; download, convert and train checkpoints."""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engines import tensorrt
from engines.catalog import CATALOG, STAGES, TEXT_ENCODERS, UNETS, networks_of
from engines.errors import BundleError, SettingsError, Show1Error
from engines.gpu import find_gpus
from engines.manifest import EngineEntry
from engines.spec import INT8, PRECISIONS
from engines.store import Bundle
from export.unpack import demo_checkpoint
from runtime.command import DEMO, checkpoint_path, path, run_command
from runtime.config import parse_size
from runtime.engine import INDUCTOR

if TYPE_CHECKING:
    from export.job import Backend

CHECKPOINTS = Path("checkpoints")
SIZE = "576x320"  # that engines are tuned for, where nothing else is asked for


def _build(arguments: argparse.Namespace) -> None:
    from export.build import build  # torch: only when something is built
    from export.job import Backend

    targets = [target.strip().lower() for target in arguments.target.split(",")] if arguments.target else []
    if arguments.jobs is not None and arguments.jobs < 1:
        raise SettingsError(f"--jobs {arguments.jobs}; allowed: 1 or more.")
    for option in ("calibration", "judge"):
        if getattr(arguments, option) is not None and arguments.precision != INT8:
            raise SettingsError(f"--{option} is for --precision {INT8}; this is {arguments.precision}. Leave it out.")
    if arguments.no_autotune and arguments.engine != INDUCTOR:
        raise SettingsError(f"--no-autotune is for {INDUCTOR}; this is for {arguments.engine}.")
    precision, layers, size = arguments.precision, None, parse_size(arguments.size or SIZE)
    # Of ONNX Runtime's int8; TensorRT's is made of fp16, which every card has.
    made_of = "fp32" if precision == INT8 else precision
    backend = Backend.choose(arguments.engine, made_of, targets, arguments.attention, not arguments.no_autotune)
    if backend.name not in tensorrt.FLAVOURS and (arguments.keep_onnx or arguments.attention != "fused"):
        raise SettingsError(f"--keep-onnx and --attention are for TensorRT; this is for {backend.name}.")
    if precision == INT8:
        judged = _build_int8(arguments, backend)
        for row in _int8_table(judged):
            print(row)
        if judged.root == arguments.out:
            return
        from export.int8 import plans_of

        precision, layers, size = "fp16", plans_of(judged), judged.manifest.size
        print(f"int8 in TensorRT's plans, fast here or not: {', '.join(layers) or 'none'}", file=sys.stderr)
    bundle = build(
        _checkpoint(arguments.checkpoint),
        arguments.out,
        arguments.stage.split(","),
        precision,
        size,
        arguments.force,
        arguments.jobs,
        backend,
        arguments.keep_onnx,
        layers,
    )
    print(f"{bundle.root}: {', '.join(bundle.manifest.engines)}")


def _build_int8(arguments: argparse.Namespace, backend: "Backend") -> Bundle:
    """ONNX Runtime's int8 engines: the result, or beside it what another backend's are made by."""
    from export.build import build, check_size
    from export.demo.faithfulness import load_prompts
    from export.int8 import JUDGE_PROMPTS, build_int8, check_calibration

    if backend.name == INDUCTOR or (backend.name in tensorrt.FLAVOURS and arguments.attention == "padded"):
        raise SettingsError(f"--precision {INT8} is for onnxruntime and TensorRT, and not with --attention padded.")
    if backend.name not in tensorrt.FLAVOURS:
        from runtime.runner_ort import tries_cuda

        if tries_cuda():
            raise SettingsError(
                "ONNX Runtime has no convolutions in int8 for CUDA, engines would be float32. Use --precision fp16, "
                "--engine tensorrt-rtx or, for the CPU, the environment variable CUDA_VISIBLE_DEVICES=-1."
            )
    prompts = load_prompts()
    judge = JUDGE_PROMPTS if arguments.judge is None else arguments.judge
    if judge not in (0, *range(2, len(prompts) + 1)):
        raise SettingsError(
            f"--judge {judge}; allowed: 0 (faithfulness is not measured), or 2 to {len(prompts)} prompts (what chance "
            "gives is told by each other's)."
        )
    out, for_memory = arguments.out, backend.name in tensorrt.FLAVOURS
    named = out if out.name else out.absolute()  # "." has no name
    if for_memory:
        out = named.with_name(f"{named.name}-onnx")
    stages, size = arguments.stage.split(","), parse_size(arguments.size or SIZE)
    floats = Bundle.open(arguments.calibration) if arguments.calibration is not None else None
    for folder in {out, arguments.out}:  # hours before they are written to
        if folder.is_dir():
            built = {network.name for network in networks_of(stages)}
            option = "a --calibration of" if floats else "--size"
            with Bundle.writer(folder) as bundle:
                check_size(bundle, floats.manifest.size if floats else size, built, option)
    if floats is not None:
        if arguments.calibration.resolve() == arguments.out.resolve():
            raise SettingsError(
                f"--calibration and --out are both {arguments.out}: its float32 engines would be lost. Choose another "
                "--out."
            )
        # TensorRT's engines are built from the checkpoint, ONNX Runtime's from the bundle.
        checkpoint = _checkpoint(arguments.checkpoint) if for_memory or arguments.checkpoint else None
        check_calibration(floats, stages, checkpoint, size if arguments.size else None, traced=for_memory)
    else:
        beside = named.with_name(f"{named.name}-fp32")
        print(f"float32 engines to calibrate with, in {beside}:", file=sys.stderr)
        checkpoint = _checkpoint(arguments.checkpoint)
        floats = build(checkpoint, beside, size=size, force=arguments.force, jobs=arguments.jobs)
    print(f"int8 engines for ONNX Runtime, in {out}:", file=sys.stderr)
    return build_int8(floats, out, prompts[:judge], stages, arguments.force, None, for_memory, checkpoint)


def _checkpoint(given: Path | str | None) -> Path:
    """The folder asked for; by default checkpoints/ where there is one, else the demo checkpoint."""
    if given is None:
        if CHECKPOINTS.is_dir():
            return CHECKPOINTS
        print(f"no {CHECKPOINTS} folder here: building the demo checkpoint (docs/demo.md)", file=sys.stderr)
    elif given != DEMO:
        return Path(given)
    return demo_checkpoint()


def _download(arguments: argparse.Namespace) -> None:
    from export.download import download

    download(arguments.out, arguments.stage.split(","), arguments.precision)
    print(arguments.out)


def _convert(arguments: argparse.Namespace) -> None:
    from export.convert import convert_checkpoint

    written = False
    for file in convert_checkpoint(arguments.checkpoint, arguments.stage.split(","), arguments.precision):
        written = True
        print(file, flush=True)
    if not written:
        print(f"{arguments.checkpoint} needs none: its weights are safetensors", file=sys.stderr)


def _random_checkpoint(arguments: argparse.Namespace) -> None:
    from export.random_checkpoint import random_checkpoint

    random_checkpoint(arguments.out, arguments.size, arguments.seed, arguments.stage.split(","), arguments.renew)
    print(arguments.out)


def _train_demo(arguments: argparse.Namespace) -> None:
    from export.demo.train import main as train

    train(arguments)


def _list(arguments: argparse.Namespace) -> None:
    if arguments.bundle:
        bundle = Bundle.open(arguments.bundle)
        for row in (*_cost_table(bundle), *_int8_table(bundle)):
            print(row)
        return
    print(f"{'engine':12} {'stage':7} {'checkpoint folder':42}")
    for network in CATALOG.values():
        folders = " or ".join(f"{folder}/{network.subfolder}" for folder in network.folders)
        print(f"{network.name:12} {network.stage:7} {folders}")


def _cost_table(bundle: Bundle) -> Iterator[str]:
    """What the engines are and what their builds took, in Markdown."""
    yield "| engine | backend | precision | parameters | plans | export | comparison | compilation | peak memory |"
    yield "|---|---|---|--:|--:|--:|--:|--:|--:|"
    for name in CATALOG:
        if entry := bundle.manifest.engines.get(name):
            cost, plans = defaultdict(float, entry.cost), sum(file.bytes for file in entry.files())
            yield (
                f"| {name} | {entry.backend} {entry.backend_version} | {entry.precision} "
                f"| {cost['parameters'] / 1e6:,.1f} M | {plans / 1e6:,.1f} MB | {cost['export_s']:.0f} s "
                f"| {cost['parity_s']:.0f} s | {cost['compile_s']:.0f} s | {cost['peak_bytes'] / 1e9:.1f} GB |"
            )


def _int8_table(bundle: Bundle) -> Iterator[str]:
    """What int8 was worth to each engine, in Markdown; nothing for a bundle that never was to have any."""
    verdicts = {name: entry.properties.get(INT8) for name, entry in bundle.manifest.engines.items()}
    if not any(verdicts.values()):
        return
    yield ""
    yield "| engine | precision | layers in int8 | speed | steps | video | faithfulness | bytes | because |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|---|"
    for name in CATALOG:
        if verdict := verdicts.get(name):
            entry, modes = bundle.manifest.engines[name], [layer["mode"] for layer in verdict["layers"].values()]
            judged = "" if verdict.get("points") is None else f"{verdict['points']:+.1f} points"
            yield (
                f"| {name} | {entry.precision} | {sum(mode != 'float' for mode in modes)} of {len(modes)} "
                f"| {verdict['speed']:.2f} x | {verdict['sqnr_db']:.1f} dB | {verdict['psnr_db']:.1f} dB | {judged} "
                f"| {verdict['bytes'] / verdict['float_bytes']:.0%} | {verdict['why']} |"
            )


def _check(arguments: argparse.Namespace) -> None:
    from runtime.pipeline import settings_of

    bundle = Bundle.open(arguments.bundle)
    broken: list[str] = []  # of every unusable part the network that brings it
    for name in CATALOG:
        entry = bundle.manifest.engines.get(name)
        reasons = ["not built"] if entry is None else _unusable(bundle, entry)
        broken += [name] if reasons else []
        details = f"{entry.backend} {entry.backend_version} {entry.precision}" if entry else ""
        note = "; ".join(reasons) or "ok"
        if entry and entry.targets:
            details += f" {' '.join(entry.targets)}"
            if not reasons and entry.needs_gpu and not find_gpus():
                note = "ok (files and version; not loaded: no NVIDIA GPU here)"
        print(f"{name:12} {details:50} {note}")
    for name in TEXT_ENCODERS:
        file = bundle.manifest.tokenizers.get(name)
        reason = bundle.damage(file) if file else "not built"
        broken += [name] if reason else []
        print(f"{f'{name} tokenizer':63} {reason or 'ok'}")
    try:
        settings_of(bundle)
    except BundleError as error:
        broken.append("t5")
        print(f"{'settings':63} {error}")
    if broken:
        stages: dict[str, dict[str, None]] = {}  # the command that builds again -> the stages it has to name
        for name in broken:
            stages.setdefault(bundle.rebuild_command(name, stage="STAGES"), {})[CATALOG[name].stage] = None
        what = "1 part is" if len(broken) == 1 else f"{len(broken)} parts are"
        commands = [command.replace("STAGES", ",".join(names)) for command, names in stages.items()]
        raise Show1Error(f"{what} unusable. Build again: {'; '.join(commands)}.")


def _unusable(bundle: Bundle, entry: EngineEntry) -> list[str]:
    """Why an engine is of no use: damaged files, another version, plans that its backend does not load, no scheduler.

    `shallow`, which few runs need, is not loaded.
    """
    from runtime.engine import Engine
    from runtime.stages.diffusion import scheduler_of

    reasons = bundle.problems(entry)
    if entry.backend in tensorrt.FLAVOURS:
        reasons += filter(None, [tensorrt.version_mismatch(bundle, entry)])
    if entry.backend == INDUCTOR:
        from runtime.runner_inductor import version_mismatch

        reasons += filter(None, [version_mismatch(bundle, entry)])
    if not reasons and (find_gpus() or not entry.needs_gpu):
        try:
            Engine(bundle, entry).close()
        except Show1Error as error:
            reasons.append(str(error))
    schedulers = [entry.name] if entry.name in UNETS else []
    schedulers += [f"{entry.name}.noising"] if entry.properties.get("noise_level") else []
    for name in schedulers:
        try:
            scheduler_of(bundle, name)
        except Show1Error as error:
            reasons.append(str(error))
    return reasons


def _verify(arguments: argparse.Namespace) -> None:
    from export.verify import Row, verify

    print(f"{'case':28} {'max error':>10} {'mean error':>10} {'tolerance':>10}  ok")

    def report(row: Row) -> None:
        ok = "ok" if row.ok else "MISS"
        print(f"{row.case:28} {row.max_error:10.2e} {row.mean_error:10.2e} {row.tolerance:10.0e}  {ok}", flush=True)

    rows = verify(Bundle.open(arguments.bundle), arguments.reference, report)
    misses = sum(not row.ok for row in rows)
    print(f"{len(rows) - misses} of {len(rows)} cases ok")
    if misses:
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="make or update a bundle of engines from published checkpoints")
    build.set_defaults(run=_build)
    build.add_argument(
        "--stage", default="all", help=f"all, or some of {','.join(STAGES)}, separated by commas (default: %(default)s)"
    )
    build.add_argument(
        "--checkpoint",
        type=checkpoint_path,
        help=f"folder with the checkpoint folders, or {DEMO!r} (default: {CHECKPOINTS} where it exists, else {DEMO})",
    )
    build.add_argument("--out", type=path, default=Path("bundle"), help="the bundle's folder (default: %(default)s)")
    build.add_argument(
        "--engine",
        choices=["onnxruntime", "tensorrt-rtx", "tensorrt", INDUCTOR, "auto"],
        default="onnxruntime",
        help="what runs the engines; auto: TensorRT where a card and a flavour are there, else ONNX Runtime "
        "(default: %(default)s)",
    )
    build.add_argument(
        "--target",
        metavar="SM,...",
        help="TensorRT-RTX: cards to build for, e.g. sm86,sm89,sm120 (default: all from Ampere on; on a machine with a "
        "Turing card sm75)",
    )
    build.add_argument(
        "--attention",
        choices=["fused", "padded", "decomposed"],
        default="fused",
        help="TensorRT: form of attention over frames; padded not with int8 (default: %(default)s)",
    )
    build.add_argument(
        "--no-autotune",
        action="store_true",
        help="inductor on a GPU: products and convolutions by its libraries' choice instead of timing candidates, and "
        "engines side by side where the card has room",
    )
    build.add_argument("--keep-onnx", action="store_true", help="TensorRT: keep the ONNX files beside the plans")
    build.add_argument("--precision", choices=[*PRECISIONS, INT8], default="fp32", help="default: %(default)s")
    build.add_argument(
        "--calibration",
        type=path,
        metavar="BUNDLE",
        help="int8: float32 bundle of the same checkpoint (default: OUT-fp32, which is built first)",
    )
    build.add_argument(
        "--judge",
        type=int,
        metavar="N",
        help="int8: held-out prompts to judge faithfulness by, 2 to 48; 0 leaves that out (default: 16)",
    )
    build.add_argument(
        "--size",
        help=f"video size that the engines are tuned for (default: {SIZE}; with --calibration that bundle's)",
    )
    build.add_argument("--force", action="store_true", help="rebuild what is up to date, too")
    build.add_argument(
        "--jobs",
        type=int,
        help="engines built side by side (default: what processors and memory allow; on a GPU 1 of ONNX Runtime's and, "
        "without autotuning, 1 of inductor's for every 12 GiB; always 1 of tensorrt's and of inductor's that are "
        "autotuned)",
    )

    download = commands.add_parser("download", help="fetch the published checkpoints from Hugging Face (tens of GB)")
    download.set_defaults(run=_download)
    download.add_argument("--out", type=path, default=CHECKPOINTS, help="default: %(default)s")

    convert = commands.add_parser("convert", help="write safetensors of a checkpoint's .bin files, which stay")
    convert.set_defaults(run=_convert)
    convert.add_argument("--checkpoint", type=path, default=CHECKPOINTS, help="default: %(default)s")
    for command in (download, convert):
        command.add_argument("--stage", default="all", help="as for build")
        command.add_argument(
            "--precision",
            choices=list(PRECISIONS),
            default="fp16",
            help="fp16: files in half precision where there are any, pickles halved, else full ones; fp32 and bf16: "
            "full ones where there are any (default: %(default)s)",
        )

    random = commands.add_parser("random-checkpoint", help="write a checkpoint of random weights, to try things")
    random.set_defaults(run=_random_checkpoint)
    random.add_argument("--out", type=path, required=True, help="new folder")
    random.add_argument(
        "--size",
        choices=["golden", "published"],
        default="golden",
        help="golden: some millions of weights; published: 12.1 billion, 24 GB (default: %(default)s)",
    )
    random.add_argument("--stage", default="all", help="networks of these stages alone, as for build")
    random.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    random.add_argument(
        "--renew", action="store_true", help="--out may be a random checkpoint: kept if it is this one, else replaced"
    )

    training = commands.add_parser("train-demo", help="train the demo checkpoint on clips drawn by the program")
    training.set_defaults(run=_train_demo)
    training.add_argument("--out", type=path, default=Path("build") / "demo-training", help="default: %(default)s")
    training.add_argument("--stage", default="all", help="all, or some of text,vae,base,interp,if2,sr1,sr2")
    length = training.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="for all stages named, shared out among them")
    length.add_argument("--steps", type=int, help="for each stage")
    training.add_argument("--stop-after", type=float, metavar="MINUTES", help="stop then; the same command continues")
    training.add_argument("--ship", action="store_true", help="end stages in progress as they are")
    training.add_argument("--init", type=path, metavar="DIR", help="start from the weights of this finished checkpoint")
    lessons = "leave out the first N lessons of every stage, which the weights of --init have had"
    training.add_argument("--skip-lessons", type=int, default=0, metavar="N", help=lessons)
    training.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    training.add_argument(
        "--batch", type=int, help="of a stage; its lessons take shares of it (default: what suits a data-centre GPU)"
    )
    training.add_argument("--pool", type=int, default=32768, help="different clips to draw from (default: %(default)s)")
    training.add_argument("--pack", type=path, metavar="FILE", help="where to write the .tar.xz when all is trained")

    listing = commands.add_parser(
        "list", help="the nine networks; of a bundle, what they took to build and what int8 was worth"
    )
    listing.set_defaults(run=_list)
    listing.add_argument("bundle", type=path, nargs="?")

    check = commands.add_parser("check", help="is a bundle whole and unchanged, and do its engines load here?")
    check.set_defaults(run=_check)
    check.add_argument("bundle", type=path)

    verify = commands.add_parser(
        "verify", help="compare a bundle of the reference set's models with outputs of the authors' code"
    )
    verify.set_defaults(run=_verify)
    verify.add_argument("bundle", type=path)
    verify.add_argument("--reference", type=path, required=True, help="folder in the format of tests/golden/README.md")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(_parser(), argv, "what was finished is kept", extras="export")


if __name__ == "__main__":
    sys.exit(main())
