"""Engines of inductor, on the GPU if torch sees one, else on the CPU: packages compiled for real, our kernel inside
them, and the loop on their device.

The UNet is the smallest that has every kind of layer: one level, from the golden interpolation's config.
"""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from conftest import ROOT
from safetensors.torch import save_file
from test_schedulers import PUBLISHED

from engines.catalog import CATALOG
from engines.errors import BundleError, EngineError, ParityError, SettingsError
from engines.gpu import Gpu
from engines.store import Bundle
from export import networks
from export.__main__ import main
from export.build import build, why_stale
from export.job import Backend, Job, build_engine
from export.kernels import build_for, prepare_inductor
from export.modules.layers import GroupNorm
from export.modules.unet import UNetConfig, VideoUNet
from export.networks import Source
from export.parity import check_parity, package_sizes
from export.to_inductor import tuned_sizes
from export.verify import verify
from runtime import runner_inductor
from runtime.config import ALL_STEPS, Interval
from runtime.engine import INDUCTOR, Engine, EnginePool
from runtime.kernels import CUDA, REFERENCE, find_library, missing_programs
from runtime.noise import NoiseStream
from runtime.runner_inductor import InductorRunner, group_norm, plain_temporal_attention, temporal_attention
from runtime.sampler import denoise
from runtime.schedulers import SchedulerConfig, make_schedule
from runtime.stages.diffusion import PromptEmbeds, prompted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MISSING = missing_programs(CUDA if DEVICE == "cuda" else REFERENCE)

