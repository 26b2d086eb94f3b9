"""Running engines: types at the border, and what is said of plans and inputs that do not run."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.errors import BundleError, EngineError, ProfileError
from engines.store import Bundle
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
    with pytest.raises(BundleError, match=r"step\.onnx: ONNX Runtime \d.* cannot load it .*export build --force"):
        OrtRunner(plan)


def test_a_plan_for_another_backend_is_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(
        BundleError, match=r"step\.plan: made for the backend 'abacus', which this version does not run"
    ):
        open_runner("abacus", tmp_path / "step.plan")
    opened = Bundle.open(bundle)
    with pytest.raises(BundleError, match="made for the backend 'abacus'"):
        Engine(opened, replace(opened.engine("clip"), backend="abacus"))


def test_a_pool_counts_calls_and_seconds_of_each_engine(bundle: Path) -> None:
    with EnginePool(Bundle.open(bundle)) as pool:
        for _ in range(2):
            with pool.use("clip") as engine:
                engine.run("encode", input_ids=np.zeros((1, 5), np.int64))
        assert pool.engine_calls == {"clip": 2}
        assert list(pool.engine_seconds) == ["clip"] and pool.engine_seconds["clip"] > 0
