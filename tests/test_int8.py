"""INT8: which layers, what the rewritten graphs compute, and a whole cascade quantised and judged."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

import onnx_ir as ir
from onnxruntime.quantization import quant_utils
from torch import Tensor, nn

from engines import quantize
from engines.catalog import CATALOG
from engines.compile_ort import compile_int8
from engines.errors import EngineError, SettingsError
from engines.gpu import Gpu
from engines.passes import unsigned_activations
from engines.quantize import LayerPlan, layers, quantize_weight
from engines.spec import INT8, Axis, Binding, GraphSpec
from engines.store import Bundle
from export import int8
from export.__main__ import main
from export.demo.faithfulness import Faithfulness, Prompt, load_prompts
from export.int8 import LEAST_LAYER_SQNR, build_int8, choose, measure_layers, plans_of
from export.job import Backend, tuned_for
from export.replay import Take
from export.to_onnx import trace
from runtime.config import Settings
from runtime.engine import EnginePool
from runtime.pipeline import Show1Pipeline
from runtime.runner_ort import OrtRunner
from runtime.schedulers import executed_steps

pytestmark = pytest.mark.torch

SETTINGS = Settings(size=(112, 64), keyframes=2).with_steps({"base": 2, "interp": 2, "if2": 2, "sr1": 1, "sr2": 2})
PROMPTS = load_prompts(2)
RTX = "tensorrt-rtx"


class Tiny(nn.Module):
    """Convolution, a vector from outside, convolution, product, convolution: the third and fourth can be quantised."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((4, 16), (16, 16), (16, 4)))
        self.vector, self.product = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        b = self.first(x) + self.vector(emb)[:, :, None, None]
        e = self.product(self.middle(b).flatten(2).transpose(1, 2))
        return self.last(e.transpose(1, 2).unflatten(2, (8, 8)) + b)


def tiny() -> ir.Model:
    return _traced().clone()


@cache
def _traced() -> ir.Model:
    torch.manual_seed(0)
    image = ("batch", 4, 8, 8)
    spec = GraphSpec(
        "tiny",
        (Binding("x", "float32", image), Binding("emb", "float32", ("batch", 16))),
        (Binding("y", "float32", image),),
        {"batch": Axis(1, 2, 4)},
    )
    module = Tiny().eval().requires_grad_(False)
    return trace(module, spec, (torch.randn(2, 4, 8, 8), torch.randn(2, 16)))


def feeds(seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((2, 4, 8, 8)).astype(np.float32),
        "emb": rng.standard_normal((2, 16)).astype(np.float32),
    }


def run(model: ir.Model, folder: Path, given: dict[str, np.ndarray]) -> np.ndarray:
    ir.save(model, folder / "model.onnx")
    runner = OrtRunner(folder / "model.onnx")
    try:
        (output,) = runner.infer(given).values()
        return output
    finally:
        runner.close()


