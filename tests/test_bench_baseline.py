"""The baselines: networks of diffusers' layers that give what the authors' code gives, and the work they stand for."""

import gc
import json
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("diffusers", reason="needs the bench extra")

from bench.baseline import DenoisingLoop, Place, ReferenceUNet, Source, make_network, measure_network, network_flop
from bench.work import PUBLISHED_FLOP, reference_calls
from engines.catalog import CATALOG, UNETS
from export import networks
from export.checkpoint import weight_files
from export.modules.unet import UNetContext, UNetStep
from export.random_checkpoint import CONFIGS
from runtime.config import Settings

pytestmark = pytest.mark.torch

CPU = Place("cpu", "float32")
FOLDERS = {"base": "base", "interp": "interpolation", "if2": "if2", "sr1": "sr1", "sr2": "sr2"}


def source(golden: Path, name: str) -> Source:
    folder = golden / "models" / FOLDERS[name] / "unet"
    return Source(name, json.loads((folder / "config.json").read_text()), tuple(weight_files(folder, False)))


def reference(golden: Path, name: str) -> ReferenceUNet:
    return make_network(source(golden, name), CPU)


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
    ours = networks.Source.find(CATALOG[name], golden / "models", "fp32")
    context, step, _ = (graph.module for graph in networks.load(ours, "fp32", (576, 320), keep_variance=True).graphs)
    assert isinstance(context, UNetContext) and isinstance(step, UNetStep)
    config = step.unet.config
    random = torch.Generator().manual_seed(1)
    frames = 1 if name == "if2" else 3
    sample = torch.randn(2, config.in_channels, frames, 16, 8, generator=random)
    text = torch.randn(2, 7, config.text_dim, generator=random)
    timestep, levels = torch.tensor([3.0, 700.0]), [torch.tensor([20.0, 250.0])] if config.class_embed_type else []
    with torch.no_grad():
        given = torch.cat(step(sample, timestep, *context(text, *levels))[:-1], dim=1)
        expected = reference(golden, name)(sample, timestep, text, *levels)
    assert (given - expected).abs().max() < 1e-5 * expected.abs().max()


def calls(name: str, settings: Settings | None = None, factor: int = 8):
    settings = settings or Settings()
    steps = {"base": 75, "interp": 75, "if2": 70, "sr1": 125, "sr2": 40}
    return reference_calls(settings, steps, latents=4, factor=factor)[name]


# TFLOP of one call, counted on the authors' code at its sizes.
COUNTED = {"base": 10.470, "interp": 6.548, "if2": 3.852, "sr1": 26.171, "sr2": 51.728, "t5": 1.43, "clip": 0.09}
COUNTED |= {"vae_encoder": 22.6 / 29, "vae_decoder": 51.1 / 29}


def test_the_work_of_a_video_is_that_counted_on_the_authors_code() -> None:
    total = 0
    for name in CATALOG:
        network = CATALOG[name]
        config = CONFIGS["published"][network.path]
        flop = network_flop(Source(name, config), calls(name))
        assert flop == PUBLISHED_FLOP[name]
        assert flop / 1e12 == pytest.approx(COUNTED[name], rel=6e-3 if name in ("t5", "clip") else 2e-3)
        total += flop * calls(name).count
    assert total / 1e15 == pytest.approx(19.72, abs=0.005)
    assert sum(calls(name).count for name in UNETS) == 1210


def test_gaps_and_windows_are_counted_one_by_one() -> None:
    short = Settings(keyframes=3)  # 9 frames: windows of 8 and of 2
    assert calls("interp", short).count == 2 * 75 and calls("interp", short).shape[0] == 2
    assert calls("sr1", short).count == 2 * 125
    assert [calls("sr1", Settings(keyframes=k)).shape[2] for k in (2, 3)] == [5, 8]  # no longer than the video
    assert calls("vae_encoder", short).count == 9


@pytest.mark.parametrize("name", ["interp", "if2", "sr1", "sr2"])
def test_a_loop_takes_the_schedulers_steps(golden: Path, name: str) -> None:
    scheduler = json.loads((golden / "models" / FOLDERS[name] / "scheduler" / "scheduler_config.json").read_text())
    one = calls(name, Settings(size=(64, 64), keyframes=2), factor=4)
    with torch.no_grad():
        loop = DenoisingLoop(reference(golden, name), scheduler, one, CPU)
        start = loop.x
        for timestep in loop.steps(2):
            loop.step(timestep)
    assert loop.x.shape == start.shape and loop.x.isfinite().all() and not torch.equal(loop.x, start)


