"""`export build`: from checkpoint folders to a bundle of engines, rebuilding only what changed."""

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import torch
from tqdm import tqdm

from engines.catalog import TOKENIZERS, Network, networks_of
from engines.compile_ort import BACKEND, compile_ort
from engines.errors import BundleError, CheckpointError, SettingsError
from engines.manifest import EngineEntry, FileEntry, GraphEntry
from engines.spec import PRECISIONS
from engines.store import Bundle, BundleWriter, hash_file
from export import networks
from export.checkpoint import find_folder, read_config
from export.networks import Source
from export.parity import SEED, check_parity, example_sizes
from export.to_onnx import trace
from export.tokenizers import convert_clip, convert_t5
from runtime.config import Settings, stage_sizes

_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "tokenizers")
_GIB = 2**30


@dataclass(frozen=True)
class Job:
    """One engine to build."""

    source: Source
    precision: str
    size: tuple[int, int]
    made_from: dict[str, str]
    keep_variance: bool = False


def build_engine(job: Job, folder: Path) -> EngineEntry:
    """Load, trace, compile and compare one network into `folder`; file paths in the entry are relative to it."""
    name = job.source.network.name
    loaded = networks.load(job.source, job.precision, job.size, job.keep_variance)
    graphs = {}
    for graph in loaded.graphs:
        example = graph.example(example_sizes(graph.spec), torch.Generator().manual_seed(SEED))
        plan, weights = folder / f"{graph.spec.name}.onnx", folder / f"{graph.spec.name}.weights"
        compile_ort(trace(graph.module, graph.spec, example), plan, weights)
        parity = check_parity(graph, name, BACKEND, plan, job.precision)
        graphs[graph.spec.name] = GraphEntry(
            graph.spec, _entry(plan), _entry(weights) if weights.exists() else None, parity
        )
    return EngineEntry(name, BACKEND, job.precision, job.made_from, loaded.properties, graphs)


def _entry(path: Path) -> FileEntry:
    return FileEntry(path.name, hash_file(path), path.stat().st_size)


def _run_job(job: Job, folder: Path, threads: int) -> tuple[EngineEntry, float]:
    torch.set_num_threads(threads)
    start = time.perf_counter()
    folder.mkdir()
    return build_engine(job, folder), time.perf_counter() - start


def made_from(source: Source, precision: str, size: tuple[int, int]) -> dict[str, str]:
    """Everything an engine depends on. When one of these changes, the engine is stale."""
    return {
        **source.fingerprint(),
        "learned_variance": str(source.learned_variance),
        "precision": precision,
        "size": "{}x{}".format(*size),
        "exporter": _exporter_hash(),
        "torch": version("torch"),
        "onnxscript": version("onnxscript"),
        "backend": BACKEND,
    }


def _exporter_hash() -> str:
    """The code that decides what is in an engine."""
    here = Path(__file__).parent
    files = [*sorted((here / "modules").glob("*.py")), here / "to_onnx.py", here / "networks.py"]
    files += [here.parent / "engines" / name for name in ("catalog.py", "compile_ort.py")]
    return hashlib.sha256(b"".join(path.read_bytes().replace(b"\r\n", b"\n") for path in files)).hexdigest()


def why_stale(bundle: Bundle, job: Job) -> str | None:
    """The reason to build an engine, or None when the bundle's is current and its files are sound."""
    entry = bundle.manifest.engines.get(job.source.network.name)
    if entry is None:
        return "not built yet"
    changed = sorted(key for key in {*entry.source, *job.made_from} if entry.source.get(key) != job.made_from.get(key))
    if changed:
        return f"changed: {', '.join(changed)}"
    return "; ".join(filter(None, map(bundle.damage, entry.files()))) or None


