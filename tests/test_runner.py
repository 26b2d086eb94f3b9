"""Running engines: types at the border, and what is said of plans and inputs that do not run."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engines.errors import BundleError, EngineError, ProfileError
from engines.store import Bundle
from runtime import runner_ort
from runtime.runner import Engine, EnginePool, open_runner
from runtime.runner_ort import OrtRunner


@pytest.fixture(scope="module")
def clip(bundle: Path) -> Iterator[Engine]:
    opened = Bundle.open(bundle)
    engine = Engine(opened, opened.engine("clip"))
    yield engine
    engine.close()


def test_inputs_are_converted_to_the_bindings_types_and_outputs_to_float32(clip: Engine) -> None:
    expected = clip.run("encode", input_ids=np.array([[1, 2, 3]], np.int64))["prompt_embeds"]
    actual = clip.run("encode", input_ids=np.array([[1, 2, 3]], np.int16))["prompt_embeds"]
    assert expected.dtype == actual.dtype == np.float32
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(("shape", "message"), [((9, 5), r"batch 9 \(built for 1\.\.8\)"), ((1, 78), r"tokens 78 \(")])
def test_shapes_out_of_the_profile_never_reach_the_backend(clip: Engine, shape: tuple[int, ...], message: str) -> None:
    calls = clip.calls
    with pytest.raises(ProfileError, match=f"clip/encode: {message}"):
        clip.run("encode", input_ids=np.zeros(shape, np.int64))
    assert clip.calls == calls


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


def test_how_to_build_a_plan_again_that_cannot_be_loaded_is_said(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_backend: str, plan: Path) -> None:
        raise BundleError(f"{plan}: cannot load it.")

    monkeypatch.setattr("runtime.runner.open_runner", refuse)
    opened = Bundle.open(bundle)
    with pytest.raises(BundleError, match=r"cannot load it\. Build it again, with --force: `python -m .* --stage sr2 "):
        Engine(opened, opened.engine("clip"))


class WheelWithCuda:
    """onnxruntime-gpu, where its libraries are found or not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, found: bool, gpus: int):
        self.asked: list[object] = []
        self.found, ort = found, runner_ort.ort
        monkeypatch.setattr(ort, "get_available_providers", lambda: [runner_ort._CUDA, runner_ort._CPU])
        monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load libcudart.so"))
        monkeypatch.setattr(ort, "InferenceSession", self)
        monkeypatch.setattr(runner_ort, "find_gpus", lambda: [None] * gpus)
        runner_ort._providers.cache_clear()

    def __call__(self, _plan: str, _options: object, providers: list[object]) -> SimpleNamespace:
        self.asked = providers
        used = [runner_ort._CUDA, runner_ort._CPU] if self.found else [runner_ort._CPU]
        return SimpleNamespace(get_providers=lambda: used, get_outputs=list)


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool, int], WheelWithCuda]]:
    yield lambda found, gpus: WheelWithCuda(monkeypatch, found, gpus)
    monkeypatch.undo()
    runner_ort._providers.cache_clear()


def test_a_gpu_that_is_there_is_not_left_idle_in_silence(wheel, tmp_path: Path, capsys) -> None:
    wheel(False, 1)
    with pytest.raises(EngineError, match=r"did not find the CUDA libraries .*\.\[cuda\]"):
        OrtRunner(tmp_path / "step.onnx")
    assert capsys.readouterr().out == ""  # it is for `--json`
    wheel(False, 0)
    OrtRunner(tmp_path / "step.onnx")


def test_float32_on_a_gpu_is_not_tf32(wheel, tmp_path: Path) -> None:
    session = wheel(True, 1)
    OrtRunner(tmp_path / "step.onnx")
    assert session.asked == [(runner_ort._CUDA, {"use_tf32": 0}), runner_ort._CPU]


def test_a_plan_for_another_backend_is_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(
        EngineError, match=r"step\.plan: made for the backend 'abacus', which this version does not run"
    ):
        open_runner("abacus", tmp_path / "step.plan")
    opened = Bundle.open(bundle)
    with pytest.raises(EngineError, match="made for the backend 'abacus'"):
        Engine(opened, replace(opened.engine("clip"), backend="abacus"))


def test_a_pool_counts_calls_and_seconds_of_each_engine(bundle: Path) -> None:
    with EnginePool(Bundle.open(bundle)) as pool:
        for _ in range(2):
            with pool.use("clip") as engine:
                engine.run("encode", input_ids=np.zeros((1, 5), np.int64))
        assert pool.engine_calls == {"clip": 2}
        assert list(pool.engine_seconds) == ["clip"] and pool.engine_seconds["clip"] > 0