def test_random_weights_leave_no_layer_at_zero() -> None:
    unet = make_network(Source("sr1", CONFIGS["golden"]["sr1/unet"]), CPU)
    assert all(parameter.any() for name, parameter in unet.named_parameters() if name.endswith("weight"))
    assert all(parameter.isfinite().all() for parameter in unet.parameters())


def test_steps_are_timed_to_their_ends_by_torch_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two go before: on a GPU they compile and capture."""
    events: list[str] = []

    class Watched(Place):
        def synchronize(self) -> None:
            events.append("wait")

    monkeypatch.setattr(DenoisingLoop, "step", lambda *_: events.append(f"step, {torch.backends.cudnn.benchmark}"))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # as the runtime has it
    base = Source("base", CONFIGS["golden"]["base/unet"])
    small = calls("base", Settings(size=(64, 64), keyframes=2))
    place = Watched("cpu", "float32")
    result = measure_network(base, {"_class_name": "DDPMScheduler"}, small, place, ["eager"], 3)["eager"]
    assert result.call and result.call.n == 3
    assert events == ["wait", "step, False", "wait"] * 5
    assert torch.backends.cudnn.benchmark


def test_a_network_that_fails_is_reported_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("too little memory\nsecond line")

    monkeypatch.setattr(DenoisingLoop, "step", fail)
    small = calls("base", Settings(size=(64, 64), keyframes=2))
    base = Source("base", CONFIGS["golden"]["base/unet"])
    result = measure_network(base, {"_class_name": "DDPMScheduler"}, small, CPU, ["eager"], 1)["eager"]
    assert result.call is None and result.failure == "OutOfMemoryError: too little memory"
    monkeypatch.setattr("bench.baseline.make_network", fail)  # which the network itself does not fit
    for kind, result in measure_network(base, {}, small, CPU, ["eager", "compile"], 1).items():
        assert result.call is None and result.failure == "OutOfMemoryError: too little memory", kind


@pytest.mark.parametrize("name", ["base", "vae_decoder"])
def test_a_network_is_gone_before_its_memory_is_given_back(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    collect, kept, gone = gc.collect, [], []

    def make(source: Source, place: Place) -> Any:
        module = make_network(source, place)
        kept.append(weakref.ref(module))
        return module

    monkeypatch.setattr("bench.baseline.make_network", make)
    monkeypatch.setattr(DenoisingLoop, "step", lambda *_: None)
    monkeypatch.setattr("bench.baseline._plain_call", lambda module, *_: partial(id, module))
    monkeypatch.setattr("bench.baseline.gc.collect", lambda: (collect(), gone.append(kept[0]() is None)))
    small = calls(name, Settings(size=(64, 64), keyframes=2))
    source = Source(name, CONFIGS["golden"]["base/unet" if name == "base" else "sr2/vae"])
    measure_network(source, {"_class_name": "DDPMScheduler"}, small, CPU, ["eager"], 1)
    assert gone == [True]


def test_a_baseline_whose_loop_cannot_be_made_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    make, made = DenoisingLoop.__init__, []

    def once(self: DenoisingLoop, *arguments: Any) -> None:
        made.append(self)
        if len(made) > 1:
            raise torch.OutOfMemoryError("too little memory")
        make(self, *arguments)

    monkeypatch.setattr(DenoisingLoop, "__init__", once)
    monkeypatch.setattr(DenoisingLoop, "step", lambda *_: None)
    small = calls("base", Settings(size=(64, 64), keyframes=2))
    base = Source("base", CONFIGS["golden"]["base/unet"])
    results = measure_network(base, {"_class_name": "DDPMScheduler"}, small, CPU, ["eager", "compile"], 1)
    assert results["eager"].call and results["eager"].call.n == 1
    assert results["compile"].failure == "OutOfMemoryError: too little memory"


def test_a_kind_is_not_begun_when_the_time_is_up_and_those_before_it_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter([True, False])
    monkeypatch.setattr(DenoisingLoop, "step", lambda *_: None)
    small = calls("base", Settings(size=(64, 64), keyframes=2))
    base = Source("base", CONFIGS["golden"]["base/unet"])
    results = measure_network(
        base,
        {"_class_name": "DDPMScheduler"},
        small,
        CPU,
        ["compile", "eager"],
        1,
        is_time_left=lambda: next(left),
    )
    assert results["eager"].call and results["compile"].failure == "the time was up"