def inside(folder: Path, seed: int = 1) -> list[np.ndarray]:
    """What the convolution reads and writes, then the product."""
    found = []
    for number in range(4):
        model = tiny()
        node = list(layers(model.graph).values())[number // 2]
        value = node.outputs[0] if number % 2 else node.inputs[0]
        value.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs[:] = [value]
        found.append(run(model, folder, feeds(seed)))
    return found


def weight_of(model: ir.Model, name: str) -> np.ndarray:
    return layers(model.graph)[name].inputs[1].const_value.numpy()


def fake(x: np.ndarray, largest: float) -> np.ndarray:
    scale = np.float32(largest / 127)
    return np.clip(np.rint(x / scale), -127, 127).astype(np.float32) * scale


def names(model: ir.Model) -> tuple[str, str]:
    convolution, product = layers(model.graph)
    return convolution, product


def test_first_and_last_convolutions_and_vectors_stay_as_they_are() -> None:
    graph = tiny().graph
    assert [node.op_type for node in layers(graph).values()] == ["Conv", "MatMul"]
    assert [node.op_type for node in graph if node.op_type in ("Conv", "Gemm", "MatMul")].count("Conv") == 3


def test_weights_are_quantised_as_onnx_runtime_would() -> None:
    weight = np.random.default_rng(3).standard_normal((5, 7, 3, 1)).astype(np.float32)
    weight[2] = 0  # a channel without weights
    integers, scale = quantize_weight(weight, 0)
    assert integers.dtype == np.int8 and integers.shape == weight.shape
    for channel in (0, 1, 3, 4):
        low, high = weight[channel].min(), weight[channel].max()
        zero, expected = quant_utils.compute_scale_zp(low, high, np.int8(-127), np.int8(127), symmetric=True)
        assert zero == 0 and scale[channel] == pytest.approx(float(expected), rel=1e-6)
        np.testing.assert_array_equal(integers[channel], np.rint(weight[channel] / scale[channel]))
    assert not integers[2].any()
    assert np.abs(integers * scale[:, None, None, None] - weight).max() <= scale.max() / 2 * 1.001


def test_small_weights_of_half_precision_keep_their_levels() -> None:
    weight = (np.random.default_rng(3).standard_normal((8, 512)) * 2e-4).astype(np.float16)
    integers, scale = quantize_weight(weight, 0)
    error = integers.astype(np.float32) * scale.astype(np.float32)[:, None] - weight
    exact = weight.astype(np.float64)
    assert quantize.signal_to_noise(float((exact**2).sum()), float((error.astype(np.float64) ** 2).sum())) > 40


def test_calibration_sees_the_largest_magnitudes(tmp_path: Path) -> None:
    model = tiny()
    observed = quantize.observe(model)
    scalars = run(observed, tmp_path, feeds())[::-1]
    np.testing.assert_allclose(scalars, [np.abs(value).max() for value in inside(tmp_path)], rtol=1e-6)


def test_activations_do_not_wait_for_a_later_layers_scalar() -> None:
    """ONNX Runtime turns first to what the last input needs: that must be what the network comes to first."""
    model = quantize.observe(tiny())
    joined = model.graph.outputs[0].producer()
    node = joined.inputs[-1].producer()
    while node.op_type != "Abs":
        node = node.inputs[0].producer()
    assert joined.op_type == "Concat" and node.inputs[0] is next(iter(layers(model.graph).values())).inputs[0]


def test_a_quantised_graph_computes_what_integers_leave(tmp_path: Path) -> None:
    model = tiny()
    convolution, product = names(model)
    reads, writes, *_ = inside(tmp_path)
    plans = {
        convolution: LayerPlan("int8", float(np.abs(reads).max()), float(np.abs(writes).max())),
        product: LayerPlan("weights"),
    }
    restored = {}
    for name, axis in ((convolution, 0), (product, 1)):
        integers, scale = quantize_weight(weight_of(model, name), axis)
        restored[name] = torch.from_numpy(integers * (scale[:, None, None, None] if axis == 0 else scale))
    torch.manual_seed(0)
    module = Tiny()
    with torch.no_grad():
        c = torch.conv2d(
            torch.from_numpy(fake(reads, plans[convolution].reads)),
            restored[convolution],
            module.middle.bias,
            padding=1,
        )
        c = torch.from_numpy(fake(c.numpy(), plans[convolution].writes))
        e = (c.flatten(2).transpose(1, 2) @ restored[product]).transpose(1, 2).unflatten(2, (8, 8))
        expected = module.last(e + torch.from_numpy(reads)).numpy()

    before = len(model.graph.initializers)
    quantize.quantize(model, plans)
    assert len(model.graph.initializers) == before - 2 + 6 + 4  # weights gone; integers, scales, zeros; two activations
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("QuantizeLinear") == 2 and kinds.count("DequantizeLinear") == 4
    zeros = [node.inputs[2].const_value.numpy() for node in model.graph if node.op_type == "DequantizeLinear"]
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)  # as TensorRT wants them

    compile_int8(model, tmp_path / "int8.onnx", tmp_path / "int8.weights")
    runner = OrtRunner(tmp_path / "int8.onnx")
    actual = runner.infer(feeds())["y"]
    runner.close()
    error, step = np.abs(actual - expected), plans[convolution].writes / 127
    assert error.max() < 2 * step  # where rounding met a tie and fell the other way
    assert error.mean() < 0.02 * step


def test_what_products_with_int8_weights_read_is_not_rounded(tmp_path: Path) -> None:
    """ONNX Runtime makes one operator of weights and product, and would have it read 8 bits."""
    model = tiny()
    _, product = names(model)
    quantize.quantize(model, {product: LayerPlan("weights")})
    compile_int8(model, plan := tmp_path / "int8.onnx", tmp_path / "int8.weights")
    made = []
    for once in (False, True):  # True: node by node, as it stands
        runner = OrtRunner(plan, "int8", once)
        made.append(runner.infer(feeds())["y"])
        runner.close()
    np.testing.assert_allclose(made[0], made[1], atol=1e-5)


