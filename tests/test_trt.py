"""TensorRT engines, built for real where tensorrt-rtx is installed; no GPU is needed for it, or used."""

import ast
import errno
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("tensorrt_rtx", reason="needs the tensorrt-rtx extra, `pip install -e '.[tensorrt-rtx]'`")

import onnx_ir as ir
import torch
from conftest import ROOT
from filelock import FileLock
from torch import Tensor, nn

from engines import compile_trt, tensorrt
from engines.catalog import CATALOG
from engines.compile_trt import compile_trt as compile_plan
from engines.errors import BundleError, EngineError
from engines.gpu import Gpu
from engines.quantize import LayerPlan, layers, main_graph
from engines.spec import Axis, Binding, GraphSpec
from engines.store import Bundle
from export import networks
from export.__main__ import main
from export.build import build, why_stale
from export.job import Backend, Job, build_engine
from export.modules.ops import temporal_attention
from export.networks import Source
from export.to_onnx import trace
from runtime.engine import Engine

pytestmark = pytest.mark.torch

RTX = "tensorrt-rtx"
ADA = Gpu("GeForce RTX 4090", (8, 9), 24 * 2**30, (13, 0))
TURING = Gpu("GeForce RTX 2080", (7, 5), 8 * 2**30, (13, 0))
HOPPER = Gpu("H200", (9, 0), 141 * 2**30, (13, 0))


@pytest.fixture(scope="module")
def plans(golden: Path) -> Path:
    """All nine engines of the golden models for TensorRT-RTX, in float16. Kept between runs, as `bundle` is."""
    folder = ROOT / "build" / "trt-bundle"
    with FileLock(ROOT / "build" / ".trt-bundle.lock"):
        build(golden / "models", folder, precision="fp16", backend=backend())
    return folder


def backend() -> Backend:
    """Whatever card is here."""
    return Backend.choose(RTX, "fp16", tensorrt.DEFAULT_TARGETS)


def silent(_: str) -> None:
    pass


# What is built


def test_every_network_of_the_cascade_becomes_a_plan(plans: Path) -> None:
    bundle = Bundle.open(plans)
    assert set(bundle.manifest.engines) == set(CATALOG)
    for entry in bundle.manifest.engines.values():
        assert (entry.backend, entry.precision, entry.targets) == (RTX, "fp16", tensorrt.DEFAULT_TARGETS)
        assert entry.backend_version == tensorrt.installed_version(RTX)
        for graph in entry.graphs.values():
            assert bundle.damage(graph.plan) is None
            assert graph.plan.path.endswith(".plan") and graph.weights is None  # and no ONNX files beside it
            assert len(graph.parity) == 2 and len(graph.graph_sha256) == 64
            profile = graph.spec.profile
            assert all(profile[axis].min < profile[axis].max <= 2 * profile[axis].opt for axis in profile)
            dynamic = {axis for binding in graph.spec.inputs for axis in binding.axes if isinstance(axis, str)}
            assert dynamic == set(profile) and dynamic & {"batch", "frames"}
        assert entry.cost["compile_s"] > 0 and entry.cost["parameters"] > 0
    assert not list(plans.rglob("*.onnx")) and not list(plans.rglob("*.weights"))


def test_check_tells_that_plans_are_sound_but_cannot_be_loaded_without_a_gpu(
    plans: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("export.__main__.find_gpus", list)
    assert main(["check", str(plans)]) == 0
    assert capsys.readouterr().out.count("not loaded: no NVIDIA GPU here") == 9
    assert main(["list", str(plans)]) == 0
    assert capsys.readouterr().out.count(f"| {RTX} ") == 9


class Attend(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(64, 64, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(temporal_attention(self.to_q(x), self.to_k(x), self.to_v(x), self.heads))


def attend(heads: int, dtype: torch.dtype = torch.float16) -> tuple[ir.Model, GraphSpec]:
    axes = ("pixels", "frames", 64)
    name = str(dtype).removeprefix("torch.")
    spec = GraphSpec(
        "attend",
        (Binding("x", name, axes),),
        (Binding("y", name, axes),),
        {"pixels": Axis(1, 4, 64), "frames": Axis(2, 5, 29)},
    )
    module = Attend(heads).to(dtype).eval().requires_grad_(False)
    return trace(module, spec, (torch.randn(4, 5, 64).to(dtype),)), spec


@pytest.mark.parametrize("form", compile_trt.ATTENTION)
@pytest.mark.parametrize("heads", [1, 4, 16])
def test_every_form_of_attention_builds_whatever_the_size_of_its_heads(tmp_path: Path, form: str, heads: int) -> None:
    model, spec = attend(heads)
    compile_trt.prepare(model, "fp16", form)
    compile_plan(RTX, compile_trt.detach_weights(model), spec, tmp_path / "plan", ("sm89",), silent)
    assert (tmp_path / "plan").stat().st_size > 1000


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "bf16"), (torch.float32, "fp32")])
def test_other_precisions_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, precision: str
) -> None:
    trt, cleared = tensorrt.load(RTX), []
    clear = trt.IBuilderConfig.clear_flag
    monkeypatch.setattr(
        trt.IBuilderConfig, "clear_flag", lambda config, flag: (cleared.append(flag), clear(config, flag))[1]
    )
    model, spec = attend(4, dtype)
    compile_trt.prepare(model, precision, "fused")
    compile_plan(RTX, compile_trt.detach_weights(model), spec, tmp_path / "plan", ("sm80", "sm120"), silent)
    assert (tmp_path / "plan").stat().st_size > 1000
    assert trt.BuilderFlag.TF32 in cleared, "float32 means float32"


