"""`export build` and `export check`: what is rebuilt, what a failure leaves behind, and what is in a bundle.

Most tests build the two text encoders alone: the smallest networks, a few seconds each.
"""

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from filelock import FileLock

torch = pytest.importorskip("torch", reason="needs the export extra")

import onnx
from conftest import HALF, ROOT
from safetensors.torch import load_file, save_file

from engines import store, tensorrt
from engines.catalog import CATALOG
from engines.errors import BundleError, CheckpointError, EngineError, ParityError, SettingsError
from engines.gpu import Gpu
from engines.manifest import Manifest
from engines.spec import Binding
from engines.store import Bundle, BundleWriter, write_atomically
from export import networks, workers
from export.__main__ import main
from export.build import build
from export.checkpoint import file_hash
from export.job import Backend, Job, _compare, _exporter_hash, build_engine, tuned_for
from export.kernels import build_library
from export.networks import Source
from export.parity import check_parity, example_sizes, package_sizes, parity_sizes
from runtime.config import DIFFUSION_STAGES, Settings
from runtime.engine import Engine
from runtime.kernels import REFERENCE, missing_programs
from runtime.pipeline import settings_of

pytestmark = pytest.mark.torch

CLIP = "sr2/text_encoder"

RTX = "tensorrt-rtx"
WITH_RTX = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs the tensorrt-rtx extra")
ADA = Gpu("GeForce RTX 4090", (8, 9), 24 * 2**30, (13, 0))
TURING = Gpu("GeForce RTX 2080", (7, 5), 8 * 2**30, (13, 0))
HOPPER = Gpu("H200", (9, 0), 141 * 2**30, (13, 0))


class InThisProcess(Executor):
    """In place of the builder's processes, which take seconds to start and do not see what a test has patched."""

    _processes = None

    def __init__(self, jobs: int, **options: Any) -> None:
        pass

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(work(*arguments, **options))
        except Exception as error:
            future.set_exception(error)
        return future


def build_text_encoders(checkpoint: Path, out: Path, in_this_process: bool = True, **options: Any) -> Bundle:
    with pytest.MonkeyPatch.context() as patch:
        if in_this_process:
            patch.setattr("export.workers.ProcessPoolExecutor", InThisProcess)
        patch.setattr("export.build.networks_of", lambda stages: [CATALOG["t5"], CATALOG["clip"]])
        return build(checkpoint, out, **{"jobs": 1, **options})


@pytest.fixture
def checkpoint(golden: Path, tmp_path: Path) -> Path:
    """The golden text encoders and tokenizers, to be spoilt."""
    for part in ("base/text_encoder", "base/tokenizer", "sr2/text_encoder", "sr2/tokenizer"):
        shutil.copytree(golden / "models" / part, tmp_path / "models" / part)
    return tmp_path / "models"


