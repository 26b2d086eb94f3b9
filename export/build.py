"""`export build`: from checkpoint folders to a bundle of engines, rebuilding only what changed."""

import contextlib
import shutil
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from engines import compile_ort, tensorrt
from engines.catalog import TOKENIZERS, Network, networks_of
from engines.errors import BundleError, CheckpointError, SettingsError
from engines.gpu import find_gpus
from engines.memory import GIB
from engines.quantize import LayerPlan
from engines.store import Bundle
from export import kernels, networks
from export.checkpoint import find_folder, read_config
from export.job import ORT_PACKAGES, Backend, Job, tuned_for
from export.networks import Source
from export.tokenizers import convert_clip, convert_t5
from export.workers import build_all
from runtime.config import DIFFUSION_STAGES, Settings, stage_sizes
from runtime.engine import INDUCTOR

_PACKAGES = ("show1-rt", "torch", "onnx", "onnxscript", *ORT_PACKAGES, "tokenizers")
_ON_CARD = 12 * GIB  # of a GPU, for an engine that inductor builds: T5's weights alone are 9 in half precision


def why_stale(bundle: Bundle, job: Job) -> str | None:
    """The reason to build an engine, or None when the bundle's is current and its files are sound."""
    if reason := bundle.why_stale(job.name, job.made_from()):
        return reason
    graphs = bundle.engine(job.name).graphs.values()
    if job.keep_onnx and not all((bundle.path(g.plan).parent / f"{g.spec.name}.onnx").is_file() for g in graphs):
        return "its ONNX files were not kept"
    return None


def build(
    checkpoint: Path,
    out: Path,
    stages: Iterable[str] = ("all",),
    precision: str = "fp32",
    size: tuple[int, int] = (576, 320),
    force: bool = False,
    jobs: int | None = None,
    backend: Backend | None = None,
    keep_onnx: bool = False,
    layers: Mapping[str, Mapping[str, LayerPlan]] | None = None,
) -> Bundle:
    """Build the engines of `stages` into the bundle `out`; those named in `layers` with these layers in int8.

    Raises Show1Error subclasses: CheckpointError for unusable files, ParityError for a graph that computes something
    else, EngineError for one that does not compile, BundleError when `out` cannot take the result. Engines finished
    before an error or an interruption stay.
    """
    backend = backend or Backend.choose(compile_ort.BACKEND, precision)
    stage_sizes(size)
    wanted = networks_of(stages)
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}: no such folder. Give --checkpoint, or run `python -m export download`.")
    # Everything that can be wrong with the checkpoint's layout is found before the first minute is spent.
    sources = [Source.find(network, checkpoint, precision) for network in wanted]
    schedulers = networks.schedulers(sources)
    tokenizers = _tokenizers(checkpoint, wanted)
    defaults = recommended_settings(checkpoint, size)
    all_jobs = [
        Job(source, precision, size, backend, keep_onnx=keep_onnx, layers=(layers or {}).get(source.network.name))
        for source in sources
    ]

    rebuilt = {job.name for job in all_jobs}
    with Bundle.writer(out) as bundle:
        check_size(bundle, size, rebuilt)
        pending, foreign = [], set()
        for job in all_jobs:
            reason = "--force" if force else why_stale(bundle, job)
            print(f"{job.name}: {reason or 'up to date'}", file=sys.stderr)
            if reason:
                pending.append(job)
                may_be = force or "config" in reason or "weights" in reason  # to tell, all weights are read again
                if may_be and not of_checkpoint(bundle, job.source.network, checkpoint):
                    foreign.add(job.name)
        _check_disk(bundle.root, pending)
        if backend.name == INDUCTOR:  # what its engines run with
            kernels.prepare_inductor("cpu" if backend.targets[0].startswith("cpu") else "cuda")
        bundle.announce(
            foreign,
            tokenizers,
            versions={name: found for name in _PACKAGES if (found := tensorrt.installed_version(name))},
            size=size,
            defaults={**defaults.to_dict(), **settings_of_others(bundle, rebuilt)},
            schedulers={**bundle.manifest.schedulers, **schedulers},
        )
        if not pending:
            bundle.adopt()
        if backend.name == INDUCTOR and backend.targets[0].startswith("sm"):
            # Where kernels are chosen by timing, one engine at a time has the GPU.
            jobs = 1 if backend.autotune else jobs or max(1, int(find_gpus()[0].memory / _ON_CARD + 0.05))
        elif backend.name == "tensorrt":
            jobs = 1  # its builder times kernels on the card, too
        elif pending and backend.name == compile_ort.BACKEND:
            from runtime.runner_ort import tries_cuda  # ONNX Runtime: other backends do without

            if tries_cuda():
                jobs = jobs or 1  # engines are compared on the GPU, which might not hold two
        build_all(bundle, pending, jobs)
        return Bundle(bundle.root, bundle.manifest)