@pytest.mark.parametrize(("name", "mode"), [("base", "int8"), ("clip", "weights")])
def test_a_network_is_built_with_layers_in_int8(
    golden: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, mode: str
) -> None:
    load = networks.load

    def main_alone(*arguments: Any) -> Any:  # nothing of the others is quantised
        loaded = load(*arguments)
        return replace(loaded, graphs=[part for part in loaded.graphs if part.spec.name == main_graph(name)])

    monkeypatch.setattr(networks, "load", main_alone)
    source = Source.find(CATALOG[name], golden / "models", "fp16")
    job = Job(source, "fp16", (576, 320), Backend.choose(RTX, "fp16", ["sm89"]), keep_onnx=True)
    graph, other = main_graph(name), Bundle.open(bundle)
    # Tracing again would take long: ONNX Runtime's graph has the same layers under the same names.
    names = layers(ir.load(other.path(other.engine(name).graphs[graph].plan)).graph)
    job = replace(job, layers={layer: LayerPlan(mode, 4.0, 4.0) for layer in names})
    entry = build_engine(job, tmp_path)
    assert entry.precision == "int8" and entry.source["precision"] == "int8"
    assert entry.source["layers"] != replace(job, layers={next(iter(names)): LayerPlan("float")}).made_from()["layers"]
    model = ir.load(tmp_path / f"{graph}.onnx")
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("DequantizeLinear") >= len(names) > 10
    assert ("QuantizeLinear" in kinds) == (mode == "int8")
    assert (tmp_path / entry.graphs[graph].plan.path).stat().st_size > 1000


def test_a_bfloat16_network_is_built_and_compared(golden: Path, tmp_path: Path) -> None:
    source = Source.find(CATALOG["clip"], golden / "models", "bf16")
    phases: list[str] = []
    job = Job(source, "bf16", (576, 320), Backend.choose(RTX, "bf16", ["sm89"]))
    entry = build_engine(job, tmp_path, phases.append)
    (graph,) = entry.graphs.values()
    assert graph.spec.outputs[0].dtype == "float32"  # NumPy has no bfloat16
    assert all(row["max_error"] <= row["tolerance"] for row in graph.parity)
    assert phases[:3] == ["loading", "tracing encode", "comparing encode"]
    assert any(phase.startswith("compiling encode: ") for phase in phases)


def test_onnx_files_are_kept_on_request(golden: Path, tmp_path: Path) -> None:
    build(
        golden / "models",
        tmp_path,
        ["text"],
        "fp16",
        backend=backend(),
        keep_onnx=True,
    )
    assert [path.name for path in sorted(tmp_path.glob("engines/t5-*/*"))] == [
        "encode.onnx",
        "encode.plan",
        "encode.weights",
    ]


# What is refused


def test_a_graph_that_tensorrt_does_not_take_is_an_error_in_its_words(tmp_path: Path) -> None:
    model, spec = attend(4)
    next(node for node in model.graph if node.op_type == "Attention").op_type = "Attendance"
    with pytest.raises(EngineError, match=r"does not take the graph attend: .*Attendance"):
        compile_plan(RTX, compile_trt.detach_weights(model), spec, tmp_path / "plan", ("sm89",), silent)


