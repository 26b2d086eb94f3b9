"""The UNets from inside: every module against the authors', the variance rows, and who sees whom."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="needs the export extra")

import onnx
from torch import Tensor

from engines.catalog import CATALOG, UNETS
from engines.store import Bundle
from export import networks
from export.modules.unet import UNetConfig, UNetContext, UNetStep, VideoUNet
from export.networks import LoadedNetwork, Source

pytestmark = pytest.mark.torch

SIZE = (576, 320)


@cache
def load(golden: Path, name: str, keep_variance: bool = False) -> LoadedNetwork:
    return networks.load(Source.find(CATALOG[name], golden / "models", "fp32"), "fp32", SIZE, keep_variance)


@dataclass(frozen=True)
class Net:
    """A golden UNet with all of its outputs."""

    context: UNetContext
    step: UNetStep

    @classmethod
    def of(cls, golden: Path, name: str) -> "Net":
        return cls.of_graphs(load(golden, name, keep_variance=True))

    @classmethod
    def of_graphs(cls, network: LoadedNetwork) -> "Net":
        return cls(*(graph.module for graph in network.graphs if graph.spec.name != "shallow"))

    @property
    def unet(self) -> VideoUNet:
        return self.step.unet

    def __call__(self, sample: Tensor, timestep: float, text: Tensor, noise_level: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            times = torch.full((len(sample),), float(timestep))
            context = self.context(text) if noise_level is None else self.context(text, noise_level)
            return torch.cat(self.step(sample, times, *context)[:-1], dim=1)


# Every module against the authors'


def summary(value: Tensor) -> NDArray[np.float64]:
    """What the golden files keep of a module's output: mean, std, largest magnitude, first, third and last element."""
    flat = value.double().flatten()
    some = flat[[0, len(flat) // 3, -1]]
    return np.array([flat.mean(), flat.std(), flat.abs().max(), *some])


@pytest.mark.parametrize("name", ["base", "sr1"])
def test_every_module_gives_what_the_authors_module_of_that_name_gives(golden: Path, name: str) -> None:
    net = Net.of(golden, name)
    inputs = np.load(golden / f"unet_{name}.npz")
    expected = dict(np.load(golden / f"internals_{name}.npz"))
    outputs: dict[str, NDArray[np.float64]] = {}

    def note(module: str, output: Tensor) -> None:
        outputs[module] = summary(output)

    # All of them exist here under their names, with the authors' layout: frames in the batch, [B*F, C, H, W].
    # encoder_hid_proj, add_embedding and class_embedding run in the context, the rest in the step.
    hooks = [
        net.unet.get_submodule(module).register_forward_hook(lambda _, __, output, module=module: note(module, output))
        for module in expected
    ]
    try:
        noise_level = torch.from_numpy(inputs["class_labels"]).float() if name == "sr1" else None
        sample, text = (torch.from_numpy(inputs[key]) for key in ("sample_f5", "ehs_f5"))
        net(sample, inputs["timestep"].item(), text, noise_level)
    finally:
        for hook in hooks:
            hook.remove()
    assert outputs.keys() == expected.keys()
    for module, values in expected.items():
        np.testing.assert_allclose(outputs[module], values, rtol=0, atol=1e-4, err_msg=module)


# The variance half of the output


def output_names(network: LoadedNetwork) -> list[str]:
    return [binding.name for binding in network.graphs[1].spec.outputs]


@pytest.mark.parametrize(("name", "rows"), [("base", 3), ("interp", 3), ("if2", 6), ("sr1", 3), ("sr2", 4)])
def test_a_step_holds_variance_rows_only_where_its_scheduler_reads_them(bundle: Path, name: str, rows: int) -> None:
    opened = Bundle.open(bundle)
    model = onnx.load(opened.path(opened.engine(name).graphs["step"].plan), load_external_data=False)
    (filters,) = (tensor for tensor in model.graph.initializer if tensor.name.endswith("conv_out.weight"))
    assert list(filters.dims) == [rows, 32, 3, 3]
    outputs = ["noise_pred", "variance_frac"] if rows == 6 else ["noise_pred"]
    assert [value.name for value in model.graph.output] == [*outputs, "deep"]


def test_keep_variance_keeps_the_rows_that_the_scheduler_drops(golden: Path) -> None:
    lean, full = load(golden, "base"), load(golden, "base", keep_variance=True)
    assert output_names(lean) == ["noise_pred", "deep"]
    assert output_names(full) == ["noise_pred", "variance_frac", "deep"]
    dropped, kept = (network.graphs[1].module.unet.conv_out.weight for network in (lean, full))
    torch.testing.assert_close(dropped, kept[:3], rtol=0, atol=0)
    assert kept.shape[0] == 6


def test_dropping_the_variance_leaves_the_noise_prediction(golden: Path) -> None:
    inputs = np.load(golden / "unet_base.npz")
    sample, text = (torch.from_numpy(inputs[key]) for key in ("sample_f5", "ehs_f5"))
    lean = Net.of_graphs(load(golden, "base"))
    full = Net.of(golden, "base")
    torch.testing.assert_close(lean(sample, 500, text), full(sample, 500, text)[:, :3], rtol=0, atol=1e-5)


# Shallow steps


@pytest.mark.parametrize("name", UNETS)
def test_a_shallow_step_with_its_own_deep_features_is_the_whole_step(golden: Path, name: str) -> None:
    network = load(golden, name, keep_variance=True)
    _, step, shallow = network.graphs
    sizes = {"batch": 2, "frames": 1 if name == "if2" else 3, "tokens": 7, "height": 8, "width": 16}
    sample, timestep, *made = step.example(sizes, torch.Generator().manual_seed(0))
    with torch.no_grad():
        *whole, deep = step.module(sample, timestep, *made)
        given = dict(zip([binding.name for binding in step.spec.inputs], (sample, timestep, *made), strict=True))
        given["deep"] = deep
        read = [given[binding.name] for binding in shallow.spec.inputs]
        again = shallow.module(*read)
        read[0] = sample + 1
        other = shallow.module(*read)
        assert list(deep.shape[2:]) == [sizes["frames"], 8, 16]
        for value, expected in zip(again, whole, strict=True):
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)
        assert (other[0] - whole[0]).abs().max() > 1e-2, "it reads the sample"
        read[0], read[2] = sample, deep + 1
        assert (shallow.module(*read)[0] - whole[0]).abs().max() > 1e-2, "and the deep features"


@pytest.mark.parametrize("name", UNETS)
def test_a_shallow_step_holds_the_finest_level_alone_and_reads_text_where_that_does(golden: Path, name: str) -> None:
    _, step, shallow = load(golden, name).graphs
    read = [binding.name for binding in shallow.spec.inputs]
    attends = hasattr(step.module.unet.down_blocks[0], "attentions")
    assert ("text_kv" in read) == attends
    axes = {axis for binding in shallow.spec.inputs for axis in binding.axes if isinstance(axis, str)}
    assert set(shallow.spec.profile) == axes


# Who sees whom


def change_of_one(net: Net, axis: int, noise_level: bool) -> NDArray[np.float32]:
    """Largest change per element of `axis` (0: batch, 2: frames) of the output when the middle one of 3 is changed."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"batch": 3 if axis == 0 else 1, "frames": 3 if axis == 2 else 2}
    multiple = net.unet.config.size_multiple
    sample = torch.randn(
        sizes["batch"], net.unet.config.in_channels, sizes["frames"], 2 * multiple, 4 * multiple, generator=generator
    )
    text = torch.randn(sizes["batch"], 7, net.unet.config.text_dim, generator=generator)
    level = torch.full((sizes["batch"],), 150.0) if noise_level else None
    before = net(sample, 500, text, level)
    sample.select(axis, 1).add_(1)
    change = (net(sample, 500, text, level) - before).abs()
    return change.movedim(axis, 0).flatten(1).amax(1).numpy()


def test_frames_do_not_see_each_other_in_the_image_network(golden: Path) -> None:
    first, changed, last = change_of_one(Net.of(golden, "if2"), axis=2, noise_level=True)
    assert changed > 0.1
    assert max(first, last) < 1e-5


@pytest.mark.parametrize("name", ["base", "interp", "sr1", "sr2"])
def test_frames_see_each_other_in_the_video_networks(golden: Path, name: str) -> None:
    assert change_of_one(Net.of(golden, name), axis=2, noise_level=name == "sr1").min() > 1e-2


@pytest.mark.parametrize("name", ["base", "if2", "sr1", "sr2"])
def test_clips_of_a_batch_do_not_see_each_other(golden: Path, name: str) -> None:
    first, changed, last = change_of_one(Net.of(golden, name), axis=0, noise_level=name in ("if2", "sr1"))
    assert changed > 0.1
    assert max(first, last) < 1e-5


def test_a_list_of_head_sizes_is_read_from_its_start_on_the_way_up_too(golden: Path) -> None:
    stored = json.loads((golden / "models/base/unet/config.json").read_text(encoding="utf-8"))
    kinds = {"down_block_types": ["SimpleCrossAttnDownBlock3D"] * 2, "up_block_types": ["SimpleCrossAttnUpBlock3D"] * 2}
    config = UNetConfig.from_dict({**stored, **kinds, "attention_head_dim": [8, 16]}, "config.json")
    with torch.device("meta"):
        unet = VideoUNet(config)
    # 32 and 64 channels: channels per head here, the number of heads over frames.
    assert [block.attentions[0].heads for block in unet.down_blocks] == [32 // 8, 64 // 16]
    assert [block.attentions[0].heads for block in unet.up_blocks] == [64 // 8, 32 // 16]
    assert [b.temp_attentions[0].transformer_blocks[0].attn1.heads for b in unet.up_blocks] == [8, 16]