pytestmark = [pytest.mark.torch, pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")]

SIZE = (576, 320)


@pytest.fixture(scope="module")
def checkpoint(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpolation network cut down to one level, random weights."""
    home, small = golden / "models" / "interpolation", tmp_path_factory.mktemp("small")
    config = json.loads((home / "unet" / "config.json").read_text(encoding="utf-8")) | {
        "block_out_channels": [64],
        "down_block_types": ["SimpleCrossAttnDownBlock3D"],
        "up_block_types": ["SimpleCrossAttnUpBlock3D"],
    }
    torch.manual_seed(0)
    unet = VideoUNet(UNetConfig.from_dict(config, "config.json"))
    for parameter in unet.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    folder = small / "interpolation" / "unet"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(unet.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    shutil.copytree(home / "scheduler", small / "interpolation" / "scheduler")
    return small


def job(checkpoint: Path, precision: str, keep_variance: bool = False, name: str = "interp") -> Job:
    source = Source.find(CATALOG[name], checkpoint, precision)
    # Timing candidates would take a GPU minutes; on a CPU there are none.
    return Job(source, precision, SIZE, Backend.choose(INDUCTOR, precision, autotune=DEVICE == "cpu"), keep_variance)


@pytest.fixture(scope="module")
def library() -> Path:
    """The kernels, for operator and loop."""
    return prepare_inductor(DEVICE)


Build = tuple[Future[None], Path]  # a bundle's, and its folder


def built(checkpoint: Path, out: Path, precision: str) -> None:
    """A bundle of the small network; in float32 with the variance that its scheduler does not read."""
    torch.set_num_threads(1)  # as those of the exporter's processes, of which each has its share
    with Bundle.writer(out) as bundle, bundle.scratch() as scratch:
        folder = scratch / "interp"
        folder.mkdir()
        bundle.install(folder, build_engine(job(checkpoint, precision, precision == "fp32"), folder))


@pytest.fixture(scope="module")
def builds(library: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Build]:
    """By precision, both built at once: tracing and lowering keep a single core busy."""
    folders = {precision: tmp_path_factory.mktemp(precision) / "bundle" for precision in ("fp32", "fp16")}
    with ProcessPoolExecutor(len(folders), mp_context=get_context("spawn")) as pool:
        return {name: (pool.submit(built, checkpoint, folder, name), folder) for name, folder in folders.items()}


def opened(build: Build) -> Bundle:
    """Raises what its build has: that of one precision is none of the other's."""
    done, folder = build
    done.result()
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def float32(builds: dict[str, Build]) -> Bundle:
    return opened(builds["fp32"])


@pytest.fixture(scope="module")
def float16(builds: dict[str, Build]) -> Bundle:
    return opened(builds["fp16"])


@pytest.fixture(scope="module")
def engine(float32: Bundle) -> Iterator[Engine]:
    with EnginePool(float32) as pool, pool.use("interp") as engine:
        yield engine


# ---- Packages


@pytest.mark.parametrize("bundle_of", ["float32", "float16"])
def test_a_package_was_compared_at_every_batch_before_it_was_installed(
    bundle_of: str, request: pytest.FixtureRequest
) -> None:
    entry = request.getfixturevalue(bundle_of).engine("interp")
    rows = entry.graphs["step"].parity
    assert {(row["batch"], row["frames"]) for row in rows} == {(b, f) for b in (1, 2, 14) for f in (2, 5)}
    assert all(row["max_error"] <= row["tolerance"] for row in rows)
    assert entry.targets == (runner_inductor.target(),) and entry.backend_version == runner_inductor.torch_version()


@pytest.mark.skipif(DEVICE != "cpu" or sys.platform == "win32", reason="of code for the CPU; MSVC names it otherwise")
def test_packages_run_with_more_threads_than_they_were_built_with(float32: Bundle) -> None:
    with zipfile.ZipFile(float32.path(float32.engine("interp").graphs["step"].plan)) as package:
        library = b"".join(package.read(file) for file in package.namelist() if file.endswith(".so"))
    assert b"GOMP_parallel" in library or b"__kmpc_fork_call" in library, "g++'s or clang's"


def test_half_precision_attends_over_frames_and_normalises_with_our_kernels_and_float32_without(
    checkpoint: Path, float32: Bundle, float16: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calls(bundle: Bundle) -> Counter[str]:
        count: Counter[str] = Counter()
        kernels_of = runner_inductor._kernels

        class Counting:
            def temporal_attention(self, *arguments: Any, **sizes: Any) -> None:
                count["attention"] += 1
                kernels_of(DEVICE).temporal_attention(*arguments, **sizes)

            def group_norm(self, *arguments: Any) -> None:
                count["norm"] += 1
                kernels_of(DEVICE).group_norm(*arguments)

        with monkeypatch.context() as patch, EnginePool(bundle) as pool, pool.use("interp") as engine:
            patch.setattr(runner_inductor, "_kernels", lambda device: Counting())
            run_step(engine, batch=1)
        return count

    config = json.loads((checkpoint / "interpolation/unet/config.json").read_text(encoding="utf-8"))
    layers = dict(VideoUNet(UNetConfig.from_dict(config, "test")).named_modules())
    norms = [name for name, layer in layers.items() if isinstance(layer, GroupNorm)]
    assert not calls(float32)
    # Two in each transformer: one on the way down, one in the middle, two on the way up.
    assert calls(float16) == {"attention": 2 * 4, "norm": len(norms)}


def run_step(engine: Engine, batch: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    text = random.standard_normal((batch, 7, engine.properties["text_dim"]), np.float32)
    sample = random.standard_normal((batch, 7, 3, 2, 4), np.float32)
    context = engine.run("context", prompt_embeds=text)
    return engine.run("step", sample=sample, timestep=np.full(batch, 500), **context)


def test_what_is_wrong_at_one_batch_size_alone_is_not_installed(golden: Path) -> None:
    (graph,) = networks.load(Source.find(CATALOG["clip"], golden / "models", "fp32"), "fp32", SIZE).graphs

    class WrongAlone:
        def infer(self, feeds: dict[str, Any]) -> dict[str, Any]:
            with torch.no_grad():
                embeds = graph.module(torch.from_numpy(feeds["input_ids"])).numpy()
            return {"prompt_embeds": embeds + (len(embeds) == 1)}

        def close(self) -> None:
            pass

    with pytest.raises(ParityError, match=r"clip/encode: .* differs .* by 1 .*'batch': 1.* It was not installed"):
        check_parity(graph, "clip", WrongAlone(), "fp32", package_sizes(graph.spec))


@pytest.mark.parametrize("name", ["t5", "base", "interp", "if2", "sr1", "clip", "sr2", "vae_encoder", "vae_decoder"])
def test_sizes_to_trace_and_to_compare_at_suit_every_network(golden: Path, name: str) -> None:
    for graph in networks.load(Source.find(CATALOG[name], golden / "models", "fp32"), "fp32", SIZE).graphs:
        profile = graph.spec.profile
        traced = tuned_sizes(graph.spec)
        assert len(set(traced.values())) == len(traced) and 1 not in traced.values()
        assert all(size in profile[axis] for axis, size in traced.items())
        batch = "batch" if "batch" in profile else "frames"
        rows = package_sizes(graph.spec)
        assert {row[batch] for row in rows} == {1, 2, min(14, profile[batch].max)}
        assert all(row[axis] in profile[axis] for row in rows for axis in row)
        if {"batch", "frames"} <= profile.keys():
            assert len({row["frames"] for row in rows}) == 2


@pytest.fixture
def static_cpp_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that does as one which finds no other. Where there is no g++, torch's own choice."""
    if not (plain := shutil.which("g++")):
        return
    compiler = tmp_path / "bin" / "g++"
    compiler.parent.mkdir()
    compiler.write_text(f"""#!/bin/sh
case " $* " in *" -shared "*) set -- -static-libstdc++ "$@";; esac
exec {plain} "$@"
""")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))


@pytest.mark.usefixtures("static_cpp_library")
def test_an_encoder_is_built_listed_checked_and_found_up_to_date(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    command = ["build", "--stage", "text", "--checkpoint", str(golden / "models"), "--out", str(out)]
    for said in ("t5: not built yet", "t5: up to date"):
        assert main([*command, "--engine", "inductor"]) == 0
        assert said in capsys.readouterr().err
    assert main(["list", str(out)]) == 0
    assert f"| t5 | inductor {runner_inductor.torch_version()} | fp32 |" in capsys.readouterr().out
    assert main(["check", str(out)]) == 1  # the other stages are not there
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("t5 "))
    assert line.split()[1] == "inductor" and line.endswith(" ok")
    bundle = Bundle.open(out)
    encode = bundle.engine("t5").graphs["encode"]
    assert {row["batch"] for row in encode.parity} == {1, 2, 8}
    # In a process of its own: what other libraries bring along may be what makes it load here.
    load = "import pathlib, sys; from runtime.runner_inductor import *; InductorRunner(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", load, bundle.path(encode.plan)], cwd=ROOT, check=True)

    reference = tmp_path / "reference"
    reference.mkdir()
    for file in ("meta.json", "text_t5.npz"):
        shutil.copyfile(golden / file, reference / file)
    assert all(row.ok for row in verify(bundle, reference))


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("target", lambda: "sm53", "targets"),
        ("torch_version", lambda: "9.9", "backend version"),
        ("ABI", -1, "kernels"),
    ],
    ids=["machine", "torch", "kernels"],
)
def test_another_machine_torch_or_kernels_make_an_engine_stale(
    float32: Bundle, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, key: str
) -> None:
    current = job(checkpoint, "fp32")
    assert why_stale(float32, current) is None
    monkeypatch.setattr(f"export.job.{name}", value)
    assert why_stale(float32, job(checkpoint, "fp32")) == f"changed: {key}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("sm53",)}, r"interp: built for sm53, this machine is (cpu-|sm).*--engine inductor"),
        ({"targets": ("cpu-riscv64",)}, r"interp: built for cpu-riscv64, this machine is (cpu-|sm)"),
        (
            {"backend_version": "2.12.0"},
            r"interp: built by torch 2\.12\.0, .* is installed: `pip install torch==2\.12",
        ),
    ],
    ids=["GPU", "processor", "torch"],
)
def test_packages_for_another_machine_are_refused_before_they_are_opened(
    float32: Bundle, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        Engine(float32, replace(float32.engine("interp"), **changes))


def test_packages_for_the_processor_run_on_a_machine_with_a_card_too(
    float32: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_inductor, "target", lambda: "sm89")
    targets = (f"cpu-{runner_inductor.cpu_level()}",)
    entry = replace(float32.engine("interp"), name="vae_decoder", graphs={}, targets=targets)  # which needs no kernels
    assert runner_inductor.why_unusable(float32, entry) is None


def test_too_small_a_card_for_a_build_is_one_line_with_what_to_do(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("Failed to run autotuning code block: CUDA out of memory. Tried")  # as torch wraps it

    monkeypatch.setattr("export.to_inductor._on", full)
    on_card = replace(job(checkpoint, "fp32"), backend=Backend(INDUCTOR, ("sm89",)))
    with pytest.raises(EngineError, match=r"inductor could not build .*CUDA out of memory.*--jobs 1"):
        build_engine(on_card, tmp_path)


@pytest.mark.parametrize("content", [b"", b"no archive", None], ids=["empty", "not an archive", "missing"])
def test_a_package_that_cannot_be_loaded_is_named_with_what_to_do(tmp_path: Path, content: bytes | None) -> None:
    package = tmp_path / "step.pt2"
    if content is not None:
        package.write_bytes(content)
    with pytest.raises(BundleError, match=r"step\.pt2: torch \d.* cannot load it"):
        InductorRunner(package)


def test_loading_a_package_compiles_nothing(float32: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch asks what the processor can do in that way, which takes seconds and, on another machine, a compiler."""
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.pick_vec_isa", lambda: pytest.fail("asked"))
    InductorRunner(float32.path(float32.engine("interp").graphs["context"].plan)).close()


def test_a_package_that_was_closed_leaves_neither_files_nor_the_weights_disk(
    float32: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch never unmaps a library: weights in it would hold its disk until the process ends."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    plan = float32.path(float32.engine("interp").graphs["step"].plan)
    with zipfile.ZipFile(plan) as package:
        library = next(file.file_size for file in package.infolist() if file.filename.endswith(".so"))
    assert library < plan.stat().st_size / 2
    runner = InductorRunner(plan)
    assert [*tmp_path.rglob("*.so")]
    runner.close()
    assert not [*tmp_path.iterdir()]
    (tmp_path / "broken.pt2").write_bytes(plan.read_bytes()[: plan.stat().st_size // 2])
    with pytest.raises(BundleError, match=r"broken\.pt2: torch .* cannot load it"):
        InductorRunner(tmp_path / "broken.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.pt2"]


def test_a_package_that_is_too_large_for_its_device_is_told_as_such(
    float32: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("create_func_( &container_handle_ ) API call failed")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", fail)
    plan = float32.path(float32.engine("interp").graphs["step"].plan)
    with pytest.raises(BundleError, match=r"step\.pt2: torch .* cannot load it \(create_func_"):
        InductorRunner(plan)
    monkeypatch.setattr(runner_inductor, "available_memory", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_card = {"cpu": 2**60, "cuda": 0}[DEVICE]  # a package for the processor does not lie on a card that is there, too
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (on_card, 0))
    with pytest.raises(EngineError, match=r"step\.pt2: too little memory to load it \(create_func_.*Close what else"):
        InductorRunner(plan)
    assert not [*tmp_path.iterdir()]
    for_a_card = tmp_path / "step.pt2"
    shutil.copyfile(plan, for_a_card)
    with zipfile.ZipFile(for_a_card, "a") as package:
        package.writestr("model/kernel.cubin", b"")
    monkeypatch.setattr(runner_inductor, "available_memory", lambda: 2**60)
    for free, error in ((lambda: (0, 0), EngineError), (lambda: (2**60, 0), BundleError), (fail, BundleError)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", free)
        with pytest.raises(error):
            InductorRunner(for_a_card)
    damaged = bytearray(plan.read_bytes())
    damaged[damaged.rindex(b"PK\1\2")] ^= 1
    for_a_card.write_bytes(damaged)
    with pytest.raises(BundleError, match=r"cannot load it \(create_func_"):
        InductorRunner(for_a_card)


def test_packages_that_two_threads_load_are_unpacked_each_in_its_folder(
    float32: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> None:
        before = os.environ["TMPDIR"]
        time.sleep(0.05)
        folders.append(before)
        raise RuntimeError("the same" if os.environ["TMPDIR"] == before else "another")

    folders: list[str] = []
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", load)
    monkeypatch.delenv("TMPDIR", raising=False)
    plan = float32.path(float32.engine("interp").graphs["step"].plan)
    with ThreadPoolExecutor(3) as threads:
        errors = [load.exception() for load in [threads.submit(InductorRunner, plan) for _ in range(3)]]
    assert all("cannot load it (the same)" in str(error) for error in errors), errors
    assert len(set(folders)) == 3 and "TMPDIR" not in os.environ


def test_a_disk_without_room_to_unpack_a_package_is_told_before(
    float32: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(
        EngineError, match=r"context\.pt2: to load it 0\.\d+ GB are needed in .*, 1e-06 GB are free.* TMPDIR"
    ):
        Engine(float32, float32.engine("interp"))


def test_engines_without_autotuning_are_built_again_without_it(
    float32: Bundle, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = job(checkpoint, "fp32")
    changed = replace(plain, backend=replace(plain.backend, autotune=not plain.backend.autotune))
    assert why_stale(float32, changed) == "changed: autotune"
    entry = replace(float32.engine("interp"), source=changed.made_from())
    other = Bundle(float32.root, replace(float32.manifest, engines={"interp": entry}))
    tuned, untuned = (float32, other) if plain.backend.autotune else (other, float32)
    assert "--no-autotune" in untuned.rebuild_command("interp")
    assert "--no-autotune" not in tuned.rebuild_command("interp")
    # On a CPU nothing is timed; on Turing nothing of use is to be had.
    for target, asked, autotune in (
        ("sm90", False, False),
        ("sm90", True, True),
        ("cpu-x86-64-v3", False, True),
        ("sm75", True, False),
    ):
        monkeypatch.setattr("export.job.target", lambda target=target: target)
        assert Backend.choose(INDUCTOR, "fp16", autotune=asked).autotune == autotune
    with pytest.raises(SettingsError, match=r"Turing \(sm75\) does not compute in bf16"):
        Backend.choose(INDUCTOR, "bf16")


@pytest.mark.parametrize(
    ("driver", "cuda", "message"),
    [
        (
            (12, 8),
            "13.0",
            r"the driver is for CUDA 12\.8, torch's CUDA build needs 13\.0: install a newer NVIDIA driver",
        ),
        ((13, 0), None, r"torch here leaves the GPU idle: install its CUDA build"),
    ],
)
def test_a_card_that_torch_leaves_idle_is_told_before_a_build_and_a_run(
    float32: Bundle,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    driver: tuple[int, int],
    cuda: str | None,
    message: str,
) -> None:
    card = Gpu("GeForce RTX 4070", (8, 9), 12 * 2**30, driver)
    monkeypatch.setattr("export.job.find_gpus", lambda: [card])
    monkeypatch.setattr(runner_inductor, "find_gpus", lambda: [card])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert Backend.choose(INDUCTOR, "fp16").targets[0].startswith("cpu-")
    assert re.search(f"warning: {message}.*Building for the CPU", capsys.readouterr().err)
    with pytest.raises(BundleError, match=f"interp: {message}"):
        Engine(float32, replace(float32.engine("interp"), targets=("sm89",)))


@pytest.mark.parametrize(
    ("mib", "autotune", "asked", "built"),  # as 8, 12, 24 and 80 GB cards have them
    [
        (8188, False, None, 1),
        (12282, False, None, 1),
        (24564, False, None, 2),
        (12282, False, 3, 3),
        (81559, True, 3, 1),
    ],
)
def test_engines_are_built_side_by_side_as_the_card_has_room(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mib: int,
    autotune: bool,
    asked: int | None,
    built: int,
) -> None:
    noted: list[int | None] = []
    monkeypatch.setattr("export.build.build_all", lambda _bundle, _pending, jobs: noted.append(jobs))
    monkeypatch.setattr("export.build.kernels.prepare_inductor", lambda _: None)
    monkeypatch.setattr("export.build.find_gpus", lambda: [Gpu("a card", (8, 9), mib * 2**20, (13, 0))])
    backend = Backend(INDUCTOR, ("sm89",), autotune=autotune)
    build(checkpoint, tmp_path / "out", ["interp"], "fp16", SIZE, jobs=asked, backend=backend)
    assert noted == [built]


def test_settings_that_mean_nothing_to_inductor_are_refused(
    tmp_path: Path, golden: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SettingsError, match=r"--target sm89: inductor compiles for this machine"):
        Backend.choose(INDUCTOR, "fp16", ["sm89"])
    command = ["build", "--checkpoint", str(golden / "models"), "--out", str(tmp_path / "out"), "--engine", "inductor"]
    assert main([*command, "--keep-onnx"]) == 1
    assert "for TensorRT; this is for inductor" in capsys.readouterr().err


# ---- Attention over frames


def some_heads(dtype: torch.dtype, packed: bool, shape: tuple[int, int, int, int, int]) -> list[torch.Tensor]:
    """q, k and v [B, F, P, heads * d]: parts of one tensor, or of pixels-first ones."""
    batch, frames, pixels, heads, head_dim = shape
    torch.manual_seed(0)
    if packed:
        return list(torch.randn(batch, frames, pixels, 3 * heads * head_dim).to(DEVICE, dtype).chunk(3, dim=-1))
    return [torch.randn(batch, pixels, frames, heads * head_dim).to(DEVICE, dtype).transpose(1, 2) for _ in range(3)]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "pixels first"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 6, 4, 10), (1, 1, 1, 1, 1), (1, 29, 2, 2, 64), (1, 65, 2, 2, 8)], ids=str)
@pytest.mark.usefixtures("library")
def test_the_operator_reads_heads_where_projections_left_them(
    dtype: torch.dtype, packed: bool, shape: tuple[int, int, int, int, int]
) -> None:
    q, k, v = some_heads(dtype, packed, shape)
    exact = plain_temporal_attention(q.double(), k.double(), v.double(), shape[3])
    out = temporal_attention(q, k, v, shape[3])
    assert out.is_contiguous() and out.dtype == dtype and out.shape == q.shape
    eps = torch.finfo(dtype).eps
    # The reference rounds its result alone; the CUDA kernel, and beyond 64 frames plain arithmetic, the weights too.
    rtol, atol = (0.51 * eps, 1e-7) if DEVICE == "cpu" and shape[1] <= 64 else (0, 4 * eps)
    torch.testing.assert_close(out.double(), exact, rtol=rtol, atol=atol)


@pytest.mark.usefixtures("library")
def test_the_operator_is_what_torch_expects_of_one() -> None:
    q, k, v = some_heads(torch.float16, packed=True, shape=(1, 3, 4, 2, 8))
    torch.library.opcheck(temporal_attention, (q, k, v, 2), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.usefixtures("library")
def test_channels_apart_are_refused() -> None:
    wrong = torch.zeros(1, 2, 8, 3, dtype=torch.float16, device=DEVICE).transpose(2, 3)
    with pytest.raises(EngineError, match="channels 3 elements apart"):
        temporal_attention(wrong, wrong, wrong, 2)


# ---- Group normalisation


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows_of_add", [None, 1, 2], ids=str)
@pytest.mark.parametrize("modulated", [False, True], ids=["plain", "modulated"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.usefixtures("library")
def test_the_norm_does_what_stands_around_it(
    dtype: torch.dtype, rows_of_add: int | None, modulated: bool, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(DEVICE, dtype)

    x, weight, bias = draw(6, 16, 2, 5).to(memory_format=layout), draw(16), draw(16)  # three frames of two clips
    add = draw(rows_of_add, 16) if rows_of_add else None
    modulation = draw(2, 2 * 16).chunk(2, dim=1) if modulated else (None, None)  # rows 32 elements apart
    exact = x.double()
    if add is not None:
        exact = exact + add.double().repeat_interleave(6 // len(add), 0)[..., None, None]
    exact = torch.nn.functional.group_norm(exact, 4, weight.double(), bias.double(), 1e-5)
    if modulated:
        scale, shift = (part.double().repeat_interleave(3, 0)[..., None, None] for part in modulation)
        exact = exact * (1 + scale) + shift
    out = group_norm(x, weight, bias, 4, 1e-5, "silu", 1, add, *modulation)
    assert out.is_contiguous(memory_format=torch.channels_last) and out.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), torch.nn.functional.silu(exact), rtol=eps, atol=1e-5)


@pytest.mark.usefixtures("library")
def test_a_norm_over_the_frames_of_clips_is_one_over_clips() -> None:
    torch.manual_seed(0)
    x, row = torch.randn(6, 8, 2, 3, device=DEVICE).half(), torch.randn(8, device=DEVICE).half()
    clips = x.unflatten(0, (2, 3)).transpose(1, 2).flatten(3)  # [B, C, F, H*W]
    exact = torch.nn.functional.group_norm(clips.double(), 2, row.double(), row.double(), 1e-5)
    out = group_norm(x, row, row, 2, 1e-5, "none", 3, None, None, None)
    assert out.shape == x.shape
    torch.testing.assert_close(out.double(), exact.transpose(1, 2).reshape(x.shape), rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("library")
def test_the_norm_is_what_torch_expects_of_an_operator() -> None:
    x, row = torch.randn(2, 8, 3, 2, device=DEVICE).half(), torch.randn(8, device=DEVICE).half()
    for rest in ((1, None, None, None), (2, row[None], row[None], row[None])):
        arguments = (x, row, row, 2, 1e-5, "gelu", *rest)
        torch.library.opcheck(group_norm, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.usefixtures("library")
def test_rows_that_a_norm_cannot_read_are_refused() -> None:
    x, row = torch.randn(4, 8, 3, device=DEVICE).half(), torch.randn(8, device=DEVICE).half()
    rows, apart = torch.zeros(4, 16, device=DEVICE).half(), torch.zeros(8, 2, device=DEVICE).half().T
    half, other = rows[:, :8], rows[:, 8:]
    wrong: dict[str, tuple[torch.Tensor, int, Any, Any, Any]] = {
        "channels 2 elements apart": (row, 1, apart, None, None),
        "scale and shift lie in memory in different ways": (row, 1, None, half, other.contiguous()),
        "4 rows of 3 frames": (row, 3, None, None, None),
        r"8 channels and {'add': \(4, 4\)} do not fit": (row, 1, half[:, :4], None, None),
        "8 channels and {} do not fit": (row[:4], 1, None, None, None),
        r"'add': \(3, 8\).* do not fit together": (row, 1, half[:3], None, None),
        r"'scale': \(2, 8\).* do not fit together": (row, 1, half, half[:2], other[:2]),
        "tensors of different types": (row.float(), 1, None, None, None),
        r"kernels/include/show1/group_norm\.h": (row, 1, None, half, None),
    }
    for message, (weight, frames, *around) in wrong.items():
        with pytest.raises(EngineError, match=message):
            group_norm(x, weight, row, 2, 1e-5, "none", frames, *around)


def test_attention_over_frames_asks_for_tensors_of_one_kind() -> None:
    q = torch.zeros(1, 4, 3, 16, device=DEVICE).half()
    for k in (q[:, :2], q.float()):
        with pytest.raises(EngineError, match="q, k and v are of different shapes or types"):
            temporal_attention(q, k, q, 2)


def test_attention_over_more_values_than_the_kernel_counts_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_inductor, "_kernels", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr(runner_inductor, "_MAX_ELEMENTS", 2 * 3 * 4 * 16 - 1)
    q, k, v = torch.randn(3, 2, 3, 4, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float16)
    torch.testing.assert_close(temporal_attention(q, k, v, 2), plain_temporal_attention(q, k, v, 2))


def test_attention_over_more_frames_than_the_kernel_takes_stays_in_the_range_of_float16() -> None:
    q, v = torch.full((1, 65, 1, 64), 40.0).half(), torch.randn(1, 65, 1, 64).half()
    torch.testing.assert_close(plain_temporal_attention(q, q, v, 1), v.mean(1, keepdim=True).expand_as(v))


def test_a_library_that_was_never_built_comes_with_the_command_that_builds_it(
    float32: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOW1_KERNELS", str(tmp_path))
    runner_inductor._kernels.cache_clear()  # as in a process that has loaded none
    message = r"holds no show1_kernels\w*\. Build it .*`cmake -S \. -B build/kernels"
    with pytest.raises(EngineError, match=message):
        find_library("show1_kernels_ref")
    with pytest.raises(BundleError, match=f"interp: .*{message}"):
        Engine(float32, float32.engine("interp"))
    # Of the autoencoder norms alone are kernels, which take half precision.
    entry = replace(float32.engine("interp"), name="vae_decoder", graphs={})
    assert runner_inductor.why_unusable(float32, entry) is None
    assert re.search(message, runner_inductor.why_unusable(float32, replace(entry, precision="fp16")) or "")
    with pytest.raises(EngineError, match=message):
        build_for(DEVICE)
    old = replace(entry, precision="fp16", properties={**entry.properties, "kernels": 1})
    assert "built for another version's kernels: `python -m export" in str(runner_inductor.why_unusable(float32, old))


# ---- The loop on the device

# scheduler, guidance, the part that is guided, clips, steps, cache interval
LOOPS: dict[str, tuple[dict[str, Any], float, Interval, int, int, int]] = {
    "interp": (PUBLISHED["base"], 4.0, ALL_STEPS, 3, 6, 1),
    "interp, guided at first": (PUBLISHED["base"], 4.0, (0, 0.5), 3, 6, 1),
    "interp, guided in the middle": (PUBLISHED["base"], 4.0, (0.3, 0.7), 3, 6, 1),
    "sr1, unguided": (PUBLISHED["sr1"], 1.0, ALL_STEPS, 1, 4, 1),
    "sr1, no step guided": (PUBLISHED["sr1"], 7.0, (0, 0), 1, 4, 1),
    "latents": (PUBLISHED["sr2"], 15.0, ALL_STEPS, 2, 5, 1),
    "learned variance": (PUBLISHED["if2"], 4.0, ALL_STEPS, 1, 4, 1),
    "learned variance, guided in the middle": (PUBLISHED["if2"], 4.0, (0.2, 0.8), 2, 5, 1),
    "learned variance, unguided": (PUBLISHED["if1"], 1.0, ALL_STEPS, 2, 3, 1),
    "fixed variance": ({**PUBLISHED["noising"], "clip_sample_range": 1.25}, 2.0, ALL_STEPS, 1, 4, 1),
    "interp, every third step whole": (PUBLISHED["base"], 4.0, ALL_STEPS, 2, 7, 3),
    "interp, every second step whole, guided at first": (PUBLISHED["base"], 4.0, (0, 0.6), 2, 7, 2),
    "learned variance, every second step whole": (PUBLISHED["if2"], 1.0, ALL_STEPS, 2, 5, 2),
}


def loop_inputs(engine: Engine, guidance: float, clips: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """UNet with its prompt, sample, condition."""
    random = np.random.default_rng(seed)
    text = PromptEmbeds(*random.standard_normal((2, 1, 7, engine.properties["text_dim"]), np.float32))
    x = random.standard_normal((clips, 3, 4, 4, 6), np.float32)
    condition = random.standard_normal((clips, 4, 4, 4, 6), np.float32)
    return prompted(engine, text, guidance, clips), x, condition


def run_loop(unet: Any, x: Any, condition: Any, case: str) -> tuple[Any, list[Any]]:
    """Result, and x after every step."""
    scheduler, guidance, guided, _, steps, interval = LOOPS[case]
    visited: list[Any] = []
    result = denoise(
        unet,
        x,
        make_schedule(SchedulerConfig.from_dict(scheduler, case), steps),
        guidance_scale=guidance,
        guided=guided,
        cache_interval=interval,
        noise=NoiseStream(7),
        condition=condition,
        on_step=lambda index, total, x: visited.append(x.copy()),
    )
    return result, visited


@pytest.mark.parametrize("case", LOOPS)
def test_a_loop_on_the_device_equals_the_sampler(engine: Engine, case: str) -> None:
    scheduler, guidance, _, clips, steps, _ = LOOPS[case]
    unet, x, condition = loop_inputs(engine, guidance, clips)
    # The same operations in the same order, but for exp()'s last bits in DDPM's noise, which the network multiplies.
    atol = 0 if DEVICE == "cpu" and scheduler["_class_name"] != "DDPMScheduler" else 2e-4
    before = x.copy()
    expected, trajectory = run_loop(unet.__call__, x, condition, case)
    for _ in range(2):  # the second time in the first one's buffers
        with patch.object(engine, "run", side_effect=AssertionError("a step left the loop")):
            actual, visited = run_loop(unet, x, condition, case)
        assert len(visited) == steps
        for step, (seen, wanted) in enumerate(zip(visited, trajectory, strict=True)):
            np.testing.assert_allclose(seen, wanted, rtol=0, atol=atol, err_msg=f"step {step}")
        np.testing.assert_array_equal(actual, visited[-1])
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)
    np.testing.assert_array_equal(x, before)
    assert np.abs(expected).max() > 0.5


def test_a_loop_is_what_it_was_when_others_have_come_and_gone(engine: Engine) -> None:
    """A runner keeps two; graphs share libraries' workspaces with those that are dropped, unless each has its own."""
    engine._runners["step"]._loops.clear()
    first: dict[int, Any] = {}
    for clips in (1, 2, 3, 2, 1):
        unet, x, condition = loop_inputs(engine, 4.0, clips)
        result, _ = run_loop(unet, x, condition, "interp, guided at first")
        np.testing.assert_allclose(result, first.setdefault(clips, result), rtol=0, atol=0 if DEVICE == "cpu" else 2e-4)
    assert len(engine._runners["step"]._loops) == 2


def test_a_loop_in_the_buffers_of_another_has_a_prompt_and_a_condition_of_its_own(engine: Engine) -> None:
    engine._runners["step"]._loops.clear()
    for seed in (1, 2):
        unet, x, condition = loop_inputs(engine, 4.0, 1, seed)
        expected, _ = run_loop(unet.__call__, x, condition, "latents")
        actual, _ = run_loop(unet, x, condition, "latents")
        np.testing.assert_allclose(actual, expected, rtol=0, atol=0 if DEVICE == "cpu" else 2e-4)
    assert len(engine._runners["step"]._loops) == 1


def test_buffers_are_shared_by_loops_of_one_shape_whatever_their_schedule(engine: Engine) -> None:
    loops = engine._runners["step"]._loops
    loops.clear()
    unet, x, condition = loop_inputs(engine, 4.0, 3)
    for steps in (2, 5):
        schedule = make_schedule(SchedulerConfig.from_dict(PUBLISHED["base"], "base"), steps)
        denoise(unet, x, schedule, guidance_scale=4.0, condition=condition)
    assert len(loops) == 1
    denoise(unet, x, schedule, guidance_scale=9.0, condition=condition)
    assert len(loops) == 1
    for guided in ((0.0, 0.5), (0.4, 0.8)):
        denoise(unet, x, schedule, guidance_scale=9.0, guided=guided, condition=condition)
    assert len(loops) == 2


def test_every_kind_of_step_is_warm_before_the_first_is_captured_and_dropped_with_its_engine(
    float32: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, graphs that run what they stand for: what a capture keeps, a later warm-up could not use."""
    case = "interp, every second step whole, guided at first"
    events: list[str] = []
    start = runner_inductor.DeviceLoop.start

    def start_on_cuda(loop: Any, *arguments: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(loop._buffers, "runner", SimpleNamespace(device="cuda"))
            start(loop, *arguments)

    def warm_up(step: Any) -> None:
        events.append("warm up")
        with monkeypatch.context() as patch:
            patch.setattr(step._buffers, "runner", SimpleNamespace(device="cpu"))
            step._enqueue()

    def capture(step: Any) -> None:
        events.append("capture")
        step._graph = SimpleNamespace(replay=step._enqueue, reset=lambda: events.append("drop"))

    with EnginePool(float32) as pool, pool.use("interp") as engine:
        unet, x, condition = loop_inputs(engine, 4.0, 2)
        expected, _ = run_loop(unet, x, condition, case)
        engine._runners["step"]._loops.clear()
        monkeypatch.setattr(runner_inductor.DeviceLoop, "start", start_on_cuda)
        monkeypatch.setattr(runner_inductor._Step, "warm_up", warm_up)
        monkeypatch.setattr(runner_inductor._Step, "capture", capture)
        for _ in range(2):  # captured once
            actual, _ = run_loop(unet, x, condition, case)
            np.testing.assert_allclose(actual, expected, rtol=0, atol=0 if DEVICE == "cpu" else 2e-4)
        assert events == ["warm up"] * 4 + ["capture"] * 4
    assert events[8:] == ["drop"] * 4


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError("CUDA out of memory")])
def test_a_loop_that_does_not_start_drops_its_graphs_before_its_package_goes(
    float32: Bundle, monkeypatch: pytest.MonkeyPatch, failure: Any
) -> None:
    dropped: list[str] = []

    def start(loop: Any, *_: Any) -> None:
        for step in loop._steps.values():
            step._graph = SimpleNamespace(reset=partial(dropped.append, "graph"))
        raise failure

    monkeypatch.setattr(runner_inductor.DeviceLoop, "start", start)
    with EnginePool(float32) as pool, pool.use("interp") as engine:
        unet, x, condition = loop_inputs(engine, 4.0, 1)
        with pytest.raises((KeyboardInterrupt, EngineError)):
            run_loop(unet, x, condition, "interp")
        assert dropped and not engine._runners["step"]._loops


def test_the_garbage_collector_rests_during_a_capture_alone() -> None:
    for on in (True, False):
        (gc.enable if on else gc.disable)()
        try:
            with pytest.raises(RuntimeError), runner_inductor._uninterrupted():
                assert not gc.isenabled()
                raise RuntimeError
            assert gc.isenabled() == on
        finally:
            gc.enable()


def test_a_loop_in_half_precision_equals_the_sampler(float16: Bundle) -> None:
    with EnginePool(float16) as pool, pool.use("interp") as engine:
        unet, x, condition = loop_inputs(engine, 4.0, 1)
        expected, _ = run_loop(unet.__call__, x, condition, "interp")
        actual, _ = run_loop(unet, x, condition, "interp")
    # No exp() in this solver and the same network inputs; a GPU's sums need not have the same order twice.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=0 if DEVICE == "cpu" else 1e-2)


def test_a_network_without_the_variance_that_a_scheduler_reads_is_refused(float16: Bundle) -> None:
    with EnginePool(float16) as pool, pool.use("interp") as engine:
        unet, x, condition = loop_inputs(engine, 4.0, 1)
        with pytest.raises(BundleError, match="no variance_frac"):
            run_loop(unet, x, condition, "learned variance")


# ---- Everything


@pytest.mark.slow
def test_all_golden_cases_hold_with_all_nine_engines(golden: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    assert main(["build", "--engine", "inductor", "--checkpoint", str(golden / "models"), "--out", str(out)]) == 0
    rows = verify(Bundle.open(out), golden)
    misses = [row for row in rows if not row.ok]
    assert not misses, "\n".join(map(str, misses))
    assert len(rows) >= 73
