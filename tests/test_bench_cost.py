"""The cost of presets: what is counted, what steps and guidance save, and what the command prints."""

import json
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.work import PUBLISHED_FLOP, SHALLOW_FLOP, published_flop, step_counts
from runtime.config import DIFFUSION_STAGES, PRESETS, Settings


def pflop(settings: Settings) -> float:
    return sum(published_flop(settings).values()) / 1e15


def test_the_reference_costs_what_was_counted_on_the_authors_code() -> None:
    assert pflop(Settings()) == pytest.approx(19.72, abs=0.005)
    shares = {stage: flop / 1e15 / pflop(Settings()) for stage, flop in published_flop(Settings()).items()}
    assert max(shares, key=shares.__getitem__) == "sr1" and shares["sr1"] == pytest.approx(0.663, abs=1e-3)


def test_the_fast_preset_takes_an_eighth() -> None:
    assert pflop(Settings()) / pflop(Settings().with_preset("fast")) == pytest.approx(8, abs=0.2)


def test_presets_fall_in_cost() -> None:
    costs = [pflop(Settings().with_preset(preset)) for preset in PRESETS]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("stage", DIFFUSION_STAGES)
def test_a_step_without_guidance_is_half_a_step(stage: str) -> None:
    whole = Settings().with_steps({stage: 20})
    steps = step_counts(whole)[stage]
    assert steps == (16 if stage == "sr2" else 20)

    def unet(settings: Settings) -> float:
        """FLOP of the stage's UNet, in steps with guidance."""
        others = published_flop(whole)[stage] - steps * per_step
        return (published_flop(settings)[stage] - others) / per_step

    per_step = (published_flop(whole)[stage] - published_flop(whole.with_steps({stage: 15}))[stage]) / (steps / 4)
    assert per_step % PUBLISHED_FLOP[stage] == 0  # 7 gaps, 4 windows
    assert unet(whole) == steps
    assert unet(whole.with_guided({stage: (0, 0.25)})) == steps * 0.625
    assert unet(whole.with_guidance({stage: 1.0})) == unet(whole.with_guided({stage: (0.5, 0.5)})) == steps / 2


@pytest.mark.parametrize("stage", DIFFUSION_STAGES)
def test_steps_that_reuse_deep_features_count_as_shallow(stage: str) -> None:
    whole = Settings().with_steps({stage: 20})
    steps = step_counts(whole)[stage]
    saved = published_flop(whole)[stage] - published_flop(whole.with_cache({stage: 2}))[stage]
    runs = {"interp": 7, "sr1": 4}.get(stage, 1)
    assert saved == runs * steps // 2 * (PUBLISHED_FLOP[stage] - SHALLOW_FLOP[stage])


@pytest.mark.torch
def test_shallow_work_is_what_torch_counts() -> None:
    torch = pytest.importorskip("torch", reason="needs the export extra")
    from bench.work import count_flop, reference_calls
    from export.modules.unet import UNetConfig, UNetContext, UNetShallow, UNetStep, VideoUNet
    from export.random_checkpoint import CONFIGS

    for name, folder in {**{n: n for n in DIFFUSION_STAGES}, "interp": "interpolation"}.items():
        batch, channels, frames, *pixels = reference_calls(Settings(), step_counts(Settings()), 4, 8)[name].shape
        with torch.device("meta"):
            unet = VideoUNet(UNetConfig.from_dict(CONFIGS["published"][f"{folder}/unet"], name))
            noise = 4 if name == "sr2" else 3
            if name != "if2":  # the others' schedulers read no variance
                unet.drop_variance(noise)
            levels = [torch.empty(batch)] if unet.config.class_embed_type else []
            made = UNetContext(unet)(torch.empty(batch, 77, unet.config.text_dim), *levels)
            sample, timestep = torch.empty(batch, channels, frames, *pixels), torch.empty(batch)
            deep = torch.empty(batch, unet.deep_channels, frames, *pixels)
            read = made if unet.finest_attends else made[1:]
            shallow = UNetShallow(unet, noise)
            assert (
                count_flop(lambda given=(sample, timestep, deep, *read), run=shallow: run(*given)) == SHALLOW_FLOP[name]
            )
            assert UNetStep(unet, noise)(sample, timestep, *made)[-1].shape == deep.shape


def test_the_size_of_the_video_does_not_count() -> None:
    assert published_flop(Settings(size=(112, 64), keyframes=2)) == published_flop(Settings())


def test_the_command_prints_and_keeps_every_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cost.json"
    assert main(["cost", "--out", str(out), "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert "| preset | text | base | interp | if2 | sr1 | sr2 | all | times cheaper |" in printed
    assert "| reference | 75 | 75 | 70 | 125 | 40 |" in printed
    assert "20, logsnr, guided 0-0.5" in printed
    presets = json.loads(out.read_text())["presets"]
    assert list(presets) == list(PRESETS)
    assert Settings.from_dict(presets["fast"]["settings"]) == Settings().with_preset("fast")
    assert (tmp_path / "cost-stages.svg").is_file() and out.with_suffix(".md").is_file()