def test_unsigned_activations_are_the_same_numbers(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 23]>
    g (float[N] x) => (float[N] y) <float scale = {0.1}, int8 zero = {0}> {
       q = QuantizeLinear (x, scale, zero)
       y = DequantizeLinear (q, scale, zero)
    }
    """
    x = {"x": np.linspace(-15, 15, 1001, dtype=np.float32)}
    signed, unsigned = ir.from_onnx_text(text), ir.from_onnx_text(text)
    unsigned_activations(unsigned.graph)
    a, b = run(signed, tmp_path, x), run(unsigned, tmp_path, x)
    np.testing.assert_array_equal(a, b)
    assert b.max() == pytest.approx(12.7)


def test_every_layer_is_measured_on_what_it_reads_in_full_precision(tmp_path: Path) -> None:
    model = tiny()
    convolution, product = names(model)
    measured = measure_layers(model, [feeds(1), feeds(2)], tmp_path)
    given = [inside(tmp_path, seed) for seed in (1, 2)]
    ranges, int8_db, weights_db = measured[product]
    assert ranges == pytest.approx([max(np.abs(row[i]).max() for row in given) for i in (2, 3)])
    integers, scale = quantize_weight(weight_of(model, product), 1)

    def decibels(read: Callable[[np.ndarray], np.ndarray]) -> float:
        signal = sum(np.square(e).sum() for *_, e in given)
        noise = sum(np.square(read(d) @ (integers * scale) - e).sum() for *_, d, e in given)
        return float(10 * np.log10(signal / noise))

    assert weights_db == pytest.approx(decibels(lambda d: d), abs=0.05)
    assert int8_db == pytest.approx(decibels(lambda d: fake(d, ranges[0])), abs=0.05)
    assert measured[convolution][1] < measured[convolution][2]  # activations cost more than weights


def test_a_layer_that_loses_too_much_stays_high() -> None:
    high, low = LEAST_LAYER_SQNR + 1, LEAST_LAYER_SQNR - 1
    assert choose(((1.0, 2.0), high, high), ("int8",)) == LayerPlan("int8", 1.0, 2.0)
    assert choose(((1.0, 2.0), low, high), ("int8",)) == LayerPlan("float")
    assert choose(((1.0, 2.0), high, high), ("weights",)) == LayerPlan("weights")
    assert choose(((1.0, 2.0), low, low), ("weights",)) == LayerPlan("float")
    assert choose(((1.0, 2.0), low, high), ("int8", "weights")) == LayerPlan("weights")


def kept_of(timesteps: Sequence[int]) -> list[dict[str, np.ndarray]]:
    reservoir = int8._Reservoir()
    for number, t in enumerate(timesteps):
        reservoir.add({"number": np.array(number), "timestep": np.full(2, t, np.float32)})
    return reservoir.feeds


def test_calls_that_are_kept_cover_a_run_of_any_length() -> None:
    kept = [int(row["number"]) for row in kept_of(range(1000))]
    assert len(set(kept)) == int8._FEEDS and min(kept) < 250 and max(kept) > 750
    assert [int(row["number"]) for row in kept_of(range(5))] == list(range(5))
    assert kept == [int(row["number"]) for row in kept_of(range(1000))]  # verdicts can be had again


def test_what_is_the_same_in_every_call_is_kept_once() -> None:
    reservoir, sample = int8._Reservoir(), np.zeros(4)
    for number in range(20):
        sample[:] = number
        reservoir.add({"sample": sample, "text_kv": np.ones(8)})
    assert len({id(row["text_kv"]) for row in reservoir.feeds}) == 1
    assert len({float(row["sample"][0]) for row in reservoir.feeds}) == int8._FEEDS


@pytest.mark.parametrize("windows", [3, 4, 5, 8, 40])
def test_calls_that_repeat_are_kept_and_judged_at_all_their_timesteps(windows: int) -> None:
    """sr1's: four steps, window after window."""
    steps = [900, 650, 400, 150]
    kept = kept_of(steps * windows)
    assert {int(row["timestep"][0]) for row in kept} == set(steps)
    judged = [int(row["timestep"][0]) for row in int8._few_over_time(kept)]
    assert len(judged) == 3 and judged[0] == 150 and judged[1] in (400, 650) and judged[2] == 900
    assert len(int8._few_over_time([{"x": np.zeros(1)}])) == 1  # a text encoder's one call


@pytest.mark.parametrize("strength", [0.01, 0.1, 0.3, 0.57, 0.8, 1.0])
def test_several_steps_of_sr2_are_seen_whatever_its_strength(strength: float) -> None:
    settings = int8._few_steps(Settings(strength=strength))
    assert executed_steps(settings.sr2.num_inference_steps, strength) in (4, 5)
    assert settings.sr1.num_inference_steps == 4