def build(
    checkpoint: Path,
    out: Path,
    stages: Iterable[str] = ("all",),
    precision: str = "fp32",
    size: tuple[int, int] = (576, 320),
    force: bool = False,
    jobs: int | None = None,
) -> Bundle:
    """Build the engines of `stages` into the bundle `out`.

    Raises Show1Error subclasses: CheckpointError for unusable files, ParityError for a graph that computes something
    else, BundleError when `out` cannot take the result. Engines finished before an error or an interruption stay.
    """
    if precision not in PRECISIONS:
        raise SettingsError(f"precision {precision!r}; allowed: {', '.join(PRECISIONS)}.")
    stage_sizes(size)
    wanted = networks_of(stages)
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}: no such folder. Give --checkpoint, or run `python -m export download`.")
    # Everything that can be wrong with the checkpoint's layout is found before the first minute is spent.
    sources = [Source.find(network, checkpoint, precision) for network in wanted]
    schedulers = networks.schedulers(checkpoint, wanted)
    tokenizers = _tokenizers(checkpoint, wanted)
    defaults = recommended_settings(checkpoint, size)
    all_jobs = [Job(source, precision, size, made_from(source, precision, size)) for source in sources]

    with Bundle.writer(out) as bundle:
        pending = []
        for job in all_jobs:
            reason = "--force" if force else why_stale(bundle, job)
            print(f"{job.source.network.name}: {reason or 'up to date'}", file=sys.stderr)
            if reason:
                pending.append(job)
        _check_disk(bundle.root, pending)
        for name, text in tokenizers.items():
            bundle.install_tokenizer(name, text)
        _build_all(bundle, pending, jobs or _parallel_jobs(pending))
        bundle.update(
            versions={"show1-rt": version("show1-rt"), **{package: version(package) for package in _PACKAGES}},
            size=size,
            defaults=defaults.to_dict(),
            schedulers={**bundle.manifest.schedulers, **schedulers},
        )
        return Bundle(bundle.root, bundle.manifest)


def recommended_settings(checkpoint: Path, size: tuple[int, int]) -> Settings:
    """The reference's settings, with the guidance that the checkpoint's optional settings.json recommends."""
    settings = Settings(size=size)
    path = checkpoint / "settings.json"
    if not path.is_file():
        return settings
    try:
        return settings.with_guidance(read_config(path).get("guidance", {}))
    except (SettingsError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _tokenizers(checkpoint: Path, wanted: Iterable[Network]) -> dict[str, str]:
    convert = {"t5": convert_t5, "clip": convert_clip}
    names = {network.name for network in wanted}
    return {
        name: convert[name](find_folder(checkpoint, folders, "tokenizer"))
        for name, folders in TOKENIZERS.items()
        if name in names
    }


def _plan_bytes(job: Job) -> int:
    return job.source.parameters * np.dtype(PRECISIONS[job.precision]).itemsize


def _check_disk(root: Path, pending: list[Job]) -> None:
    need, free = sum(map(_plan_bytes, pending)), shutil.disk_usage(root).free
    if need > free:
        raise BundleError(
            f"{root}: {need / _GIB:.1f} GiB needed, {free / _GIB:.1f} GiB free. Make room or choose another --out."
        )


def _parallel_jobs(pending: list[Job]) -> int:
    """As many builds side by side as processors and memory allow; tracing runs on one thread."""
    if not pending:
        return 1
    largest = max(map(_plan_bytes, pending))
    each = 1.5 * _GIB + 4 * largest  # libraries, then weights in the module, the graph, its file's cache and a session
    return max(1, min(os.cpu_count() or 1, len(pending), int(psutil.virtual_memory().available / each)))


def _build_all(bundle: BundleWriter, pending: list[Job], jobs: int) -> None:
    if not pending:
        return
    # Tracing time hardly depends on the weights; a step graph is ten times any other.
    cost = {job.source.network.name: (12 if job.source.scheduler else 2) for job in pending}
    pending = sorted(pending, key=lambda job: -cost[job.source.network.name])
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with (
        bundle.scratch() as scratch,
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool,
        tqdm(total=sum(cost.values()), desc="building", unit="part", bar_format=_BAR) as bar,
    ):
        futures = {
            pool.submit(_run_job, job, scratch / job.source.network.name, threads): job.source.network.name
            for job in pending
        }
        try:
            for future in as_completed(futures):
                entry, seconds = future.result()
                bundle.install(scratch / entry.name, entry)
                error = max(row["max_error"] for graph in entry.graphs.values() for row in graph.parity)
                bar.write(f"{entry.name}: built in {seconds:.0f} s, differs from torch by {error:.1e}", file=sys.stderr)
                bar.update(cost[entry.name])
        except BrokenProcessPool:
            raise BundleError(
                "a build process was killed, most likely for want of memory. Finished engines are kept; "
                "run this again with --jobs 1."
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"