def test_a_graph_without_a_kernel_is_an_error_in_tensorrts_words(tmp_path: Path) -> None:
    model, spec = attend(16)  # heads of 4 channels, and not prepared
    with pytest.raises(EngineError, match=r"could not build attend: .*not supported by a dedicated kernel"):
        compile_plan(RTX, compile_trt.detach_weights(model), spec, tmp_path / "plan", ("sm89",), silent)


def test_a_card_that_tensorrt_does_not_build_for_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt.load(RTX).IBuilderConfig, "set_compute_capability", lambda _, target, index: not index)
    model, spec = attend(16)
    with pytest.raises(EngineError, match="tensorrt-rtx does not build for sm120: it gave no reason"):
        compile_plan(RTX, compile_trt.detach_weights(model), spec, tmp_path / "plan", ("sm80", "sm120", "sm89"), silent)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_is_reported_as_such() -> None:
    model, spec = attend(4)
    with pytest.raises(OSError) as caught:
        compile_plan(RTX, compile_trt.detach_weights(model), spec, Path("/dev/full"), ("sm89",), silent)
    assert caught.value.errno == errno.ENOSPC


# Whether a plan can run, told before it is opened


def reason(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, *gpus: Gpu, version: str | None = None) -> str | None:
    entry = bundle.engine("clip")
    monkeypatch.setattr(tensorrt, "find_gpus", lambda: list(gpus))
    monkeypatch.setattr(tensorrt, "installed_version", lambda _: version or entry.backend_version)
    return tensorrt.why_unusable(bundle, entry)


