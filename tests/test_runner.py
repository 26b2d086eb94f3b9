"""Running engines: types at the border, and what is said of plans and inputs that do not run."""

import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
from conftest import HALF, ROOT

from engines import tensorrt
from engines.errors import BundleError, EngineError, ProfileError
from engines.gpu import Gpu
from engines.store import Bundle
from runtime import runner_ort, runner_trt
from runtime.engine import Engine, EnginePool, _TimedLoop, open_runner, why_not_half, why_unusable
from runtime.runner import LoopStart
from runtime.runner_ort import OrtRunner
from runtime.schedulers import make_schedule
from runtime.stages.diffusion import PromptEmbeds, prompted, scheduler_of


@pytest.fixture(scope="module")
def clip(bundle: Path) -> Iterator[Engine]:
    opened = Bundle.open(bundle)
    engine = Engine(opened, opened.engine("clip"))
    yield engine
    engine.close()


def test_inputs_are_converted_to_the_bindings_types_and_outputs_to_float32(
    clip: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = clip.run("encode", input_ids=np.array([[1, 2, 3]], np.int64))["prompt_embeds"]
    seen: dict[str, np.ndarray] = {}
    monkeypatch.setattr(clip, "on_feeds", lambda graph, feeds: seen.update(feeds))
    actual = clip.run("encode", input_ids=np.array([[1, 2, 3]], np.int16))["prompt_embeds"]
    assert expected.dtype == actual.dtype == np.float32 and seen["input_ids"].dtype == np.int64
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(("shape", "message"), [((9, 5), r"batch 9 \(built for 1\.\.8\)"), ((1, 78), r"tokens 78 \(")])
def test_shapes_out_of_the_profile_never_reach_the_backend(clip: Engine, shape: tuple[int, ...], message: str) -> None:
    reached = patch.object(OrtRunner, "infer", side_effect=AssertionError("the backend was reached"))
    with reached, pytest.raises(ProfileError, match=f"clip/encode: {message}"):
        clip.run("encode", input_ids=np.zeros(shape, np.int64))


def test_what_the_backend_cannot_compute_is_an_engine_error(clip: Engine) -> None:
    with pytest.raises(EngineError, match=r"ONNX Runtime failed: .*indices"):
        clip.run("encode", input_ids=np.array([[10**6]]))


@pytest.mark.parametrize("content", [b"", b"\x08\x09 no graph", None], ids=["empty", "not ONNX", "missing"])
def test_a_plan_that_cannot_be_loaded_is_named_with_what_to_do(tmp_path: Path, content: bytes | None) -> None:
    plan = tmp_path / "step.onnx"
    if content is not None:
        plan.write_bytes(content)
    with pytest.raises(BundleError, match=r"step\.onnx: ONNX Runtime \d.* cannot load it"):
        OrtRunner(plan)


@pytest.mark.skipif(sys.platform == "win32", reason="events of Windows go another way")
def test_onnx_runtime_keeps_and_sends_nothing_of_what_is_run(bundle: Path, tmp_path: Path) -> None:
    opened = Bundle.open(bundle)
    plan = opened.path(opened.engine("clip").graphs["encode"].plan)
    code = "import pathlib, sys; from runtime.runner_ort import OrtRunner; OrtRunner(pathlib.Path(sys.argv[1])).close()"
    # It reports nothing where `CI` is set, and keeps what it will report in the home folder.
    kept = {"CI", "GITHUB_ACTIONS", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME"}
    environment = {key: value for key, value in os.environ.items() if key not in kept} | {"HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code, plan], cwd=ROOT, env=environment, check=True)
    assert not [*tmp_path.rglob("*")]


def test_memory_that_is_short_is_no_reason_to_build_again(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 9.50 GiB.\nMore about it.")

    monkeypatch.setattr(runner_ort.ort, "InferenceSession", refuse)
    opened = Bundle.open(bundle)
    with pytest.raises(
        EngineError, match=r"too little memory to load it \(CUDA out of memory.* GiB\.\)\. Close what"
    ) as e:
        Engine(opened, opened.engine("clip"))
    assert "--force" not in str(e.value)


def test_a_plan_that_cannot_be_loaded_is_built_again_only_where_it_is_damaged(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_backend: str, plan: Path, *_: str) -> None:
        raise BundleError(f"{plan}: cannot load it.")

    monkeypatch.setattr("runtime.engine.open_runner", refuse)
    opened = Bundle.open(bundle)
    entry = opened.engine("clip")
    with pytest.raises(EngineError, match=r"cannot load it\. Its files are as they were built; `show1-rt doctor`"):
        Engine(opened, entry)
    encode = entry.graphs["encode"]
    damaged = replace(encode, plan=replace(encode.plan, sha256="another"))
    with pytest.raises(BundleError, match=r"cannot load it\. Build it again: `python -m .* --stage sr2 .*--force`"):
        Engine(opened, replace(entry, graphs={"encode": damaged}))


@pytest.mark.parametrize("part", ["plan", "weights"])
def test_a_file_that_is_cut_short_is_named_before_a_backend_reads_it(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr("runtime.engine.open_runner", lambda *_: pytest.fail("opened"))
    opened = Bundle.open(bundle)
    entry = opened.engine("vae_decoder")
    file = getattr(entry.graphs["decode"], part)
    longer = replace(entry.graphs["decode"], **{part: replace(file, bytes=file.bytes + 1)})
    with pytest.raises(BundleError, match=rf"{file.path} is missing or cut short"):
        Engine(opened, replace(entry, graphs={"decode": longer}))


def test_graphs_that_were_loaded_are_closed_when_another_of_their_engine_is_not(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []

    def load(_: str, plan: Path, *__: str) -> SimpleNamespace:
        if plan.stem == "step":
            raise EngineError("too little memory")
        return SimpleNamespace(close=partial(closed.append, plan.stem))

    monkeypatch.setattr("runtime.engine.open_runner", load)
    opened = Bundle.open(bundle)
    with pytest.raises(EngineError, match="too little memory"):
        Engine(opened, opened.engine("base"))
    assert closed == ["context"]


def test_graphs_are_closed_in_the_order_in_which_they_were_opened(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's CUDA graphs hold kernels of the shallow package."""
    closed: list[str] = []
    monkeypatch.setattr(
        "runtime.engine.open_runner", lambda _, plan, *__: SimpleNamespace(close=partial(closed.append, plan.stem))
    )
    opened = Bundle.open(bundle)
    engine = Engine(opened, opened.engine("base"))
    engine._runner("shallow")
    engine.close()
    assert closed.index("step") < closed.index("shallow") and len(closed) == 3


def test_a_pool_may_be_closed_while_an_engine_is_in_use(bundle: Path) -> None:
    with EnginePool(Bundle.open(bundle)) as pool, pool.use("clip"):
        pool.close()  # from a callback, or where a signal is handled


def test_an_engine_is_closed_whatever_its_runners_say(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def infer(*_: object) -> None:
        raise EngineError("the first failure")

    monkeypatch.setattr("runtime.engine.open_runner", lambda *_: SimpleNamespace(infer=infer, close=fail))
    with (
        pytest.raises(EngineError, match="the first failure"),
        EnginePool(Bundle.open(bundle)) as pool,
        pool.use("clip") as engine,
    ):
        engine.run("encode", input_ids=np.array([[1, 2, 3]]))
    assert not engine._runners


class WheelWithCuda:
    """onnxruntime-gpu, where its libraries are found or not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, found: bool, gpus: int, driver: tuple[int, int] = (13, 1)):
        self.asked: list[object] = []
        self.found, ort = found, runner_ort.ort
        monkeypatch.setattr(ort, "get_available_providers", lambda: [runner_ort._CUDA, runner_ort._CPU])
        monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load libcudart.so"))
        monkeypatch.setattr(ort, "InferenceSession", self)
        card = Gpu("GeForce RTX 4090", (8, 9), 24 * 2**30, driver)
        monkeypatch.setattr(runner_ort, "find_gpus", lambda: [card] * gpus)
        runner_ort.tries_cuda.cache_clear()

    def __call__(self, _plan: str, _options: object, providers: list[object], **_: object) -> SimpleNamespace:
        self.asked = providers
        used = [runner_ort._CUDA, runner_ort._CPU] if self.found else [runner_ort._CPU]
        return SimpleNamespace(get_providers=lambda: used, get_outputs=list)


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., WheelWithCuda]]:
    yield partial(WheelWithCuda, monkeypatch)
    monkeypatch.undo()
    runner_ort.tries_cuda.cache_clear()


def test_a_gpu_that_is_there_is_not_left_idle_in_silence(wheel, tmp_path: Path, capsys, caplog, monkeypatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    wheel(False, 1)
    with pytest.raises(EngineError, match=r"did not find the CUDA libraries .*\.\[cuda\]"):
        OrtRunner(tmp_path / "step.onnx")
    assert capsys.readouterr().out == ""  # it is for `--json`
    session = wheel(False, 0)
    OrtRunner(tmp_path / "step.onnx")
    assert session.asked == [runner_ort._CPU], "and where there is none, it is not looked for"
    OrtRunner(tmp_path / "step.onnx")
    assert [record.message for record in caplog.records] == [
        "No NVIDIA GPU is seen here: ONNX Runtime runs on the CPU."
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    wheel(False, 0)
    OrtRunner(tmp_path / "step.onnx")
    assert len(caplog.records) == 1, "who wants none is not told"
    session = wheel(True, 1, driver=(12, 4))  # which a session would tell in CUDA's words
    with pytest.raises(EngineError, match=r"driver is for CUDA 12\.4, onnxruntime-gpu needs 13\.0: install a newer"):
        OrtRunner(tmp_path / "step.onnx")
    assert not session.asked


@pytest.mark.parametrize("machine", ["aarch64", "arm64", "x86_64"])
def test_half_precision_is_refused_where_it_is_inexact(
    wheel, bundle: Path, monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    opened = Bundle.open(bundle)
    half = replace(opened.engine("clip"), precision="fp16")
    wheel(True, 1)
    assert why_not_half() is None, "cards compute as they should, whatever the processor"
    wheel(True, 0)
    if machine == "x86_64":
        assert why_unusable(opened, half) is None
        return
    assert why_unusable(opened, opened.engine("clip")) is None
    with pytest.raises(BundleError, match=r"clip: on ARM .* inexact in half precision: `python .*--precision fp32"):
        Engine(opened, half)


LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as Linux tells it")
HELD = """
import re, sys, numpy as np
from pathlib import Path
def held():
    return int(re.search(r'RssAnon:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) / 1024
"""


def held(plan: Path, precision: str, name: str, dtype: type, available: int = 2**40) -> float:
    """MiB that a process holds besides files' pages for a network that turns [2, 4096] of ones into ones."""
    code = (
        "from runtime import engine, runner_ort\n"
        "_, plan, precision, name, dtype, available = sys.argv; before = held()\n"
        "runner_ort.available_memory = lambda: int(available)\n"
        "runner = engine.open_runner('onnxruntime', Path(plan), precision, name)\n"
        "y = runner.infer({'x': np.ones((2, 4096), dtype)})['y']; assert (y == 1).all()\n"
        "print(held() - before)"
    )
    command = [sys.executable, "-c", HELD + code, str(plan), precision, name, np.dtype(dtype).name, str(available)]
    return float(subprocess.check_output(command, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}))


@LINUX
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep little")
def test_memory_between_blocks_in_use_is_returned_to_the_system() -> None:
    code = (
        "from engines.memory import return_memory\n"
        "before = held(); blocks = [np.ones(2**16, np.uint8) for _ in range(4096)]; blocks = blocks[-1:]\n"
        "print(held() - before); return_memory(); print(held() - before)"
    )
    kept, returned = map(float, subprocess.check_output([sys.executable, "-c", HELD + code], cwd=ROOT).split())
    assert kept > 200, "MiB, which the C library keeps by itself: else there is nothing to return"
    assert returned < 20


@LINUX
@pytest.mark.parametrize(("precision", "mib"), [pytest.param("fp16", 64, marks=HALF), ("fp32", 128), ("int8", 32)])
def test_weights_of_a_text_encoder_are_not_copied_on_the_cpu(tmp_path: Path, precision: str, mib: int) -> None:
    """A session's usual way is to hold 128 MiB of float32, as its kernels like them, or int8 in blocks of its own."""
    onnx = pytest.importorskip("onnx", reason="needs the export extra")
    helper, numpy_helper, proto = onnx.helper, onnx.numpy_helper, onnx.TensorProto
    dtype = np.float16 if precision == "fp16" else np.float32
    weights = np.full((4096, 8192), 1 if precision == "int8" else 2**-12, np.int8 if precision == "int8" else dtype)
    kind = proto.FLOAT16 if precision == "fp16" else proto.FLOAT
    initializers, nodes = [numpy_helper.from_array(weights, "w")], [helper.make_node("MatMul", ["x", "w"], ["y"])]
    if precision == "int8":
        scales = np.full(8192, 2**-12, np.float32), np.zeros(8192, np.int8)
        initializers += [numpy_helper.from_array(array, name) for array, name in zip(scales, ("s", "z"), strict=True)]
        nodes[0].input[1] = "wide"
        nodes.insert(0, helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wide"], axis=1))
    ends = ([helper.make_tensor_value_info(name, kind, [2, size])] for name, size in (("x", 4096), ("y", 8192)))
    graph = helper.make_graph(nodes, "encode", *ends, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    plan = tmp_path / "encode.onnx"
    onnx.save(model, plan, save_as_external_data=True, location="encode.weights")
    t5, base = (held(plan, precision, name, dtype) for name in ("t5", "base"))
    assert t5 < mib / 2 < 0.75 * mib < base, "a UNet, which runs in every step, keeps the copy"


@LINUX
@HALF
def test_weights_in_half_precision_are_widened_one_by_one_where_memory_is_short(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs the export extra")
    helper, half = onnx.helper, onnx.TensorProto.FLOAT16
    weights = []
    for i in range(4):
        matrix = np.full((4096, 4096), 2**-12, np.float16)
        matrix[2 * i : 2 * i + 2, 0] = 2**-11, 0  # ones stay ones; equal weights would be held once
        weights.append(onnx.numpy_helper.from_array(matrix, f"w{i}"))
    nodes = [helper.make_node("MatMul", [f"x{i}" if i else "x", f"w{i}"], [f"x{i + 1}"]) for i in range(4)]
    nodes[-1].output[0] = "y"
    ends = ([helper.make_tensor_value_info(name, half, [2, 4096])] for name in "xy")
    graph = helper.make_graph(nodes, "step", *ends, weights)
    plan = tmp_path / "step.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.save(model, plan, save_as_external_data=True, location="step.weights")
    mib = 4 * 64  # in float32
    assert held(plan, "fp16", "base", np.float16) > 0.9 * mib
    assert held(plan, "fp16", "base", np.float16, available=400 * 2**20) < 0.6 * mib


def test_memory_that_is_short_in_a_run_is_told_with_what_to_ask_for(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Bundle.open(bundle)
    with EnginePool(opened) as engines, engines.use("vae_decoder") as engine:
        for said, message in (
            ("[ONNXRuntimeError] : 1 : FAIL : Failed to allocate memory for requested buffer", "smaller --size"),
            ("[ONNXRuntimeError] : 1 : FAIL : something else", "something else$"),
        ):
            monkeypatch.setattr(engine._runners["decode"], "infer", partial(fail, said))
            with pytest.raises(EngineError, match=message):
                engine.run("decode", latents=np.zeros((1, 4, 8, 8), np.float32))


def test_memory_that_is_short_for_a_loop_is_told_likewise(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with EnginePool(Bundle.open(bundle)) as engines, engines.use("base") as engine:
        text = np.zeros((2, 1, 7, engine.properties["text_dim"]), np.float32)
        unet = prompted(engine, PromptEmbeds(*text), guidance_scale=4)
        runner = SimpleNamespace(start_loop=partial(fail, "CUDA out of memory. Tried to allocate 2.00 GiB"))
        monkeypatch.setitem(engine._runners, "step", runner)
        schedule = make_schedule(scheduler_of(engines.bundle, "base"), 2)
        guidance = np.full(2, 4, np.float32)
        start = LoopStart(np.zeros((1, 3, 2, 8, 16), np.float32), schedule, guidance, np.full(2, True), None)
        with pytest.raises(EngineError, match=r"base: too little memory \(CUDA out of.*; ask for a smaller --size"):
            unet.start_loop(start)
        engine._runners.pop("step")


def fail(said: str, *_: object) -> None:
    raise EngineError(said)


def test_a_session_holds_activations_once_and_never_moves_to_the_cpu_by_itself(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    runner = OrtRunner(opened.path(opened.engine("clip").graphs["encode"].plan))
    assert not runner._session.get_session_options().enable_mem_pattern
    assert not runner._session._enable_fallback
    runner.close()


def test_a_session_that_cannot_be_made_says_why_and_is_not_tried_on_the_cpu(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[object] = []

    def fail(_: object, providers: object, *__: object) -> None:
        tried.append(providers)
        raise RuntimeError("CUDA failure 46: all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr(runner_ort.ort.InferenceSession, "_create_inference_session", fail)
    opened = Bundle.open(bundle)
    with pytest.raises(EngineError, match=r"cannot load it \(CUDA failure 46: .* busy or unavailable\)"):
        Engine(opened, opened.engine("clip"))
    assert len(tried) == 1 and capsys.readouterr().out == ""


def test_a_session_has_as_many_threads_as_the_process_may_use(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle.open(bundle)
    plan = opened.path(opened.engine("clip").graphs["encode"].plan)
    for allowed, processors, threads in ((3, 64, 3), (64, 64, 0)):  # 0: as it decides itself
        monkeypatch.setattr(runner_ort, "processors", lambda allowed=allowed: allowed)
        monkeypatch.setattr(os, "cpu_count", lambda processors=processors: processors)
        runner = OrtRunner(plan)
        assert runner._session.get_session_options().intra_op_num_threads == threads
        runner.close()


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", 0), ("int8", 0), ("fp16", 1), ("bf16", 1)])
def test_float32_on_a_gpu_is_not_tf32_and_half_precision_has_the_matrix_units(
    wheel, tmp_path: Path, precision: str, tf32: int
) -> None:
    """ONNX Runtime's convolutions leave out every engine on matrix units, of any precision, where TF32 is forbidden."""
    session = wheel(True, 1)
    runner = OrtRunner(tmp_path / "step.onnx", precision)
    (cuda, settings), cpu = session.asked
    assert (cuda, settings["use_tf32"], cpu) == (runner_ort._CUDA, tf32, runner_ort._CPU)
    assert settings["arena_extend_strategy"] == "kSameAsRequested", "a power of two may be more than the card has"
    assert runner.positions_at_once == np.inf, "a card takes a batch at once, however large"


class Polygraphy:
    """Its runner, on a card that is made up: what it was asked to copy, and what it left there."""

    def __init__(self) -> None:
        self.freed: list[str] = []
        self.copied: list[str] = []
        buffers = {name: SimpleNamespace(free=partial(self.freed.append, name)) for name in ("noise_pred", "deep")}
        self.output_allocator = SimpleNamespace(buffers=buffers)

    def of(self, plan: Callable[[], bytes], allocation_strategy: str) -> "Polygraphy":
        assert allocation_strategy == "runtime" and plan()[:] == b"a plan"
        return self

    def activate(self) -> None: ...

    def infer(self, feeds: dict[str, np.ndarray], copy_outputs_to_host: bool) -> dict[str, SimpleNamespace]:
        assert not copy_outputs_to_host

        def numpy(name: str) -> np.ndarray:
            self.copied.append(name)
            return feeds["sample"]

        return {name: SimpleNamespace(numpy=partial(numpy, name)) for name in ("noise_pred", "deep")}

    def deactivate(self) -> None:
        del self.output_allocator


def on_card(card: Polygraphy, folder: Path, monkeypatch: pytest.MonkeyPatch) -> runner_trt.TrtRunner:
    backend = SimpleNamespace(EngineFromBytes=lambda plan: plan, TrtRunner=card.of)
    monkeypatch.setattr(runner_trt, "polygraphy", lambda _: backend)
    monkeypatch.setattr(runner_trt, "load_cuda_runtime", lambda: None)
    (folder / "step.plan").write_bytes(b"a plan")
    return runner_trt.TrtRunner(folder / "step.plan", "tensorrt-rtx")


def test_a_plan_copies_what_is_wanted_and_frees_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Polygraphy()
    runner = on_card(card, tmp_path, monkeypatch)
    outputs = runner.infer({"sample": np.ones(3)}, ["noise_pred"])
    assert (list(outputs), card.copied) == (["noise_pred"], ["noise_pred"])
    assert set(runner.infer({"sample": np.ones(3)})) == {"noise_pred", "deep"}
    runner.close()
    assert sorted(card.freed) == ["deep", "noise_pred"]


def test_a_plan_that_fails_on_its_card_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a kernel was not launched\nand more")

    card = Polygraphy()
    monkeypatch.setattr(card, "infer", fail)
    with pytest.raises(EngineError, match=r"^TensorRT failed: a kernel was not launched$"):
        on_card(card, tmp_path, monkeypatch).infer({})
    monkeypatch.setattr(card, "activate", fail)
    with pytest.raises(BundleError, match=r"step\.plan: tensorrt-rtx cannot load it \(a kernel was not launched\)"):
        on_card(card, tmp_path, monkeypatch)


def test_a_card_that_is_too_small_for_a_plan_is_told_from_what_tensorrt_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        logging.getLogger("Polygraphy").error("[E] Error Code 2:\n OutOfMemory (Requested size was 9532 bytes.)")
        raise RuntimeError("Could not deserialize engine. See log for details.")

    card = Polygraphy()
    monkeypatch.setattr(card, "infer", fail)
    with pytest.raises(EngineError, match=r"^TensorRT failed: \[E\] Error Code 2: OutOfMemory"):
        on_card(card, tmp_path, monkeypatch).infer({})
    monkeypatch.setattr(card, "activate", fail)
    with pytest.raises(EngineError, match=r"step\.plan: too little memory to load it \(\[E\] Error Code 2: OutOfMem"):
        on_card(card, tmp_path, monkeypatch)
    assert capsys.readouterr().err == ""


def test_polygraphy_logs_elsewhere_than_where_results_go() -> None:
    pytest.importorskip("polygraphy")
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    code = "import sys; from engines import tensorrt; tensorrt.polygraphy('tensorrt-rtx'); "
    code += "from polygraphy.logger import G_LOGGER; G_LOGGER.warning('a warning'); G_LOGGER.info('more')"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout == "" and "a warning" in process.stderr


def test_a_process_has_one_flavour_of_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    config = pytest.importorskip("polygraphy.config")
    monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "0")  # what it is told here does not outlive the test
    monkeypatch.setattr(config, "USE_TENSORRT_RTX", False)
    with pytest.raises(EngineError, match="one flavour of TensorRT per process: run tensorrt-rtx in a new one"):
        tensorrt.polygraphy("tensorrt-rtx")


def test_a_plan_for_another_backend_is_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(
        EngineError, match=r"step\.plan: made for the backend 'abacus', which this version does not run"
    ):
        open_runner("abacus", tmp_path / "step.plan", "fp32")
    opened = Bundle.open(bundle)
    with pytest.raises(EngineError, match="made for the backend 'abacus'"):
        Engine(opened, replace(opened.engine("clip"), backend="abacus"))


def test_the_time_of_a_step_has_the_devices_work_in_it(bundle: Path) -> None:
    class Queue:
        """Step returns at once, the work is done when the sample is asked for."""

        def step(self, _: object) -> None: ...

        def sample(self) -> np.ndarray:
            time.sleep(0.05)
            return np.zeros(1)

    opened, seconds = Bundle.open(bundle), []
    with EnginePool(opened) as pool, pool.use("clip") as engine:
        loop = _TimedLoop(engine, Queue(), np.array([True, False]))
        engine.on_call = lambda graph, _, took: seconds.append((graph, took))
        loop.step(None)
        loop.step(None)
    assert [graph for graph, _ in seconds] == ["step", "shallow"]
    assert min(took for _, took in seconds) >= 0.05