def of_checkpoint(bundle: Bundle, network: Network, checkpoint: Path) -> bool:
    """Whether a bundle's engine was made from these weights, in whatever precision they are there."""
    entry = bundle.manifest.engines.get(network.name)
    if entry is None:
        return True
    for precision in ("fp32", "fp16"):
        with contextlib.suppress(CheckpointError):  # of what is not asked for a part alone may be there
            if Source.find(network, checkpoint, precision).made(entry.source):
                return True
    return False


def recommended_settings(checkpoint: Path, size: tuple[int, int]) -> Settings:
    """The reference's settings, with guidance and strength as the checkpoint's optional settings.json recommends."""
    settings = Settings(size=size)
    path = checkpoint / "settings.json"
    if not path.is_file():
        return settings
    try:
        recommended = read_config(path)
        if unknown := recommended.keys() - {"guidance", "strength"}:
            raise SettingsError(f"{', '.join(sorted(unknown))}: unknown; allowed: guidance, strength.")
        strength = recommended.get("strength", settings.strength)
        return replace(settings, strength=strength).with_guidance(recommended.get("guidance", {}))
    except (SettingsError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def check_size(bundle: Bundle, size: tuple[int, int], rebuilt: Collection[str], option: str = "--size") -> None:
    """Raises SettingsError where engines other than `rebuilt` would stay for another size than `option` has."""

    def staying(size: tuple[int, int]) -> list[str]:
        tuned, engines = tuned_for(size), bundle.manifest.engines.items()
        stay = [(name, entry) for name, entry in engines if name in tuned and name not in rebuilt]
        return [name for name, entry in stay if entry.source.get("size") != tuned[name]]

    if others := staying(size):
        asked, was = ("{}x{}".format(*pair) for pair in (size, bundle.manifest.size))
        keep = ""
        with contextlib.suppress(SettingsError, TypeError):  # an edited manifest's
            if not staying(bundle.manifest.size):  # as after a build for another size that was interrupted
                keep = f"{option} {was}, or "
        raise SettingsError(
            f"{bundle.root}: {', '.join(others)} would stay for another size than {asked}. Give {keep}--stage all, or "
            "choose another --out."
        )


def settings_of_others(bundle: Bundle, rebuilt: Collection[str]) -> dict[str, Any]:
    """Of the stages whose engines stay: another checkpoint's, perhaps. Without those that no run would take."""
    stay = {stage for stage in DIFFUSION_STAGES if stage in bundle.manifest.engines and stage not in rebuilt}
    names = stay | ({"strength"} if "sr2" in stay else set())
    kept = {}
    for name in names & bundle.manifest.defaults.keys():
        with contextlib.suppress(SettingsError):  # edited, or another version's
            Settings.from_dict(value := {name: bundle.manifest.defaults[name]})
            kept |= value
    return kept


def _tokenizers(checkpoint: Path, wanted: Iterable[Network]) -> dict[str, str]:
    convert = {"t5": convert_t5, "clip": convert_clip}
    names = {network.name for network in wanted}
    return {
        name: convert[name](find_folder(checkpoint, folders, "tokenizer"))
        for name, folders in TOKENIZERS.items()
        if name in names
    }


def _check_disk(root: Path, pending: list[Job]) -> None:
    need = sum(job.disk for job in pending)
    free = shutil.disk_usage(root).free
    if need > GIB:
        print(f"needs {need / GIB:.1f} GiB of disk, {free / GIB:.1f} GiB are free", file=sys.stderr)
    if need > free:
        raise BundleError(
            f"{root}: {need / GIB:.3g} GiB needed, {free / GIB:.3g} GiB free. Make room or choose another --out."
        )
