"""Settings: what presets and options change and what they leave, and settings as a manifest keeps them."""

import json
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from engines.errors import SettingsError
from runtime.config import DIFFUSION_STAGES, PRESETS, Settings, StageSettings, stage_sizes

# A bundle's own, unlike the reference in everything.
OWN = Settings(
    **{stage: StageSettings(33, 2.5, (0.1, 0.9), "trailing", 3) for stage in DIFFUSION_STAGES},
    keyframes=3,
    size=(288, 160),
    strength=0.5,
    if2_noise_level=100,
    sr1_noise_level=200,
    sr1_window=5,
    fps=12,
)


def test_the_settings_of_these_tests_are_unlike_the_reference_in_everything() -> None:
    for one, other in ((OWN, Settings()), *((getattr(OWN, s), getattr(Settings(), s)) for s in DIFFUSION_STAGES)):
        assert not [field.name for field in fields(one) if getattr(one, field.name) == getattr(other, field.name)]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_leaves_what_it_does_not_name(preset: str) -> None:
    changed = OWN.with_preset(preset)
    others = {field.name for field in fields(Settings)} - set(DIFFUSION_STAGES)
    assert all(getattr(changed, name) == getattr(OWN, name) for name in others)
    assert all(getattr(changed, stage).guidance_scale == 2.5 for stage in DIFFUSION_STAGES)
    if preset != "fast":
        assert all(getattr(Settings().with_preset(preset), stage).cache_interval == 1 for stage in DIFFUSION_STAGES)
        assert all(getattr(changed, stage).cache_interval == 3 for stage in DIFFUSION_STAGES)
        assert all(getattr(changed, stage).guided == (0.1, 0.9) for stage in DIFFUSION_STAGES)
        assert all(getattr(changed, stage).spacing == "trailing" for stage in DIFFUSION_STAGES)
    assert (changed == OWN) == (preset == "reference")


def test_fast_has_fewer_steps_where_they_matter_least_and_keeps_the_noise_that_sr2_begins_at() -> None:
    fast = OWN.with_preset("fast")
    assert all(
        getattr(fast, s).num_inference_steps < getattr(Settings(), s).num_inference_steps for s in DIFFUSION_STAGES
    )
    assert {stage for stage in DIFFUSION_STAGES if getattr(fast, stage).cache_interval == 2} == {"interp", "sr1"}
    assert [getattr(fast, stage).spacing for stage in DIFFUSION_STAGES] == ["logsnr"] * 4 + ["trailing"]


def test_options_win_over_the_preset() -> None:
    settings = Settings().with_options(
        preset="fast",
        steps="sr1=9",
        guidance="base=3",
        guided="base=0.2-0.7,sr1=1",
        spacing="sr1=linspace",
        cache="sr1=1",
    )
    assert settings.sr1 == StageSettings(9, 7.0, (0.0, 1.0), "linspace")
    fast = Settings().with_preset("fast")
    assert settings.base == replace(fast.base, guidance_scale=3.0, guided=(0.2, 0.7))
    assert settings.interp == fast.interp


def test_settings_come_back_from_json_and_from_manifests_that_know_less() -> None:
    assert Settings.from_dict(json.loads(json.dumps(OWN.to_dict()))) == OWN
    old = {"num_inference_steps": 75, "guidance_scale": 9.0}
    assert Settings.from_dict({"base": old}) == Settings()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"base": StageSettings(7.5, 9.0)}, r"steps of base: 7\.5; allowed"),  # type: ignore[arg-type]
        ({"base": StageSettings(7.0, 9.0)}, r"steps of base: 7\.0; allowed"),  # type: ignore[arg-type]
        ({"if2_noise_level": 1.5}, r"if2_noise_level: 1\.5; allowed"),
        ({"sr1_noise_level": -1}, r"sr1_noise_level: -1; allowed: a timestep of the training, 0 or more"),
        ({"sr1_noise_level": True}, r"sr1_noise_level: True; allowed"),
        ({"base": StageSettings(7, "9")}, r"settings that cannot be read \("),  # type: ignore[arg-type]
        ({"base": StageSettings(7, 9.0, (0, 1, 2))}, r"settings that cannot be read \("),  # type: ignore[arg-type]
        ({"size": 576}, r"settings that cannot be read \("),
        ({"strength": "x"}, r"settings that cannot be read \("),
        ({"fps": None}, r"settings that cannot be read \("),
        ({"base": None}, r"settings that cannot be read \("),
        ({"base": StageSettings(7, -1.0)}, r"guidance of base: -1\.0; allowed: 0 to 1000"),
        ({"base": StageSettings(7, 1e308)}, r"guidance of base: 1e\+308; allowed: 0 to 1000"),
        ({"keyframes": 5.0}, r"keyframes: 5\.0; allowed"),
        ({"strength": 0}, "strength: 0; allowed: above 0, up to 1"),
        ({"sr1_window": 1}, "sr1_window: 1; allowed: 2 or more frames"),
        ({"size": "big"}, r"size: 'big'; allowed: \(width, height\) in pixels"),
        ({"size": (64.0, 64)}, r"size: \(64\.0, 64\); allowed"),
        ({"size": (8200, 64)}, "size 8200x64; allowed: width and height in multiples of 8, from 64 to 8192"),
        ({"sr1": StageSettings(7, 9.0, spacing="karras")}, "spacing of sr1: 'karras'; allowed: linspace"),
        ({"fps": 1001}, "fps: 1001; allowed: 1 to 1000"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_said(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings(**wrong)


@pytest.mark.parametrize(
    ("size", "base"),
    [((576, 320), (64, 40)), ((432, 240), (48, 32)), ((1152, 640), (128, 80)), ((64, 64), (8, 8))],
)
def test_stages_have_the_ratios_of_the_reference(size: tuple[int, int], base: tuple[int, int]) -> None:
    sr1 = (4 * base[0], 4 * base[1])
    assert stage_sizes(size) == {"base": base, "interp": base, "if2": sr1, "sr1": sr1, "sr2": size}


@pytest.mark.parametrize("wrong", [None, "{}", {"size": 576}])
def test_what_are_no_settings_are_refused(wrong: Any) -> None:
    with pytest.raises(SettingsError):
        Settings.from_dict(wrong)


def test_numbers_of_numpy_are_written_as_plain_ones() -> None:
    settings = Settings(keyframes=np.int64(5), strength=np.float32(0.5))  # type: ignore[arg-type]
    assert json.loads(json.dumps(settings.to_dict())) == Settings(keyframes=5, strength=0.5).to_dict()
    arrays = Settings(size=np.array([576, 320])).with_guided({"sr1": np.array([0.25, 0.5])})  # type: ignore[arg-type]
    assert arrays.to_dict() == Settings().with_guided({"sr1": (0.25, 0.5)}).to_dict()


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(SettingsError, match="unknown preset 'best'; allowed: reference, quick, fast, draft"):
        Settings().with_preset("best")


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(SettingsError, match="unknown option stepz; allowed: preset, keyframes, size, steps, guidance,"):
        Settings().with_options(preset="draft", stepz="base=4")
