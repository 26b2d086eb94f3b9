"""The baselines: networks of diffusers' layers that give what the authors' code gives, and the work they stand for."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("diffusers", reason="needs the bench extra")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # bench is run from the checkout, never installed

from bench.baseline import Place, ReferenceLoop, fill, make_unet
from bench.work import count_flop, reference_calls
from engines.catalog import CATALOG, UNETS
from engines.errors import SettingsError
from export.checkpoint import weight_files
from export.modules.unet import UNetConfig, UNetContext, UNetStep, VideoUNet
from export.networks import Source, load
from export.random_checkpoint import CONFIGS
from runtime.config import Settings

pytestmark = pytest.mark.torch

CPU = Place("cpu", "float32")
FOLDERS = {"base": "base", "interp": "interpolation", "if2": "if2", "sr1": "sr1", "sr2": "sr2"}


def reference(golden: Path, name: str):
    folder = golden / "models" / FOLDERS[name] / "unet"
    config = json.loads((folder / "config.json").read_text())
    return fill(make_unet(config, name), CPU, weight_files(folder, False), name)


@pytest.mark.parametrize("name", UNETS)
def test_the_networks_give_what_the_authors_networks_give(golden: Path, name: str) -> None:
    unet = reference(golden, name)  # strict: no parameter is missing or left over
    data = np.load(golden / f"unet_{name}.npz")
    for kind in ("",) if name == "if2" else ("_f5", "_f8"):
        sample, text, expected = (torch.from_numpy(data[f"{key}{kind}"]) for key in ("sample", "ehs", "out"))
        levels = (torch.from_numpy(data["class_labels"]),) if "class_labels" in data else ()
        timestep = torch.full((len(sample),), float(data["timestep"]))
        if sample.ndim == 4:  # IF-II's single images
            sample, expected = sample[:, :, None], expected[:, :, None]
        with torch.no_grad():
            out = unet(sample, timestep, text, *levels)
        assert (out - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("name", UNETS)
def test_the_networks_give_what_ours_give(golden: Path, name: str) -> None:
    graphs = load(Source.find(CATALOG[name], golden / "models", "fp32"), "fp32", (576, 320), keep_variance=True).graphs
    context, step = (graph.module for graph in graphs)
    assert isinstance(context, UNetContext) and isinstance(step, UNetStep)
    config = step.unet.config
    random = torch.Generator().manual_seed(1)
    frames = 1 if name == "if2" else 3
    sample = torch.randn(2, config.in_channels, frames, 16, 8, generator=random)
    text = torch.randn(2, 7, config.text_dim, generator=random)
    timestep, levels = torch.tensor([3.0, 700.0]), [torch.tensor([20.0, 250.0])] if config.class_embed_type else []
    with torch.no_grad():
        ours = torch.cat(step(sample, timestep, *context(text, *levels)), dim=1)
        theirs = reference(golden, name)(sample, timestep, text, *levels)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