@pytest.fixture(scope="module")
def quantised(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden cascade with every engine that leaves its tiny video alone in int8, however slow."""
    out = tmp_path_factory.mktemp("int8") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "LEAST_SPEED", 0.0)
        patch.setattr(int8, "LEAST_PSNR", 12.0)
        build_int8(Bundle.open(bundle), out, [], settings=SETTINGS)
    return out


def test_a_cascade_in_int8_makes_a_video(quantised: Path, bundle: Path) -> None:
    opened = Bundle.open(quantised)
    assert set(opened.manifest.engines) == set(CATALOG)
    assert opened.manifest.schedulers == Bundle.open(bundle).manifest.schedulers
    in_int8 = [name for name, entry in opened.manifest.engines.items() if entry.precision == INT8]
    assert {"sr1", "base"} <= set(in_int8)
    for entry in opened.manifest.engines.values():
        assert not opened.problems(entry)
        verdict = entry.properties[INT8]
        assert verdict["kept"] == (entry.precision == INT8)
        assert verdict["why"] and verdict["psnr_db"] > 0 and verdict["points"] is None
        assert not verdict["kept"] or verdict["why"].endswith("; faithfulness not measured")
    sr1 = opened.engine("sr1").properties[INT8]
    modes = [layer["mode"] for layer in sr1["layers"].values()]
    assert modes.count("int8") > 20 and set(modes) <= {"int8", "float"}
    assert sr1["bytes"] < 0.6 * sr1["float_bytes"]
    text = opened.engine("t5").properties[INT8]["layers"]
    assert "int8" not in {layer["mode"] for layer in text.values()}  # activations that do not bear it
    with Show1Pipeline.from_bundle(quantised) as pipeline:
        video = pipeline("a red circle", settings=SETTINGS)
    assert video.frames.shape == (5, 64, 112, 3)


def test_engines_of_other_weights_go_with_the_first_new_one(
    quantised: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        assert set(Bundle.open(out).manifest.engines) == set(CATALOG)
        arguments[1].adopt()
        raise EngineError("failed")

    monkeypatch.setattr(int8, "_build", fail)
    floats = Bundle.open(bundle)
    base = floats.engine("base")
    changed = replace(base, source={**base.source, "weights": "another's"}).sealed()
    floats = Bundle(bundle, replace(floats.manifest, engines={**floats.manifest.engines, "base": changed}))
    out = shutil.copytree(quantised, tmp_path / "int8")
    with pytest.raises(EngineError):
        build_int8(floats, out, [], settings=SETTINGS)
    assert set(Bundle.open(out).manifest.engines) == set(CATALOG) - {"base"}
    shutil.copyfile(quantised / "manifest.json", out / "manifest.json")
    monkeypatch.setattr(int8, "of_checkpoint", lambda _bundle, network, _checkpoint: network.name == "base")
    with pytest.raises(EngineError):
        build_int8(floats, out, [], settings=SETTINGS, checkpoint=tmp_path)
    assert set(Bundle.open(out).manifest.engines) == set(CATALOG), "the same checkpoint's, in another precision"


def test_what_is_not_built_again_stays_and_keeps_its_size(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "_build", lambda floats, writer, *_: writer.adopt())
    whole = Bundle.open(bundle)
    base = whole.engine("base")
    halved = replace(base, precision="fp16", source={**base.source, "weights": "of the half-precision files"}).sealed()
    schedulers, kept = {"base": {"beta_start": 1e-4}}, Settings().with_guidance({"base": 5.0}).to_dict()
    for size in ((576, 320), (640, 384)):
        (out := tmp_path / str(size[0])).mkdir()
        engines = {"base": replace(halved, source={**halved.source, "size": tuned_for(size)["base"]}).sealed()}
        manifest = replace(
            whole.manifest, engines=engines, size=size, schedulers=schedulers, defaults=kept, tokenizers={}
        )
        (out / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    build_int8(whole, tmp_path / "576", [], ["text"], settings=SETTINGS)
    built = Bundle.open(tmp_path / "576")
    assert built.engine("base") == halved and built.manifest.schedulers == schedulers
    assert set(built.manifest.tokenizers) == {"t5"} and built.manifest.defaults["base"] == kept["base"]
    message = r"640: base would stay for another size than 576x320\. Give --size 640x384, or --stage all, or"
    with pytest.raises(SettingsError, match=message):
        build_int8(whole, tmp_path / "640", [], ["text"], settings=SETTINGS)


def test_what_is_up_to_date_is_not_judged_again(
    quantised: Path, bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "_build", lambda *_: pytest.fail("nothing has changed"))
    build_int8(Bundle.open(bundle), quantised, [], settings=SETTINGS)
    assert capsys.readouterr().err.count("up to date") == len(CATALOG)
    assert main(["list", str(quantised)]) == 0
    table = capsys.readouterr().out
    assert table.count("| int8 |") >= 4 and "layers in int8" in table


def test_an_engine_that_int8_does_not_serve_stays_as_it_was(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "LEAST_SPEED", 1e9)
    monkeypatch.setattr(int8, "LEAST_PSNR", 0.0)
    monkeypatch.setattr(int8._Judge, "points", lambda *_: pytest.fail("its speed has decided"))
    floats = Bundle.open(bundle)
    built = build_int8(floats, tmp_path / "out", PROMPTS, ["base"], settings=SETTINGS)
    entry = built.engine("base")
    assert entry.precision == "fp32" and "times float32's speed" in entry.properties[INT8]["why"]
    theirs = [(file.sha256, file.bytes) for file in floats.engine("base").files()]
    assert [(file.sha256, file.bytes) for file in entry.files()] == theirs
    assert not built.problems(entry)
    plans = plans_of(built)["base"]  # a card may still want it
    assert sum(plan.mode == "int8" for plan in plans.values()) > 20
    assert all(plan.reads > 0 for plan in plans.values() if plan.mode == "int8")
    json.dumps(entry.properties)


def test_an_engine_stays_as_it_was_where_prompts_are_followed_less(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(int8, "LEAST_SPEED", 0.0)
    monkeypatch.setattr(int8, "LEAST_PSNR", 0.0)
    monkeypatch.setattr(int8._Judge, "points", lambda self, engines, first: {"if2": -2.5, "sr1": -2.0}[first])
    floats = Bundle.open(bundle)
    built = build_int8(floats, tmp_path / "out", PROMPTS, ["sr1"], settings=SETTINGS)
    if2, sr1 = built.engine("if2"), built.engine("sr1")
    assert if2.precision == "fp32" and if2.properties[INT8]["points"] == -2.5
    assert if2.properties[INT8]["why"] == "follows prompts less: faithfulness -2.5 points"
    assert [file.sha256 for file in if2.files()] == [file.sha256 for file in floats.engine("if2").files()]
    assert sr1.precision == INT8 and sr1.properties[INT8]["points"] == -2.0  # at the limit
    assert set(plans_of(built)) == {"sr1"}
    said = capsys.readouterr().err
    assert "if2: stays float32, follows prompts less: faithfulness -2.5 points" in said
    assert "sr1: int8, " in said and said.count("; faithfulness -2.0 points") == 1
    assert main(["list", str(built.root)]) == 0
    table = capsys.readouterr().out
    assert "| -2.5 points |" in table and "| -2.0 points |" in table


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For how many prompts the command has asked, each time: nothing is built."""
    asked: list[int] = []

    def build(floats: Bundle, out: Path, prompts: Sequence[Prompt], *_: object, **__: object) -> Bundle:
        asked.append(len(prompts))
        return Bundle(out, floats.manifest)

    monkeypatch.setattr(int8, "build_int8", build)
    return asked


def command(bundle: Path, out: Path, *options: str) -> list[str]:
    return ["build", "--precision", "int8", "--calibration", str(bundle), "--out", str(out), *options]


@pytest.mark.parametrize(("options", "count"), [([], 16), (["--judge", "3"], 3), (["--judge", "0"], 0)])
def test_the_command_says_by_how_many_prompts_engines_are_judged(
    bundle: Path, tmp_path: Path, asked: list[int], options: list[str], count: int
) -> None:
    assert main(command(bundle, tmp_path / "out", *options)) == 0 and asked == [count]


def test_int8_needs_no_half_precision(
    asked: list[int], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.job.why_not_half", lambda: "it is inexact here")
    assert main(command(bundle, tmp_path / "out")) == 0 and asked == [16]


# The float32 bundle that is given


def test_the_float32_bundle_is_not_overwritten(
    bundle: Path, tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "same").symlink_to(bundle)
    for engine in ("onnxruntime", RTX):
        monkeypatch.setattr(Backend, "choose", lambda name, *_: Backend(name))
        assert main(command(bundle, tmp_path / "same", "--engine", engine)) == 1
        assert "its float32 engines would be lost. Choose another --out" in capsys.readouterr().err
    assert not asked
    with pytest.raises(SettingsError, match="is the float32 bundle that int8 is calibrated with"):
        build_int8(Bundle.open(bundle), tmp_path / "same", [], settings=SETTINGS)


@pytest.mark.parametrize("engine", ["onnxruntime", RTX])
def test_a_float32_bundle_of_other_weights_is_refused(
    bundle: Path,
    golden: Path,
    tmp_path: Path,
    asked: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    engine: str,
) -> None:
    """TensorRT's engines are always built from a checkpoint, here the default one."""
    monkeypatch.setattr(Backend, "choose", lambda name, *_: Backend(name))
    monkeypatch.setattr("export.build.build", lambda *_: Bundle.open(bundle))
    monkeypatch.setattr(int8, "plans_of", lambda _: {})
    models = tmp_path / "models"
    shutil.copytree(golden / "models/base/text_encoder", models / "base/text_encoder")
    monkeypatch.setattr("export.__main__._checkpoint", lambda given: given or models)
    options = ["--stage", "text", "--engine", engine, *(() if engine == RTX else ("--checkpoint", str(models)))]
    assert main(command(bundle, tmp_path / "out", *options)) == 0
    with open(models / "base/text_encoder/model.safetensors", "ab") as file:
        file.write(b"other")
    asked.clear()
    capsys.readouterr()
    assert main(command(bundle, tmp_path / "out", *options)) == 1
    said = capsys.readouterr().err
    assert f"{bundle}: its t5 was not made from {models / 'base/text_encoder'}. Give the --checkpoint" in said
    assert not asked


def test_a_float32_bundle_of_another_size_is_refused(
    bundle: Path, tmp_path: Path, asked: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(bundle, tmp_path / "out", "--size", "640x384")) == 1
    assert f"--size 640x384: {bundle} was built for 576x320. Leave --size out" in capsys.readouterr().err
    assert main(command(bundle, tmp_path / "out", "--size", "576x320")) == 0 and len(asked) == 1


@pytest.mark.parametrize("engine", ["onnxruntime", RTX])
def test_a_bundle_of_another_size_is_refused_before_anything_is_built(
    bundle: Path,
    tmp_path: Path,
    asked: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    engine: str,
) -> None:
    """Of which float32 engines, calibration and judging take hours."""
    monkeypatch.setattr(Backend, "choose", lambda name, *_: Backend(name))
    monkeypatch.setattr("export.build.build", lambda *_, **__: pytest.fail("built"))
    arguments = ["build", "--precision", "int8", "--engine", engine, "--stage", "base", "--size", "640x384"]
    (tmp_path / "out").symlink_to(bundle)
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert f"error: {tmp_path / 'out'}: if2, interp, sr1, sr2, vae_" in capsys.readouterr().err
    assert not asked


def test_plans_are_built_for_the_size_of_the_float32_bundle(
    bundle: Path, golden: Path, tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    floats, sizes = Bundle.open(bundle), []
    (tmp_path / "floats").mkdir()
    (tmp_path / "floats/manifest.json").write_text(replace(floats.manifest, size=(640, 384)).to_json())

    def build(
        checkpoint: Path, out: Path, stages: list[str], precision: str, size: tuple[int, int], *_: object
    ) -> Bundle:
        sizes.append(size)
        return floats

    monkeypatch.setattr(Backend, "choose", lambda name, *_: Backend(name))
    monkeypatch.setattr("export.build.build", build)
    monkeypatch.setattr(int8, "plans_of", lambda _: {})
    options = ("--engine", RTX, "--stage", "text", "--checkpoint", str(golden / "models"))
    assert main(command(tmp_path / "floats", tmp_path / "out", *options)) == 0
    assert sizes == [(640, 384)]


# The gate


def test_speed_is_in_float32s_and_of_the_fastest_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    seconds = iter([4.0, 2.0, 3.0, 1.0, 5.0, 6.0])  # of float32 and int8, in turns

    def open_runner(backend: str, plan: Path, precision: str, engine: str) -> Any:
        return SimpleNamespace(infer=lambda *_: {"y": np.ones(3)}, close=lambda: closed.append(precision))

    monkeypatch.setattr(int8, "open_runner", open_runner)
    monkeypatch.setattr(int8, "_timed", lambda call: next(seconds))
    decibels, speed, rows = int8._compare("base", Path("float"), Path("int8"), [{}, {}], ["y"])
    assert speed == 3.0 and len(rows) == 2 and closed == ["fp32", INT8]
    verdict = int8.Verdict(True, "", speed, decibels, 0.0, None, 1, 2, {}).with_psnr(np.inf)
    assert verdict.kept and verdict.psnr_db == 99.0, "JSON has no infinity"


def test_what_is_for_memory_is_judged_although_it_is_slow(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "LEAST_SPEED", 1e9)
    monkeypatch.setattr(int8, "LEAST_PSNR", 0.0)
    monkeypatch.setattr(int8._Judge, "points", lambda *_: -3.0)
    monkeypatch.setattr(int8, "MOST_BYTES", 2.0)  # a small network's Q/DQ nodes weigh more than its weights save
    built = build_int8(Bundle.open(bundle), tmp_path / "out", PROMPTS, ["text"], settings=SETTINGS, for_memory=True)
    assert built.engine("t5").properties[INT8]["points"] == -3.0
    assert plans_of(built) == {}
    # Engines that nobody judged are none of the plans'.
    assert plans_of(Bundle.open(bundle)) == {}


def test_what_is_judged_for_memory_is_what_plans_are_built_by(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(model: ir.Model, *arguments: Any) -> dict[str, int8.Measured]:
        """Of three layers one bears int8, one int8 weights, one neither."""
        measured = measure_layers(model, *arguments)
        decibels = [(40.0, 40.0), (10.0, 40.0), (10.0, 10.0)]
        return {layer: (row[0], *decibels[i % 3]) for i, (layer, row) in enumerate(measured.items())}

    monkeypatch.setattr(int8, "LEAST_SPEED", 0.0)
    monkeypatch.setattr(int8, "LEAST_PSNR", 0.0)
    monkeypatch.setattr(int8, "measure_layers", measure)
    monkeypatch.setattr(int8, "networks_of", lambda _: [CATALOG["vae_decoder"]])
    built = build_int8(Bundle.open(bundle), tmp_path / "out", [], settings=SETTINGS, for_memory=True)
    plans = plans_of(built)["vae_decoder"]
    modes = [plan.mode for plan in plans.values()]
    assert modes == [("int8", "weights", "float")[i % 3] for i in range(len(plans))] and len(modes) > 5
    model = ir.load(built.path(built.engine("vae_decoder").graphs["decode"].plan))
    integers = [
        v for v in model.graph.initializers.values() if v.dtype == ir.DataType.INT8 and v.const_value.size > 256
    ]
    assert len(integers) == len(modes) - modes.count("float")


def test_an_engine_that_changes_the_video_in_int8_gets_int8_weights_where_memory_is_the_reason(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "measure_layers", lambda *given: dict.fromkeys(measure_layers(*given), ((1, 1), 40, 40)))
    monkeypatch.setattr(int8, "networks_of", lambda _: [CATALOG["vae_decoder"]])
    for number, (for_memory, decibels, modes) in enumerate(
        [
            (True, [20.0, 45.0], {"weights"}),
            (True, [20.0, 21.0], {"weights"}),
            (False, [20.0], {"int8"}),
        ]
    ):
        left = iter(decibels)
        monkeypatch.setattr(int8, "psnr", lambda *_, left=left: next(left))
        built = build_int8(Bundle.open(bundle), tmp_path / str(number), [], settings=SETTINGS, for_memory=for_memory)
        verdict = built.engine("vae_decoder").properties[INT8]
        assert next(left, None) is None and verdict["psnr_db"] == decibels[-1]
        assert {layer["mode"] for layer in verdict["layers"].values()} == modes
        assert bool(plans_of(built)) == (decibels[-1] > 30)


def test_the_judge_counts_points_against_float32s_videos_made_once(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    floats = Bundle.open(bundle)
    judge, engines = int8._Judge(floats, PROMPTS, SETTINGS), EnginePool(floats, keep_loaded=True)
    monkeypatch.setattr(int8, "LEAST_ABOVE_CHANCE", -100.0)
    assert judge.points(engines, "vae_decoder") == 0.0
    judge.before = Faithfulness({}, [0.5, 0.56], [1, 1], {"faithfulness": 0.3})
    monkeypatch.setattr(int8, "faithfulness", lambda *_: replace(judge.before, scores=[0.52, 0.5]))
    assert judge.points(engines, "vae_decoder") == -2.0
    assert capsys.readouterr().err.count("judging by 2 prompts at 112x64") == 1
    assert int8._Judge(floats, [], SETTINGS).points(engines, "t5") is None


def test_videos_that_follow_prompts_by_chance_alone_have_nothing_to_lose(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a checkpoint that does not know the world of the questions. The verdict says that nothing was measured."""
    floats = Bundle.open(bundle)
    made: list[str] = []

    def make(engines: EnginePool, takes: list[Take], first: str = "t5") -> list[Take]:
        made.append(first)
        return [replace(take, made={"vae_decoder": np.zeros((1, 8, 8, 3), np.uint8)}) for take in takes]

    monkeypatch.setattr(int8, "make_videos", make)
    verdict = int8.Verdict(True, "1.20 times float32's speed", 1.2, 30.0, 50.0, None, 1, 2, {})
    for chance, points in ((0.30, None), (0.24, 0.0)):
        before = Faithfulness({}, [0.3, 0.5], [1, 1], {"faithfulness": chance})
        monkeypatch.setattr(int8, "faithfulness", lambda *_, before=before: before)
        judge = int8._Judge(floats, PROMPTS, SETTINGS)
        assert judge.points(EnginePool(floats), "sr1") == points
        judged = verdict.with_faithfulness(points, judge.before)
        assert judged.kept and judged.points == points and (judged.before, judged.chance) == (0.4, chance)
        measured = "not measured: float32's is 40%, by chance 30%" if points is None else "+0.0 points"
        assert judged.why == f"1.20 times float32's speed; faithfulness {measured}"
    assert made == ["t5", "t5", "sr1"]  # no video is made again where nothing can be told


@pytest.mark.parametrize(("chance", "judged", "videos"), [(0.36, False, 4), (0.1, True, 6)])
def test_a_few_videos_are_enough_to_see_that_prompts_are_not_followed(
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    chance: float,
    judged: bool,
    videos: int,
) -> None:
    made: list[Take] = []

    def make(engines: EnginePool, takes: list[Take], first: str = "t5") -> list[Take]:
        made.extend(takes)
        return [replace(take, made={"vae_decoder": np.zeros((1, 8, 8, 3), np.uint8)}) for take in takes]

    monkeypatch.setattr(int8, "make_videos", make)
    score = Faithfulness({}, [0.4, 0.4], [1, 1], {"faithfulness": chance})
    monkeypatch.setattr(int8, "faithfulness", lambda *_: score)
    judge = int8._Judge(Bundle.open(bundle), load_prompts(6), SETTINGS)
    assert (judge.points(EnginePool(judge.floats), "sr1") is not None) == judged
    assert len(made) == videos + (6 if judged else 0)
    assert ("of the first 4: not measured" in capsys.readouterr().err) != judged


def test_verdicts_are_stale_when_any_engine_of_the_cascade_is_another(bundle: Path) -> None:
    floats = Bundle.open(bundle)
    before = int8._fingerprint(floats, SETTINGS, PROMPTS, False)
    for name in CATALOG:
        entry = floats.engine(name)
        built_again = replace(entry, cost={"compile_s": 1e9}, seal="another")
        other = replace(entry, source={**entry.source, "weights": "another"})
        for engine, stale in ((built_again, False), (other, True)):
            changed = Bundle(floats.root, replace(floats.manifest, engines={**floats.manifest.engines, name: engine}))
            assert (int8._fingerprint(changed, SETTINGS, PROMPTS, False) != before) == stale, name
    for part in ("schedulers", "tokenizers"):  # what makes the videos besides
        whole = getattr(floats.manifest, part)
        changed = Bundle(floats.root, replace(floats.manifest, **{part: dict(list(whole.items())[1:])}))
        assert int8._fingerprint(changed, SETTINGS, PROMPTS, False) != before, part
    assert int8._fingerprint(floats, replace(SETTINGS, keyframes=3), PROMPTS, False) != before
    assert int8._fingerprint(floats, SETTINGS, PROMPTS[:1], False) != before
    assert int8._fingerprint(floats, SETTINGS, PROMPTS, True) != before


def test_layers_are_not_looked_for_by_another_versions_names(bundle: Path, golden: Path) -> None:
    whole = Bundle.open(bundle)
    clip = whole.engine("clip")
    older = replace(clip, source={**clip.source, "exporter": "an older one's"})
    floats = Bundle(bundle, replace(whole.manifest, engines={**whole.manifest.engines, "clip": older}))
    for traced, given in ((False, floats), (True, whole)):
        int8.check_calibration(given, ["sr2"], golden / "models", None, traced)
    with pytest.raises(SettingsError, match=r"its clip was built by another version \(changed: exporter\)"):
        int8.check_calibration(floats, ["sr2"], golden / "models", None, traced=True)


def test_calibration_asks_for_float32_engines(quantised: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="calibration needs onnxruntime fp32"):
        build_int8(Bundle.open(quantised), tmp_path / "out", [], settings=SETTINGS)


def test_int8_is_refused_where_onnx_runtime_uses_the_card(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("runtime.runner_ort.find_gpus", lambda: [Gpu("H200", (9, 0), 2**37, (13, 0))])
    monkeypatch.setattr("runtime.runner_ort.tries_cuda", lambda: True)
    assert main(["build", "--checkpoint", "demo", "--precision", "int8"]) == 1
    assert "no convolutions in int8 for CUDA" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "fp32", "--calibration", "x"], "--calibration is for --precision int8"),
        (["--judge", "8"], "--judge is for --precision int8; this is fp32. Leave it out."),
        (["--precision", "int8", "--judge", "-1"], "--judge -1; allowed: 0 (faithfulness is not measured), or 2 to 48"),
        (["--precision", "int8", "--judge", "1"], "--judge 1; allowed: 0"),
        (["--precision", "int8", "--judge", "49"], "--judge 49; allowed: 0"),
        (["--precision", "int8", "--engine", "inductor"], "for onnxruntime and TensorRT"),
        (["--precision", "int8", "--target", "sm89"], "onnxruntime has no targets"),
    ],
)
def test_impossible_requests_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--checkpoint", "demo", *options]) == 1
    assert message in capsys.readouterr().err