@pytest.fixture(scope="module")
def built(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of both text encoders."""
    out = tmp_path_factory.mktemp("built") / "bundle"
    build_text_encoders(golden / "models", out)
    return out


@pytest.fixture
def out(built: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return shutil.copytree(built, tmp_path / "bundle")


@pytest.fixture
def pending(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the engines that a build would have made: it makes none."""
    names: list[str] = []

    def note(bundle: Bundle, jobs: list[Job], *_: Any) -> None:
        names.extend(job.source.network.name for job in jobs)

    monkeypatch.setattr("export.build.build_all", note)
    monkeypatch.setattr("export.job.why_not_half", lambda: None)
    return names


def reasons(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What a build said of each engine."""
    lines = capsys.readouterr().err.splitlines()
    return dict(line.split(": ", 1) for line in lines if line.partition(":")[0] in CATALOG)


def files_of(bundle: Path, engine: str) -> list[Path]:
    opened = Bundle.open(bundle)
    return [opened.path(file) for file in opened.engine(engine).files()]


def assert_tidy(bundle: Path) -> None:
    """No temporary files, no folder that the manifest does not name, every file as the manifest says."""
    opened = Bundle.open(bundle)
    assert not list(bundle.rglob(".tmp-*"))
    files = [file for engine in opened.manifest.engines.values() for file in engine.files()]
    files += opened.manifest.tokenizers.values()
    assert [opened.damage(file) for file in files if opened.damage(file)] == []
    on_disk = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert on_disk - {".lock", "manifest.json"} == {file.path for file in files}


# What is rebuilt


def test_a_second_build_finds_all_up_to_date_and_touches_no_engine(
    checkpoint: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for engine in ("t5", "clip") for path in files_of(out, engine)}
    bundle = build_text_encoders(checkpoint, out)
    assert reasons(capsys) == {"t5": "up to date", "clip": "up to date"}
    assert set(bundle.manifest.engines) == {"t5", "clip"}
    assert {path: path.stat().st_mtime_ns for path in before} == before


def change_weights(checkpoint: Path) -> None:
    path = checkpoint / CLIP / "model.safetensors"
    weights = load_file(path)
    bias = weights["text_model.final_layer_norm.bias"]
    weights["text_model.final_layer_norm.bias"] = bias.float() + 1  # stored in half precision, which would round
    save_file(weights, path)


def change_t5(checkpoint: Path) -> None:
    path = checkpoint / "base" / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    weights["encoder.final_layer_norm.weight"] *= 2
    save_file(weights, path)


def change_config(checkpoint: Path) -> None:
    path = checkpoint / CLIP / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer_norm_eps": 1e-6}))


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        (change_weights, {}, {"clip": "changed: weights"}),
        (change_config, {}, {"clip": "changed: config"}),
        (None, {"precision": "fp16"}, {"t5": "changed: precision", "clip": "changed: precision"}),
        (None, {"size": (640, 384)}, {}),
        (None, {"force": True}, {"t5": "--force", "clip": "--force"}),
    ],
    ids=["weights", "config", "precision", "size", "force"],
)
def test_exactly_what_changed_is_rebuilt_and_the_reason_is_said(
    checkpoint: Path,
    out: Path,
    pending: list[str],
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None] | None,
    options: dict[str, Any],
    expected: dict[str, str],
) -> None:
    if change:
        change(checkpoint)
    build_text_encoders(checkpoint, out, **options)
    assert reasons(capsys) == {"t5": "up to date", "clip": "up to date", **expected}
    assert pending == list(expected)
    if not pending:  # else with the first engine that is installed
        assert Bundle.open(out).manifest.size == options["size"]


def test_schedulers_of_the_checkpoint_replace_those_of_the_bundle_and_no_others(
    checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = {"beta_start": 1e-4}, {"beta_start": 2e-4}
    manifest = replace(Bundle.open(out).manifest, schedulers={"base": old, "sr2": old})
    (out / "manifest.json").write_text(manifest.to_json())
    monkeypatch.setattr(networks, "schedulers", lambda sources: {"sr2": new})
    build_text_encoders(checkpoint, out)
    assert Bundle.open(out).manifest.schedulers == {"base": old, "sr2": new}


def test_stages_that_stay_keep_what_their_checkpoint_recommended(checkpoint: Path, out: Path) -> None:
    before = Bundle.open(out).manifest
    engines = dict(before.engines)
    for name in ("base", "sr2"):
        source = {**engines["t5"].source, "size": tuned_for(before.size)[name]}
        engines[name] = replace(engines["t5"], name=name, source=source).sealed()
    kept = Settings(strength=0.3).with_guidance({"base": 5.0, "interp": 5.0}).to_dict()
    (out / "manifest.json").write_text(replace(before, engines=engines, defaults=kept).to_json())
    build_text_encoders(checkpoint, out)
    defaults, plain = Settings.from_dict(Bundle.open(out).manifest.defaults), Settings()
    assert (defaults.base.guidance_scale, defaults.strength) == (5.0, 0.3)
    assert defaults.interp.guidance_scale == plain.interp.guidance_scale, "which has no engine here"
    kept |= {"base": {"of": "another version"}, "strength": 7}
    (out / "manifest.json").write_text(replace(before, engines=engines, defaults=kept).to_json())
    build_text_encoders(checkpoint, out)  # what `check` asks for
    assert settings_of(Bundle.open(out)) == plain


def test_a_part_of_a_bundle_is_not_built_for_another_size(checkpoint: Path, out: Path) -> None:
    before = Bundle.open(out).manifest
    tuned = {**before.engines["t5"].source, "size": "(64, 40)"}
    engines = {**before.engines, "base": replace(before.engines["t5"], name="base", source=tuned).sealed()}
    (out / "manifest.json").write_text(replace(before, engines=engines).to_json())
    message = r": base would stay for another size than 640x384\. Give --size 576x320, or --stage all, or"
    with pytest.raises(SettingsError, match=message):
        build_text_encoders(checkpoint, out, size=(640, 384))
    assert Bundle.open(out).manifest.size == (576, 320)
    # After a build of all for another size that ended early the manifest has the new size, base the old one.
    (out / "manifest.json").write_text(replace(before, engines=engines, size=(640, 384)).to_json())
    with pytest.raises(SettingsError, match=r"another size than 640x384\. Give --stage all, or choose"):
        build_text_encoders(checkpoint, out, size=(640, 384))
    build_text_encoders(checkpoint, out)
    assert Bundle.open(out).manifest.size == (576, 320)


@pytest.mark.parametrize(
    "damage",
    [
        lambda plan: plan.unlink(),
        lambda plan: os.truncate(plan, plan.stat().st_size // 2),
        lambda plan: plan.write_bytes(bytes(plan.stat().st_size)),
    ],
    ids=["missing", "truncated", "overwritten"],
)
def test_a_damaged_engine_is_rebuilt_and_its_file_named(
    checkpoint: Path,
    out: Path,
    pending: list[str],
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
) -> None:
    plan, _ = files_of(out, "clip")
    damage(plan)
    build_text_encoders(checkpoint, out)
    said = reasons(capsys)
    assert pending == ["clip"]
    assert said["t5"] == "up to date"
    assert plan.name in said["clip"]


def test_a_rebuilt_engine_replaces_the_old_one_and_computes_with_the_new_weights(checkpoint: Path, out: Path) -> None:
    old, ids = files_of(out, "clip"), np.arange(5)[None]
    untouched = {path: path.stat().st_mtime_ns for path in files_of(out, "t5")}
    before = run_clip(out, ids)
    change_weights(checkpoint)
    build_text_encoders(checkpoint, out)
    np.testing.assert_allclose(run_clip(out, ids), before + 1, atol=1e-5)
    assert not any(path.exists() for path in old)
    assert {path: path.stat().st_mtime_ns for path in files_of(out, "t5")} == untouched
    assert_tidy(out)


def run_clip(bundle: Path, ids: np.ndarray) -> np.ndarray:
    opened = Bundle.open(bundle)
    engine = Engine(opened, opened.engine("clip"))
    try:
        return engine.run("encode", input_ids=ids)["prompt_embeds"]
    finally:
        engine.close()


def test_a_bundle_has_one_name_whichever_engine_was_finished_first(built: Path, tmp_path: Path) -> None:
    ids = set()
    for order in (["t5", "clip"], ["clip", "t5"]):
        with Bundle.writer(tmp_path / order[0]) as bundle, bundle.scratch() as scratch:
            for name in order:
                entry = Bundle.open(built).engine(name)
                encode = entry.graphs["encode"]
                plan, weights = (replace(file, path=Path(file.path).name) for file in (encode.plan, encode.weights))
                shutil.copytree(files_of(built, name)[0].parent, scratch / name)
                graphs = {"encode": replace(encode, plan=plan, weights=weights)}
                bundle.install(scratch / name, replace(entry, graphs=graphs))
        assert_tidy(tmp_path / order[0])
        ids.add(Bundle.open(tmp_path / order[0]).id)
    assert len(ids) == 1


def test_weights_that_change_while_they_are_built_from_make_the_engine_stale(checkpoint: Path, tmp_path: Path) -> None:
    job = Job(Source.find(CATALOG["clip"], checkpoint, "fp32"), "fp32", (576, 320))
    before = job.made_from()

    def load(*arguments: Any) -> networks.LoadedNetwork:
        loaded = load_before(*arguments)
        change_weights(checkpoint)
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        load_before = networks.load
        patch.setattr(networks, "load", load)
        entry = build_engine(job, tmp_path)
    assert entry.source == before != job.made_from()


def test_engines_are_stale_where_their_own_size_is_another(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(other: tuple[int, int]) -> set[str]:
        sources = [Source.find(network, golden / "models", "fp32") for network in CATALOG.values()]
        made = {size: [Job(source, "fp32", size).made_from() for source in sources] for size in ((576, 320), other)}
        return {name for name, a, b in zip(CATALOG, *made.values(), strict=True) if a != b}

    latent = {"sr2", "vae_encoder", "vae_decoder"}
    assert stale((576, 328)) == latent  # the pixel stages' sizes are rounded
    assert stale((640, 384)) == latent | {"base", "interp", "if2", "sr1"}
    job = Job(Source.find(CATALOG["base"], golden / "models", "fp32"), "fp32", (576, 320))
    before = job.made_from()
    monkeypatch.setattr("export.job.stage_sizes", lambda size: dict.fromkeys(DIFFUSION_STAGES, size))
    assert job.made_from() != before


def test_the_latent_stage_is_stale_where_its_autoencoder_is_another(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [Source.find(CATALOG[name], golden / "models", "fp32") for name in ("sr1", "sr2")]
    before = [source.fingerprint()["config"] for source in sources]
    read = networks.read_config
    monkeypatch.setattr(networks, "read_config", lambda path: {**read(path), "block_out_channels": [32, 64]})
    assert [source.fingerprint()["config"] == config for source, config in zip(sources, before, strict=True)] == [
        True,
        False,
    ]


def test_engines_do_not_depend_on_the_devices_that_torch_was_built_for(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, made = Job(Source.find(CATALOG["clip"], checkpoint, "fp32"), "fp32", (576, 320)), []
    for version in ("2.13.0", "2.13.0+cpu", "2.13.1"):
        monkeypatch.setattr("export.job.version", lambda _, version=version: version)
        made.append(job.made_from())
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize("name", [*CATALOG])
def test_graphs_are_compared_with_the_frames_that_the_runtime_gives(golden: Path, name: str) -> None:
    for graph in networks.load(Source.find(CATALOG[name], golden / "models", "fp32"), "fp32", (576, 320)).graphs:
        traced = example_sizes(graph.spec)
        assert len(set(traced.values())) == len(traced), "no axis is taken for another"
        for sizes in (parity_sizes(graph.spec), package_sizes(graph.spec)):
            frames = {row["frames"] for row in sizes if "frames" in row}
            assert (1 in frames) == (name in ("if2", "vae_encoder", "vae_decoder") and "frames" in traced)
            assert not frames or len(frames) >= 2


@pytest.mark.parametrize(
    ("file", "backends"),
    [
        ("export/networks.py", {"onnxruntime", "tensorrt-rtx", "inductor"}),
        ("engines/catalog.py", {"onnxruntime", "tensorrt-rtx", "inductor"}),
        ("runtime/runner_inductor.py", {"inductor"}),
        ("engines/compile_trt.py", {"tensorrt-rtx"}),
    ],
)
def test_code_that_decides_what_is_in_an_engine_makes_it_stale(
    monkeypatch: pytest.MonkeyPatch, file: str, backends: set[str]
) -> None:
    every = ("onnxruntime", "tensorrt-rtx", "inductor")
    before = {backend: _exporter_hash(backend) for backend in every}
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path == ROOT / file))
    assert {backend for backend in every if _exporter_hash(backend) != before[backend]} == backends


# What a failure leaves behind


def test_a_failing_build_keeps_what_was_finished_and_nothing_half_done(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, weights = tmp_path / "new", checkpoint / "base" / "text_encoder" / "model.safetensors"
    whole = weights.read_bytes()
    stored = load_file(weights)
    del stored["encoder.final_layer_norm.weight"]
    save_file(stored, weights)
    with pytest.raises(CheckpointError, match=r"base/text_encoder: .* 1 missing: encoder\.final_layer_norm\.weight"):
        build_text_encoders(checkpoint, out, in_this_process=False)
    assert list(Bundle.open(out).manifest.engines) == ["clip"]  # of more layers, so it went first
    assert_tidy(out)
    with pytest.raises(CheckpointError):
        build_text_encoders(checkpoint, tmp_path / "other", size=(640, 384))
    # What tells how to build the rest.
    assert "--size 640x384" in Bundle.open(tmp_path / "other").rebuild_command("t5")

    weights.write_bytes(whole)
    monkeypatch.setattr("export.build.build_all", lambda *_: None)
    capsys.readouterr()
    build_text_encoders(checkpoint, out)
    assert reasons(capsys) == {"t5": "not built yet", "clip": "up to date"}


def fail_to_build(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(job: Job, folder: Path) -> Any:
        if job.name == name:
            raise EngineError(f"{name} failed")
        return run_before(job, folder)

    run_before = workers._run_job
    monkeypatch.setattr(workers, "_run_job", run)


def test_what_was_finished_with_a_failure_is_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_build("t5", monkeypatch)
    for attempt in range(4):  # sets have an order of their own
        with pytest.raises(EngineError, match="t5 failed"):
            build_text_encoders(checkpoint, tmp_path / str(attempt), jobs=2)
        assert list(Bundle.open(tmp_path / str(attempt)).manifest.engines) == ["clip"]


@pytest.mark.parametrize(("failing", "left"), [("clip", ["clip", "t5"]), ("t5", ["clip"])], ids=["first", "second"])
def test_a_build_of_another_checkpoint_that_fails_never_leaves_engines_of_both(
    checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch, failing: str, left: list[str]
) -> None:
    before = Bundle.open(out).manifest
    for change in (change_weights, change_t5):
        change(checkpoint)
    with monkeypatch.context() as patch:
        fail_to_build(failing, patch)  # clip, of more layers, goes first
        with pytest.raises(EngineError):
            build_text_encoders(checkpoint, out)
    manifest = Bundle.open(out).manifest
    assert list(manifest.engines) == left
    assert (manifest == before) == (failing == "clip"), "until something is finished the bundle is what it was"
    build_text_encoders(checkpoint, out)
    assert_tidy(out)


def test_a_rebuild_of_the_same_weights_that_fails_leaves_what_there_was(
    checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.job.why_not_half", lambda: None)
    fail_to_build("t5", monkeypatch)
    with pytest.raises(EngineError):
        build_text_encoders(checkpoint, out, precision="fp16")
    engines = Bundle.open(out).manifest.engines
    assert {name: entry.precision for name, entry in engines.items()} == {"clip": "fp16", "t5": "fp32"}


def test_engines_of_other_weights_are_told_from_those_of_another_precision(
    checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign: list[set[str]] = []
    monkeypatch.setattr("export.build.build_all", lambda bundle, *_: foreign.append(bundle._announced[0]))
    clip = checkpoint / CLIP / "model.safetensors"
    shutil.copyfile(clip, clip.with_name("model.fp16.safetensors"))  # the bundle's, beside what asks for another
    change_weights(checkpoint)
    for options in ({}, {"force": True}):
        build_text_encoders(checkpoint, out, **options)
    clip.with_name("model.fp16.safetensors").unlink()
    for options in ({}, {"force": True}):
        build_text_encoders(checkpoint, out, **options)
    assert foreign == [set(), set(), {"clip"}, {"clip"}]


def test_an_unfinished_download_of_another_precision_is_no_hindrance(
    checkpoint: Path, out: Path, pending: list[str]
) -> None:
    change_weights(checkpoint)
    shards = [f"model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (checkpoint / CLIP / shards[0]).touch()
    (checkpoint / CLIP / "model.safetensors.index.fp16.json").write_text(
        json.dumps({"weight_map": dict(zip("ab", shards, strict=True))})
    )
    build_text_encoders(checkpoint, out)
    assert pending == ["clip"]


def test_a_first_build_that_fails_at_its_tokenizers_can_be_run_again(
    checkpoint: Path, tmp_path: Path, pending: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patch:
        patch.setattr(BundleWriter, "install_tokenizer", fail)
        with pytest.raises(BundleError, match=r"cannot be written \(Disk quota exceeded\)"):
            build_text_encoders(checkpoint, tmp_path / "new")
    build_text_encoders(checkpoint, tmp_path / "new")
    assert pending == ["t5", "clip"]


def test_an_engine_that_a_build_has_replaced_meanwhile_is_not_called_damaged(
    checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built_again(*_: object) -> None:
        change_weights(checkpoint)
        build_text_encoders(checkpoint, out)
        raise BundleError("a file is not there")

    opened, again = Bundle.open(out), r"its engines were built again while this ran\. Run this again"
    with monkeypatch.context() as loading:
        loading.setattr("runtime.engine.open_runner", built_again)
        with pytest.raises(BundleError, match=again):
            Engine(opened, opened.engine("clip"))
    with pytest.raises(BundleError, match=again):
        Engine(opened, opened.engine("clip"))


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is a signal to a process group")
def test_an_interrupted_build_says_so_in_a_line_and_leaves_a_sound_bundle(golden: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    command = [sys.executable, "-m", "export", "build", "--stage", "text", "--checkpoint", str(golden / "models")]
    with subprocess.Popen(
        [*command, "--out", str(out)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs start with it ignored
    ) as process:
        try:
            wait_for(lambda: list(out.glob(".tmp-*/t5")), process)
            os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("interrupted") and "what was finished is kept" in last
    assert Bundle.open(out).manifest.engines == {}
    assert_tidy(out)
    with Bundle.writer(out):
        pass  # the lock is free again


def sleep_as_a_worker(job: Job, folder: Path) -> None:
    """In place of a worker's work, which would go on for minutes."""
    (folder.parents[2] / "pid").write_text(str(os.getpid()))
    time.sleep(300)


def test_an_interruption_ends_the_workers_before_what_they_write_to_goes(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"

    def interrupt(*_: Any, **__: Any) -> None:
        end = time.monotonic() + 120
        while not (pid.exists() and pid.read_text()):
            assert time.monotonic() < end, "the worker did not start"
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(workers, "_run_job", sleep_as_a_worker)
    monkeypatch.setattr(workers, "wait", interrupt)
    job = Job(Source.find(CATALOG["clip"], golden / "models", "fp32"), "fp32", (576, 320))
    with Bundle.writer(tmp_path / "bundle") as bundle, pytest.raises(KeyboardInterrupt):
        workers.build_all(bundle, [job], 1)
    assert not psutil.pid_exists(int(pid.read_text()))
    assert not list((tmp_path / "bundle").glob(".tmp-*"))


def processes_of_inductor() -> int:
    return torch._inductor.config.compile_threads


@pytest.mark.parametrize(("asked", "given"), [(None, 2 * 37), ("5", 5)])
def test_workers_share_the_processors_with_what_they_start(
    asked: str | None, given: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "TORCHINDUCTOR_COMPILE_THREADS"
    monkeypatch.setenv(name, asked) if asked else monkeypatch.delenv(name, raising=False)
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=workers._start_worker, initargs=(None, 37)) as pool:
        assert pool.submit(torch.get_num_threads).result() == 37
        assert pool.submit(processes_of_inductor).result() == given


def wait_for(condition: Callable[[], Any], process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the build ended early: {process.stderr.read()}"
        assert time.monotonic() < end, "the build did not start"
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_workers_of_a_killed_build_end_with_it(golden: Path, tmp_path: Path) -> None:
    """They would go on for minutes and keep processors, memory and the card."""
    out = tmp_path / "bundle"
    command = [sys.executable, "-m", "export", "build", "--stage", "base", "--checkpoint", str(golden / "models")]
    with subprocess.Popen([*command, "--out", str(out)], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: list(out.glob(".tmp-*/base")), process)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        gone, left = psutil.wait_procs(workers, timeout=5)
        for worker in left:
            worker.kill()
    assert gone and not left


def test_leftovers_of_a_killed_build_are_removed_by_the_next(checkpoint: Path, out: Path) -> None:
    (out / "engines" / "t5-mine").mkdir()  # no name of ours
    (out / "engines" / "t5-0123456789ab").mkdir()
    (out / "engines" / "t5-0123456789ab" / "encode.weights").touch()
    (out / ".tmp-x1y2" / "t5").mkdir(parents=True)
    (out / ".tmp-x1y2" / "t5" / "encode.onnx").touch()
    (out / ".tmp-manifest.json").touch()
    (out / "tokenizers" / ".tmp-t5.json").touch()
    build_text_encoders(checkpoint, out)
    assert_tidy(out)
    assert (out / "engines" / "t5-mine").is_dir() and not (out / "engines" / "t5-0123456789ab").exists()


def test_a_second_builder_is_refused_while_the_first_is_at_work(checkpoint: Path, out: Path) -> None:
    with (
        FileLock(out / ".lock"),
        pytest.raises(
            BundleError, match=r"another build is writing this bundle\. Wait for it, or choose another --out"
        ),
    ):
        build_text_encoders(checkpoint, out, force=True)
    assert_tidy(out)


def test_a_graph_that_differs_from_torch_is_not_installed(
    checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Bundle.open(out).manifest
    change_weights(checkpoint)
    monkeypatch.setattr("export.parity.TOLERANCE", {"fp32": 0.0})
    with pytest.raises(
        ParityError, match=r"clip/encode: .* differs from its torch module by .*e-\d+ \(tolerance 0\).*not installed"
    ):
        build_text_encoders(checkpoint, out)
    assert Bundle.open(out).manifest.engines == before.engines
    assert_tidy(out)


def test_a_graph_that_gives_no_numbers_is_not_installed(golden: Path) -> None:
    (graph,) = networks.load(Source.find(CATALOG["clip"], golden / "models", "fp32"), "fp32", (576, 320)).graphs

    class Numberless:
        def infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            with torch.no_grad():
                return {"prompt_embeds": graph.module(torch.from_numpy(feeds["input_ids"])).numpy() * np.nan}

    with pytest.raises(ParityError, match=r"clip/encode: .* differs from its torch module by nan"):
        check_parity(graph, "clip", Numberless(), "fp32")


def test_what_differs_is_closed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """An open engine holds its memory, and on Windows its files."""
    closed: list[str] = []
    monkeypatch.setattr("export.job.check_parity", lambda *_: (_ for _ in ()).throw(ParityError("differs")))
    job, graph = SimpleNamespace(name="clip", precision="fp32"), SimpleNamespace(spec=SimpleNamespace(name="encode"))
    with pytest.raises(ParityError, match="differs"):
        _compare(job, graph, SimpleNamespace(close=lambda: closed.append("clip")), lambda _: None, {"parity_s": 0.0})
    assert closed == ["clip"]


def test_too_full_a_disk_is_noticed_before_anything_is_built(
    checkpoint: Path, tmp_path: Path, pending: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.build.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(BundleError, match=r"GiB needed, 9\.31e-07 GiB free\. Make room or choose another --out"):
        build_text_encoders(checkpoint, tmp_path / "new")
    assert not pending


def test_a_disk_that_fills_up_during_a_build_leaves_nothing_half_made(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(model: object, plan: Path, weights: Path) -> None:
        plan.write_bytes(b"half a pl")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("export.job.compile_ort.compile_ort", fill)
    with pytest.raises(BundleError, match=r"cannot be written \(No space left on device\)\. Nothing of it was kept"):
        build_text_encoders(checkpoint, tmp_path / "new")
    assert not Bundle.open(tmp_path / "new").manifest.engines
    assert_tidy(tmp_path / "new")


def test_a_folder_with_other_files_is_refused_and_left_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    letters = [tmp_path / "home" / name for name in ("letter.txt", ".tmp-mine/letter.txt", "a/b/.tmp-b/letter.txt")]
    for letter in letters:
        letter.parent.mkdir(parents=True, exist_ok=True)
        letter.write_text("dear")
    with pytest.raises(BundleError, match=r"holds other files and no bundle\. Choose an empty or new folder for --out"):
        build_text_encoders(checkpoint, tmp_path / "home")
    assert [letter.is_file() and letter.read_text() for letter in letters] == ["dear"] * 3


def test_fp16_is_not_built_where_it_is_inexact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.job.why_not_half", lambda: "it is inexact here")
    with pytest.raises(SettingsError, match=r"^it is inexact here: use --precision fp32\."):
        Backend.choose("onnxruntime", "fp16")
    assert Backend.choose("onnxruntime", "fp32").name == "onnxruntime"


def test_a_new_disk_is_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    with Bundle.writer(tmp_path) as writer:
        writer.update(versions={})
    assert (tmp_path / "lost+found").is_dir() and not Bundle.open(tmp_path).manifest.engines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "base,sr9"], "unknown stage sr9; allowed: all, text, base, interp, sr1, sr2"),
        (["--size", "100x64"], "size 100x64; allowed: width and height in multiples of 8, from 64"),
        (["--checkpoint", "nowhere"], "nowhere: no such folder. Give --checkpoint"),
    ],
)
def test_impossible_requests_are_one_line(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code = main(["build", "--checkpoint", str(golden / "models"), "--out", str(tmp_path / "new"), *arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 1
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "new").exists()


def test_list_names_the_nine_networks_and_their_folders(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(CATALOG)
    assert lines[2].split() == ["interp", "interp", "interpolation/unet", "or", "show-1-interpolation/unet"]


# What is in a bundle

# docs/engines.md in the golden models' numbers: text of 64 (T5) and 32 (CLIP) channels, 4 latent channels of a quarter
# of the size, as many text attentions as make K.
_PIXEL_CONTEXT = "prompt_embeds[batch, tokens, 64] -> text_kv[batch, tokens, 512], cond_emb[batch, {emb}]"
_SR_CONTEXT = (
    "prompt_embeds[batch, tokens, 64], noise_level:float32[batch] -> text_kv[batch, tokens, 512], cond_emb[batch, 64]"
)
_STEP = (
    "sample[{shape}], timestep:float32[batch], text_kv[batch, tokens, 512], cond_emb[batch, {emb}] -> "
    "noise_pred[{noise}], deep[{deep}]"
)
_SHALLOW = "sample[{shape}], timestep:float32[batch], deep[{deep}], cond_emb[batch, {emb}] -> noise_pred[{noise}]"


def _pixels(channels: int) -> str:
    return f"batch, {channels}, frames, height, width"


_KEYFRAMES = {"shape": _pixels(3), "noise": _pixels(3), "deep": _pixels(64), "emb": 128}
_INTERP = {**_KEYFRAMES, "shape": _pixels(7)}
_SR = {"shape": _pixels(6), "noise": _pixels(3), "deep": _pixels(32), "emb": 64}
_IF2 = {**_SR, "noise": f"{_pixels(3)}], variance_frac[{_pixels(3)}"}
CONTRACT = {
    "t5/encode": "input_ids:int64[batch, tokens], attention_mask:int64[batch, tokens] -> "
    "prompt_embeds[batch, tokens, 64]",
    "base/context": _PIXEL_CONTEXT.format(emb=128),
    "base/step": _STEP.format(**_KEYFRAMES),
    "base/shallow": _SHALLOW.format(**_KEYFRAMES),
    "interp/context": _PIXEL_CONTEXT.format(emb=128),
    "interp/step": _STEP.format(**_INTERP),
    "interp/shallow": _SHALLOW.format(**_INTERP),
    "if2/context": _SR_CONTEXT,
    "if2/step": _STEP.format(**_IF2),
    "if2/shallow": _SHALLOW.format(**_IF2),
    "sr1/context": _SR_CONTEXT,
    "sr1/step": _STEP.format(**_SR),
    "sr1/shallow": _SHALLOW.format(**_SR),
    "clip/encode": "input_ids:int64[batch, tokens] -> prompt_embeds[batch, tokens, 32]",
    "sr2/context": "prompt_embeds[batch, tokens, 32] -> text_kv[batch, tokens, 320]",
    "sr2/step": f"sample[{_pixels(4)}], timestep:float32[batch], text_kv[batch, tokens, 320] -> "
    f"noise_pred[{_pixels(4)}], deep[{_pixels(64)}]",
    "sr2/shallow": f"sample[{_pixels(4)}], timestep:float32[batch], deep[{_pixels(64)}], "
    f"text_kv[batch, tokens, 320] -> noise_pred[{_pixels(4)}]",  # its finest level attends to the text
    "vae_encoder/encode": "image[frames, 3, height, width] -> mean[frames, 4, height/4, width/4], "
    "logvar[frames, 4, height/4, width/4]",
    "vae_decoder/decode": "latents[frames, 4, height, width] -> image[frames, 3, height*4, width*4]",
}


def signature(inputs: list[Binding], outputs: list[Binding], usual: str = "float32") -> str:
    """`name:dtype[axes], ... -> ...`, without the dtype where it is the bundle's. Two inputs are float32 in all."""

    def show(binding: Binding) -> str:
        scalar = binding.name in ("timestep", "noise_level")
        dtype = "" if binding.dtype == usual and not scalar else f":{binding.dtype}"
        return f"{binding.name}{dtype}[{', '.join(map(str, binding.axes))}]"

    return " -> ".join(", ".join(map(show, bindings)) for bindings in (inputs, outputs))


def onnx_bindings(values: Any) -> list[Binding]:
    return [
        Binding(
            value.name,
            str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
            tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
        )
        for value in values
    ]


def graphs_of(bundle: Path) -> Iterator[tuple[str, Any, Path]]:
    """("base/step", its entry in the manifest, its plan) of all graphs."""
    opened = Bundle.open(bundle)
    for engine in opened.manifest.engines.values():
        for name, graph in engine.graphs.items():
            yield f"{engine.name}/{name}", graph, opened.path(graph.plan)


def test_manifest_and_plans_have_the_bindings_of_the_contract(bundle: Path) -> None:
    in_manifest, in_plans = {}, {}
    for name, graph, plan in graphs_of(bundle):
        in_manifest[name] = signature(graph.spec.inputs, graph.spec.outputs)
        model = onnx.load(plan, load_external_data=False)
        in_plans[name] = signature(onnx_bindings(model.graph.input), onnx_bindings(model.graph.output))
    assert in_manifest == CONTRACT
    assert in_plans == CONTRACT


# As in docs/engines.md, but for the smallest sizes: the golden models halve fewer times, and their latents are larger.
PROFILES = {
    "base/step": {"batch": "1 2 16", "frames": "1 8 64", "height": "2 40 1024", "width": "2 64 1024"},
    "interp/step": {"batch": "1 14 32", "frames": "2 5 32", "height": "2 40 1024", "width": "2 64 1024"},
    "if2/step": {"batch": "1 2 4", "frames": "1 1 8", "height": "4 160 1024", "width": "4 256 1024"},
    "sr1/step": {"batch": "1 2 4", "frames": "1 8 32", "height": "4 160 1024", "width": "4 256 1024"},
    "sr2/step": {"batch": "1 2 4", "frames": "1 29 256", "height": "2 80 1024", "width": "2 144 1024"},
    "vae_encoder/encode": {"frames": "1 1 32", "height": "4 320 1280", "width": "4 576 2304"},
    "vae_decoder/decode": {"frames": "1 1 32", "height": "1 80 1024", "width": "1 144 1024"},
}


def test_profiles_hold_every_axis_of_the_inputs_with_the_ranges_of_the_contract(bundle: Path) -> None:
    profiles = {}
    for name, graph, _ in graphs_of(bundle):
        axes = {axis for binding in graph.spec.inputs for axis in binding.axes if isinstance(axis, str)}
        assert axes == set(graph.spec.profile), name
        ranges = {axis: f"{n.min} {n.opt} {n.max}" for axis, n in graph.spec.profile.items()}
        if "tokens" in ranges:
            assert ranges.pop("tokens") == ("1 77 77" if name == "clip/encode" else "1 77 512"), name
        if name in PROFILES:
            profiles[name] = ranges
        elif name.endswith("/shallow"):
            assert ranges == PROFILES[name.replace("shallow", "step")]
        else:
            assert ranges == {"batch": "1 2 8"}, name
    assert profiles == PROFILES


def test_every_graph_was_compared_with_torch_at_two_batch_sizes_and_frame_counts(bundle: Path) -> None:
    for name, graph, _ in graphs_of(bundle):
        assert len(graph.parity) == 2, name
        assert all(row["max_error"] <= row["tolerance"] for row in graph.parity), name
        for axis in {"batch", "frames"} & set(graph.spec.profile):
            assert len({row[axis] for row in graph.parity}) == 2, (name, axis)


def test_a_bundle_tells_nothing_of_the_machine_it_was_built_on(bundle: Path) -> None:
    telling = [
        str(ROOT),
        *([home] if len(home := str(Path.home())) > 1 else []),
        sys.prefix,
        tempfile.gettempdir(),
        "site-packages",
        "/home/",
        ".py",
    ]
    texts = [bundle / "manifest.json", *(bundle / "tokenizers").iterdir(), *bundle.glob("engines/*/*.onnx")]
    assert len(texts) == 1 + 2 + len(CONTRACT)
    found = [(path.name, word) for path in texts for word in telling if word.encode() in path.read_bytes()]
    assert not found


def test_a_manifest_comes_back_from_json_as_it_was(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    assert Manifest.from_json(manifest.to_json(), "manifest") == manifest
    assert manifest.schedulers["sr2"]["lambda_min_clipped"] == -np.inf  # JSON proper has no such number


@HALF
def test_fp16_engines_have_half_precision_bindings_and_compute_the_same(golden: Path, tmp_path: Path) -> None:
    source = Source.find(CATALOG["clip"], golden / "models", "fp16")
    entry = build_engine(Job(source, "fp16", (576, 320)), tmp_path)
    model = onnx.load(tmp_path / "encode.onnx", load_external_data=False)
    expected = "input_ids:int64[batch, tokens] -> prompt_embeds[batch, tokens, 32]"
    assert signature(onnx_bindings(model.graph.input), onnx_bindings(model.graph.output), "float16") == expected
    spec = entry.graphs["encode"].spec
    assert signature(spec.inputs, spec.outputs, "float16") == expected

    data = np.load(golden / "pipe_sr2.npz")
    engine = Engine(Bundle(tmp_path, Manifest()), entry)
    actual = engine.run("encode", input_ids=data["clip_input_ids"])["prompt_embeds"]
    engine.close()
    assert actual.dtype == np.float32
    error = np.abs(actual - data["clip_embeds"]).max() / np.abs(data["clip_embeds"]).max()
    assert 1e-6 < error < 3e-2  # half precision, and not single in disguise


# Bundles that cannot be opened, and `export check`


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "is not a bundle's manifest"),
        (None, r"no manifest\.json there, so it is not a bundle\. Make one with `python -m export build"),
        (b"{", r"is not a bundle's manifest \(JSONDecodeError: .*Build the bundle again"),
        (b"[]", r"is not a bundle's manifest \(TypeError"),
        (b'{"format": 3}', r"is not a bundle's manifest \(KeyError: 'size'\)"),
        (b"[" * 100_000, r"is not a bundle's manifest \(RecursionError"),
        (b'{"format": 99}', r"manifest format 99, this version reads 3\. Build the bundle again"),
    ],
)
def test_a_bundle_that_cannot_be_opened_says_why(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=message):
        Bundle.open(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"multiple": 1', '"multiple": 0', "ZeroDivisionError"),
        ('"name": "clip"', '"name": "clap"', "the engine clip is called 'clap'"),
        ('"source": {', '"source": null, "properties": {', "TypeError"),
        ('"path": "tokenizers/t5.json"', '"path": 5', "TypeError"),
        ('"path": "tokenizers/t5.json"', '"path": "../t5.json"', r"\.\./t5\.json lies outside of the bundle"),
        ('"path": "tokenizers/t5.json"', '"path": "/etc/hostname"', "hostname lies outside of the bundle"),
        ('"path": "tokenizers/t5.json"', '"path": "C:t5.json"', "C:t5.json lies outside of the bundle"),
    ],
)
def test_a_manifest_with_impossible_values_is_none(bundle: Path, old: str, new: str, message: str) -> None:
    text = (bundle / "manifest.json").read_text(encoding="utf-8")
    assert old in text
    with pytest.raises(BundleError, match=f"is not a bundle's manifest .*{message}"):
        Manifest.from_json(text.replace(old, new, 1), "manifest.json")


def test_what_a_manifest_says_is_quoted_in_a_command(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    entry = replace(opened.engine("clip"), targets=("sm89",), backend="tensorrt-rtx", source={"attention": "`touch x`"})
    edited = Bundle(bundle, replace(opened.manifest, engines={"clip": entry}))
    assert "--target sm89 --attention '`touch x`' --size" in edited.rebuild_command("clip")
    entry = replace(entry, backend_version="1'; touch x; '")
    said = tensorrt.version_mismatch(edited, entry)
    assert said is not None and shlex.quote("tensorrt-rtx==1'; touch x; '") in said


def test_engines_of_one_backend_are_not_asked_for_in_anothers_int8(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    clip = opened.engine("clip")
    engines = {
        **opened.manifest.engines,
        "t5": replace(opened.engine("t5"), precision="int8"),
        "clip": replace(clip, source={**clip.source, "calibration": "of int8"}),
        "base": replace(opened.engine("base"), backend="inductor", precision="fp16"),
    }
    mixed = Bundle(bundle, replace(opened.manifest, engines=engines))
    assert "--engine inductor --precision fp16" in mixed.rebuild_command("base")
    assert "--engine onnxruntime --precision int8" in mixed.rebuild_command("t5")
    assert "--engine onnxruntime --precision int8" in mixed.rebuild_command("clip"), "which int8 left as it was"
    assert "--engine onnxruntime --precision fp32" in mixed.rebuild_command("sr1"), "which was not asked for in int8"


def run_check(bundle: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str], str]:
    """Exit code, what was said of each engine, and the error line."""
    code = main(["check", str(bundle)])
    out, err = capsys.readouterr()
    return code, {line.split()[0]: line for line in out.splitlines() if "tokenizer" not in line}, err


def test_check_finds_a_whole_bundle_sound(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, err = run_check(bundle, capsys)
    assert code == 0 and not err
    assert list(lines) == list(CATALOG)
    assert all(line.endswith(" ok") for line in lines.values())


@pytest.mark.parametrize("which", [0, 1], ids=["plan", "weights"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: os.truncate(path, 100), "has 100 bytes, should have"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"), "has been changed: its SHA-256"),
    ],
    ids=["missing", "truncated", "changed"],
)
def test_check_names_the_damaged_file(
    out: Path, capsys: pytest.CaptureFixture[str], which: int, damage: Callable[[Path], None], message: str
) -> None:
    path = files_of(out, "clip")[which]
    damage(path)
    code, lines, err = run_check(out, capsys)
    assert code == 1
    assert f"{path.name} {message}" in lines["clip"]
    assert lines["t5"].endswith(" ok")
    assert lines["sr1"].endswith(" not built")
    assert err.startswith("error: 8 parts are unusable. Build again: `python -m export build")


@pytest.mark.parametrize(
    ("changes", "name", "messages"),
    [
        ({"schedulers": {}}, "sr1", [f"no scheduler for {name}. Build its stage" for name in ("sr1", "sr1.noising")]),
        ({"defaults": {"strength": 5}}, "settings", ["strength: 5; allowed: above 0, up to 1."]),
    ],
    ids=["schedulers", "settings"],
)
def test_check_finds_what_a_run_would_refuse(
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    name: str,
    messages: list[str],
) -> None:
    for folder in ("engines", "tokenizers"):
        (tmp_path / folder).symlink_to(bundle / folder)
    (tmp_path / "manifest.json").write_text(replace(Bundle.open(bundle).manifest, **changes).to_json())
    assert main(["check", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    (line,) = (line for line in out.splitlines() if line.startswith(f"{name} "))
    assert all(message in line for message in messages)
    assert "unusable. Build again: `python -m export build" in err


def test_a_file_that_may_not_be_read_is_one_line(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    opened = Bundle.open(bundle)
    (file,) = opened.engine("clip").files()[:1]
    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(BundleError, match=r"encode\.onnx cannot be read \(Permission denied\)"):
        opened.path(file)
    assert opened.damage(file) == f"{file.path} cannot be read (Permission denied)"


def test_check_of_no_bundle_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_check(tmp_path, capsys)
    assert code == 1
    assert err.startswith(f"error: {tmp_path}: no manifest.json there") and err.count("\n") == 1


def test_onnxruntime_gpu_is_onnx_runtime_too(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"onnxruntime-gpu": "1.32.0", "torch": "2.13.0"}
    monkeypatch.setattr("export.job.tensorrt.installed_version", installed.get)
    assert Backend().version == "1.32.0"


def test_files_that_cannot_be_read_are_the_checkpoints_and_a_folder_that_cannot_be_written_the_kernels(
    tmp_path: Path,
) -> None:
    with pytest.raises(CheckpointError, match=r"unet cannot be read"):
        file_hash([tmp_path / "unet"])
    (tmp_path / "file").touch()
    if not missing_programs(REFERENCE):
        with pytest.raises(EngineError, match=r"cannot be built: .*file cannot be written"):
            build_library(REFERENCE, tmp_path / "file" / "build")


def test_a_backend_is_read_back_from_what_it_built(golden: Path) -> None:
    source = Source.find(CATALOG["clip"], golden / "models", "fp16")
    for backend in (Backend("tensorrt-rtx", ("sm89",), "padded"), Backend("inductor", ("sm90",), autotune=False)):
        made_from = Job(source, "fp16", (576, 320), backend).made_from()
        entry = SimpleNamespace(backend=backend.name, targets=backend.targets, source=made_from)
        assert Backend.of(entry) == backend


def test_text_encoders_take_no_copies_in_a_session(golden: Path) -> None:
    copies = {}
    for name, precision in (("clip", "fp16"), ("clip", "fp32"), ("base", "fp16")):
        job = Job(Source.find(CATALOG[name], golden / "models", precision), precision, (576, 320))
        copies[name, precision] = round((job.memory - 1.5 * 2**30) / job.weight_bytes)
    assert copies == {("clip", "fp16"): 1, ("clip", "fp32"): 1, ("base", "fp16"): 4}


@pytest.mark.parametrize(("on_gpu", "asked", "built"), [(True, None, 1), (True, 2, 2), (False, None, None)])
def test_on_a_gpu_onnx_runtimes_engines_are_built_one_at_a_time_unless_asked(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    on_gpu: bool,
    asked: int | None,
    built: int | None,
) -> None:
    """They are compared there, and might not fit side by side."""
    noted: list[int | None] = []
    monkeypatch.setattr("export.build.build_all", lambda _bundle, _pending, jobs: noted.append(jobs))
    card = Gpu("H200", (9, 0), 2**37, (13, 0))
    monkeypatch.setattr("runtime.runner_ort.find_gpus", lambda: [card])
    monkeypatch.setattr("runtime.runner_ort.tries_cuda", lambda: on_gpu)
    build_text_encoders(checkpoint, tmp_path / "out", jobs=asked)
    assert noted == [built]


@pytest.mark.parametrize(("flavour", "built"), [("tensorrt", 1), (RTX, 2)])
def test_what_times_kernels_on_the_card_has_it_alone(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: str, built: int
) -> None:
    """TensorRT-RTX builds without a card."""
    noted: list[int | None] = []
    monkeypatch.setattr("export.build.build_all", lambda _bundle, _pending, jobs: noted.append(jobs))
    build_text_encoders(checkpoint, tmp_path / "out", jobs=2, backend=Backend(flavour, ("sm90",)))
    assert noted == [built]


def test_a_move_waits_for_what_looks_into_new_files_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, looks = os.replace, iter(range(2))

    def held_for_a_moment(source: Path, target: Path) -> None:
        if next(looks, None) is not None:
            raise PermissionError(errno.EACCES, "used by another process")
        rename(source, target)

    monkeypatch.setattr(store.os, "replace", held_for_a_moment)
    monkeypatch.setattr(store.sys, "platform", "linux")
    (tmp_path / "new").touch()
    with pytest.raises(PermissionError):
        store.move(tmp_path / "new", tmp_path / "here")
    monkeypatch.setattr(store.sys, "platform", "win32")
    store.move(tmp_path / "new", tmp_path / "here")
    assert (tmp_path / "here").exists()


def test_a_file_that_cannot_be_written_leaves_what_there_was_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "base.npy").write_bytes(b"before")
    monkeypatch.setattr("engines.store.move", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "base.npy", b"after")
    assert os.listdir(tmp_path) == ["base.npy"] and (tmp_path / "base.npy").read_bytes() == b"before"


# What is built, of what is asked for and of what is here


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--engine", RTX, "--target", "sm99"], "unknown target sm99; allowed: sm75, sm80", marks=WITH_RTX),
        pytest.param(["--engine", RTX, "--target", "sm75,sm86"], "Turing (sm75) alone", marks=WITH_RTX),
        pytest.param(
            ["--engine", RTX, "--target", "sm75", "--precision", "bf16"], "use --precision fp16", marks=WITH_RTX
        ),
        (["--target", "sm86"], "onnxruntime has no targets"),
        (["--no-autotune"], "--no-autotune is for inductor; this is for onnxruntime"),
        (["--attention", "padded"], "--keep-onnx and --attention are for TensorRT"),
        (["--jobs", "0"], "--jobs 0; allowed: 1 or more"),
        (["--precision", "bf16"], "use --precision fp16, or --engine tensorrt-rtx"),
    ],
)
def test_impossible_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["build", "--checkpoint", "demo", "--out", str(tmp_path / "b"), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    assert message in error
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("gpus", "installed", "expected"),
    [
        ([], {RTX}, "onnxruntime"),
        ([ADA], {RTX, "tensorrt"}, RTX),
        ([ADA], set(), "onnxruntime"),
        ([HOPPER], {RTX}, "onnxruntime"),
        ([HOPPER], {RTX, "tensorrt"}, "tensorrt"),
    ],
)
def test_auto_takes_tensorrt_where_a_card_and_a_flavour_are_there(
    monkeypatch: pytest.MonkeyPatch, gpus: list[Gpu], installed: set[str], expected: str
) -> None:
    monkeypatch.setattr(tensorrt, "find_gpus", lambda: gpus)
    monkeypatch.setattr(tensorrt, "installed_version", lambda flavour: "1.0" if flavour in installed else None)
    assert tensorrt.choose_backend()[0] == expected


def test_a_card_that_is_here_is_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "find_gpus", lambda: [TURING])
    assert tensorrt.check_targets(RTX, [], "fp16") == ("sm75",)
    with pytest.raises(SettingsError, match="use --precision fp16"):
        tensorrt.check_targets(RTX, [], "bf16")
    monkeypatch.setattr(tensorrt, "find_gpus", lambda: [ADA])
    assert tensorrt.check_targets(RTX, [], "fp16") == tensorrt.DEFAULT_TARGETS


def test_tensorrt_proper_wants_the_gpu_it_builds_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "find_gpus", list)
    with pytest.raises(SettingsError, match=r"there is none here\. Use tensorrt-rtx"):
        tensorrt.check_targets("tensorrt", [], "fp16")
    monkeypatch.setattr(tensorrt, "find_gpus", lambda: [HOPPER])
    assert tensorrt.check_targets("tensorrt", [], "fp16") == ("sm90",)
    with pytest.raises(SettingsError, match="leave --target out"):
        tensorrt.check_targets("tensorrt", ["sm80"], "fp16")
    monkeypatch.setattr(tensorrt, "find_gpus", lambda: [TURING])
    with pytest.raises(SettingsError, match="use --precision fp16"):
        tensorrt.check_targets("tensorrt", [], "bf16")


def test_builds_never_run_side_by_side_beyond_memory(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source.find(CATALOG["clip"], golden / "models", "fp16")
    jobs = [Job(source, "fp16", (576, 320)) for _ in range(3)]
    large, small = 8 * 2**30, 2 * 2**30
    needs = {id(jobs[0]): large, id(jobs[1]): large, id(jobs[2]): small}
    monkeypatch.setattr(Job, "memory", property(lambda job: needs[id(job)]))
    assert workers._next(jobs, [], 2, available=4 * 2**30) is jobs[0]  # alone, if too large: there is no better time
    assert workers._next(jobs[1:], jobs[:1], 2, available=12 * 2**30) is jobs[2]  # what fits beside it
    assert workers._next(jobs[1:2], jobs[:1], 2, available=12 * 2**30) is None
    assert workers._next(jobs[2:], jobs[:2], 2, available=64 * 2**30) is None  # two at once were asked for