def test_a_plan_is_usable_with_its_version_on_its_cards_only(plans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(plans)
    monkeypatch.setattr(tensorrt, "is_arm", lambda: True)
    assert "--engine onnxruntime --precision fp32" in str(reason(bundle, monkeypatch)), "which is exact there"
    monkeypatch.setattr(tensorrt, "is_arm", lambda: False)
    assert "--engine onnxruntime --precision fp16" in str(reason(bundle, monkeypatch))
    assert reason(bundle, monkeypatch, ADA) is None
    assert "this machine shows none" in str(reason(bundle, monkeypatch))
    command = "`python -m export build --checkpoint FOLDER --stage sr2 --engine {} --precision fp16"
    hopper = str(reason(bundle, monkeypatch, HOPPER))
    assert "built for sm80, sm86, sm89, sm120, this is H200 (sm90), which TensorRT-RTX does not serve" in hopper
    assert f"{command.format('onnxruntime')} --size 576x320 --out {bundle.root}`" in hopper
    turing = str(reason(bundle, monkeypatch, TURING))
    assert f"{command.format(RTX)} --target sm75 --attention fused --size 576x320 --out {bundle.root}`" in turing
    newer = str(reason(bundle, monkeypatch, ADA, version="9.9"))
    assert "9.9 is installed" in newer and "pip install tensorrt-rtx==" in newer
    assert reason(bundle, monkeypatch, Gpu("GB10", (12, 1), 128 * 2**30, (13, 0))) is None, "sm120 is for all of 12.x"
    assert "install a newer NVIDIA driver" in str(reason(bundle, monkeypatch, replace(ADA, driver=(12, 8))))
    in_bf16 = replace(bundle.engine("clip"), precision="bf16")
    brain = Bundle(bundle.root, replace(bundle.manifest, engines={**bundle.manifest.engines, "clip": in_bf16}))
    assert "--engine onnxruntime --precision fp16" in str(reason(brain, monkeypatch, HOPPER)), "which has no bf16"
    assert f"--engine {RTX} --precision fp16 --target sm75" in str(reason(brain, monkeypatch, TURING)), "nor this"
    assert "--engine onnxruntime --precision fp32" in str(reason(brain, monkeypatch)), "on a processor"
    blackwell = Gpu("B200", (10, 0), 180 * 2**30, (13, 0))
    assert "--engine inductor --precision fp16" in str(reason(bundle, monkeypatch, blackwell))
    volta = str(reason(bundle, monkeypatch, Gpu("V100", (7, 0), 2**34, (13, 0))))
    assert "shows V100 (sm70), which is older than Turing. For the CPU: " in volta
    engines = {**bundle.manifest.engines, "t5": replace(bundle.engine("t5"), precision="int8")}
    integers = Bundle(bundle.root, replace(bundle.manifest, engines=engines))
    for arm in (True, False):
        monkeypatch.setattr(tensorrt, "is_arm", lambda arm=arm: arm)
        assert "--engine onnxruntime --precision int8" in str(reason(integers, monkeypatch))
    assert "--engine onnxruntime --precision fp16" in str(reason(integers, monkeypatch, HOPPER)), "not int8 on cards"
    proper = replace(in_bf16, backend="tensorrt", targets=("sm89",))
    there = Bundle(bundle.root, replace(bundle.manifest, engines={"clip": proper}))
    assert "--engine tensorrt --precision fp16 --target sm75" in str(reason(there, monkeypatch, TURING))
    monkeypatch.setattr(tensorrt, "installed_version", lambda _: None)
    assert "needs tensorrt-rtx" in str(tensorrt.why_unusable(bundle, bundle.engine("clip")))


def test_a_plan_that_cannot_run_is_not_opened(plans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(plans)
    monkeypatch.setattr(tensorrt, "find_gpus", list)
    monkeypatch.setattr("runtime.engine.open_runner", lambda *_: pytest.fail("opened"))
    with pytest.raises(BundleError, match="clip: needs an NVIDIA GPU"):
        Engine(bundle, bundle.engine("clip"))


def test_a_plan_is_stale_when_targets_attention_or_version_change(
    plans: Path, golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(plans)
    job = Job(
        Source.find(CATALOG["clip"], golden / "models", "fp16"),
        "fp16",
        (576, 320),
        backend(),
    )
    assert why_stale(bundle, job) is None
    for changed, what in (("targets", ("sm86",)), ("attention", "padded")):
        other = replace(job, backend=replace(job.backend, **{changed: what}))
        assert why_stale(bundle, other) == f"changed: {changed}"
    monkeypatch.setattr(tensorrt, "installed_version", lambda _: "9.9")
    assert why_stale(bundle, job) == "changed: backend version"


@pytest.mark.parametrize("change", [{"backend_version": "1.6"}, {"targets": ("sm89",)}, {"graphs": {}}, {"cost": {}}])
def test_an_entry_that_was_edited_is_told_and_rebuilt(
    plans: Path, golden: Path, tmp_path: Path, change: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(plans, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    edited = replace(bundle.engine("clip"), **change)
    manifest = replace(bundle.manifest, engines={**bundle.manifest.engines, "clip": edited})
    (bundle.root / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    job = Job(
        Source.find(CATALOG["clip"], golden / "models", "fp16"),
        "fp16",
        (576, 320),
        backend(),
    )
    assert "its part of the manifest has been changed" in str(why_stale(Bundle.open(bundle.root), job))
    assert main(["list", str(bundle.root)]) == 0
    assert main(["check", str(bundle.root)]) == 1
    out, err = capsys.readouterr()
    assert "its part of the manifest has been changed" in out
    assert "--stage sr2 --engine tensorrt-rtx --precision fp16" in err and f"--out {bundle.root}" in err


# Types


def test_every_call_of_tensorrt_has_the_types_of_the_installed_bindings(tmp_path: Path) -> None:
    """mypy, against stubs made from the library itself: a renamed method or argument is found without a card."""
    for package in ("tensorrt_rtx_bindings", "tensorrt_rtx"):
        stubgen = [sys.executable, "-c", "from mypy.stubgen import main; main()"]  # compiled: not for -m
        subprocess.run([*stubgen, "-q", "-p", package, "-o", str(tmp_path)], check=True)
    stubs = tmp_path / "tensorrt_rtx_bindings" / "tensorrt_rtx.pyi"
    lines = stubs.read_text().splitlines()
    while True:  # a signature or two of the library is not Python
        try:
            ast.parse("\n".join(lines))
            break
        except SyntaxError as error:
            del lines[(error.lineno or 1) - 1]
    stubs.write_text("\n".join(lines))

    def check(*arguments: str) -> list[str]:
        mypy = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), *arguments]
        result = subprocess.run(
            mypy, cwd=ROOT, env={**os.environ, "MYPYPATH": str(tmp_path)}, capture_output=True, text=True
        )
        return [line for line in result.stdout.splitlines() if "error" in line and ".pyi" not in line]

    compiler = (ROOT / "engines" / "compile_trt.py").read_text()
    wrong = tmp_path / "wrong.py"
    wrong.write_text(compiler.replace("parser.load_initializer(", "parser.load_initialiser("))
    lines = check(str(wrong), "engines/compile_trt.py")
    assert any('has no attribute "load_initialiser"' in line for line in lines)
    # The bindings declare the C++ signature of `write`; what they call, and document, is `write(data: bytes)`.
    errors = [line for line in lines if line.startswith("engines/compile_trt.py")]
    assert len(errors) == 1 and 'Signature of "write" incompatible' in errors[0], errors
