"""The demo's clips and captions, and its training: batches as the runtime makes them, runs that can be interrupted."""

import errno
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save

from engines.catalog import CATALOG
from engines.errors import CheckpointError, SettingsError
from export import configs, networks
from export.__main__ import main
from export.demo import cascade, stages
from export.demo.captions import evaluation_scenes, held_out, training_scenes, words
from export.demo.muon import Muon
from export.demo.scenes import HALF_HEIGHT, HALF_WIDTH, centres, lay_out, render
from export.demo.stages import Lesson, Pool
from export.demo.train import RECIPES, Run, Trainer, train
from export.modules.ops import attention, temporal_attention
from export.modules.unet import UNetContext, UNetStep
from export.networks import Source
from export.random_checkpoint import STAMP, random_checkpoint
from export.tokenizers import convert_clip, convert_t5
from export.unpack import unpack
from runtime.config import INTERP_FRAMES, Settings, stage_sizes
from runtime.ops import cross_fade, resize_bilinear
from runtime.schedulers import SchedulerConfig, make_schedule, predict_x0
from runtime.schedulers import add_noise as runtime_add_noise
from runtime.stages.text import MAX_TOKENS
from runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "checkpoint"
    random_checkpoint(folder)
    return folder


# Clips and captions


def test_training_never_shows_what_evaluation_asks_for() -> None:
    trained = {thing for scene, _ in training_scenes(2000, 0) for thing in scene.things}
    asked = {thing for scene, _ in evaluation_scenes(100, 0) for thing in scene.things}
    assert not any(map(held_out, trained))
    assert all(map(held_out, asked))
    # Every word of the questions is known from other combinations.
    for field in ("shape", "colour", "motion"):
        assert {getattr(thing, field) for thing in asked} <= {getattr(thing, field) for thing in trained}


def test_things_stay_in_the_frame_and_apart() -> None:
    scenes = [scene for scene, _ in training_scenes(400, 1)]
    clips = lay_out(scenes, 1)
    reach, there = clips.radius.amax(dim=2), clips.radius.amax(dim=2) > 0
    at = centres(clips, torch.arange(29.0).expand(len(scenes), -1))  # [B, 2 things, x and y, F]
    room = torch.tensor([HALF_WIDTH, HALF_HEIGHT]) - at.abs().amax(dim=3) - reach[..., None]
    assert room[there].min() >= 0
    between = (at[:, 0, 0] - at[:, 1, 0]).abs().amin(dim=1) - reach.sum(dim=1)
    assert between[there.all(dim=1)].min() >= 0


def test_small_frames_are_large_ones_averaged() -> None:
    scenes = [scene for scene, _ in training_scenes(12, 1)]
    clips, frames = lay_out(scenes, 1), torch.tensor([[0.0, 13.0, 28.0]]).expand(12, -1)
    small, large = render(clips, frames, (64, 40)), render(clips, frames, (512, 320))
    averaged = torch.nn.functional.avg_pool3d(large, (1, 8, 8))
    assert small.min() >= -1
    assert small.max() <= 1
    # Edges differ by how a pixel's share of a shape is estimated, most at sharp tips, the fine textures by their
    # residue. An eighth of a small frame's pixel to the side, and one pixel in a hundred would differ by 0.1.
    difference = (small - averaged).abs()
    assert difference.mean() < 0.008
    assert (difference > 0.1).float().mean() < 0.003
    assert (large[:, :, 0] - large[:, :, 1]).abs().mean() > 0.001


def test_caption_words_are_single_tokens_and_other_words_survive(checkpoint: Path) -> None:
    t5 = Tokenizer.from_text(convert_t5(checkpoint / "base" / "tokenizer"), "t5")
    clip = Tokenizer.from_text(convert_clip(checkpoint / "sr2" / "tokenizer"), "clip")
    assert t5.encode([" ".join(words())], MAX_TOKENS).attention_mask.sum() == len(words()) + 1
    for tokenizer in (t5, clip):
        ids, other = tokenizer.encode(["a panda, taking a selfie!", "a pandas, taking a selfie!"], MAX_TOKENS).input_ids
        assert (ids != other).any()
    assert 2 not in t5.encode(["a panda, taking a selfie!"], MAX_TOKENS).input_ids, "the id of what T5 does not know"


# The checkpoint


def test_every_network_is_of_the_published_format_and_all_fit_in_ten_megabytes(
    checkpoint: Path, tmp_path: Path
) -> None:
    for network in CATALOG.values():
        networks.load(Source.find(network, checkpoint, "fp32"), "fp32", (576, 320))
    assert sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors")) < 10e6
    cascade.pack(checkpoint, tmp_path / "packed.tar.xz")
    unpacked = unpack(tmp_path / "packed.tar.xz", tmp_path / "unpacked")
    for path in checkpoint.rglob("*.*"):
        if path.is_file() and path.name != STAMP:
            assert (unpacked / path.relative_to(checkpoint)).read_bytes() == path.read_bytes()


def test_a_checkpoint_recommends_guidance_and_strength(checkpoint: Path, tmp_path: Path) -> None:
    from export.build import recommended_settings

    assert recommended_settings(tmp_path, (576, 320)) == Settings()
    assert recommended_settings(checkpoint, (576, 320)) == replace(
        Settings().with_guidance(cascade.GUIDANCE), strength=cascade.STRENGTH
    )
    (tmp_path / "settings.json").write_text('{"guidance": {"base": 2.5, "sr9": 1}}')
    with pytest.raises(CheckpointError, match=r"settings\.json: unknown stage sr9"):
        recommended_settings(tmp_path, (576, 320))
    (tmp_path / "settings.json").write_text('{"strenght": 0.5}')
    with pytest.raises(CheckpointError, match=r"settings\.json: strenght: unknown; allowed: guidance, strength"):
        recommended_settings(tmp_path, (576, 320))


# Batches


def make(name: str, checkpoint: Path) -> Any:
    kinds: dict[str, type[stages.Stage]] = {
        "base": stages.Base,
        "if2": stages.FirstFrame,
        "interp": stages.Interp,
        "sr1": stages.Sr1,
        "sr2": stages.Sr2,
        "vae": stages.Vae,
    }
    torch.manual_seed(0)
    return kinds[name](Pool(4, 0, "cpu"), checkpoint)


def test_super_resolution_is_trained_on_the_runtimes_condition(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = make("sr1", checkpoint)
    stage.lesson = Lesson(1, (48, 32), 2)
    noise = torch.randn(2, 3, 2, 32, 48)
    left, top = torch.tensor([[0], [160]]), torch.tensor([[128], [20]])
    monkeypatch.setattr(stage, "random", lambda generator, *shape, like=None: noise)
    monkeypatch.setattr(stage, "window", lambda *_: (left, top, (48, 32)))
    index, numbers = torch.tensor([0, 3]), torch.tensor([[5.0, 6], [0, 1]])
    large, condition = stage.with_condition(index, numbers, torch.tensor([250, 250]), torch.Generator())
    small = resize_bilinear(stage.pool.frames(index, numbers, (64, 40)).numpy(), (160, 256))
    config = SchedulerConfig.from_dict(configs.NOISING, "test")
    whole = stage.pool.frames(index, numbers, (256, 160))
    for i in range(2):
        part = np.s_[i, :, :, top[i] : top[i] + 32, left[i] : left[i] + 48]
        torch.testing.assert_close(large[i], whole[part], rtol=0, atol=1e-5)
        theirs = runtime_add_noise(config, small[part], noise[i].numpy(), 250)
        np.testing.assert_allclose(condition[i], theirs, rtol=0, atol=1e-5)


def test_a_window_begins_with_its_first_frame_clean(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = make("sr1", checkpoint)
    stage.lesson = Lesson(1, (48, 32), 2)
    monkeypatch.setattr(stage, "random", lambda generator, *shape, like=None: torch.zeros_like(like))
    large, condition = stage.clip(torch.tensor([0, 3]), torch.tensor([250, 250]), torch.Generator().manual_seed(0))
    assert condition is not None and torch.equal(condition[:, :, 0], large[:, :, 0])
    assert not torch.equal(condition[:, :, 1], large[:, :, 1])


def test_parts_of_frames_lie_within_them_where_the_autoencoder_cuts(checkpoint: Path) -> None:
    stage = make("vae", checkpoint)
    stage.lesson = Lesson(1, (560, 304))
    index, numbers = torch.arange(4).repeat(100), torch.zeros(400, 1)
    left, top, size = stage.window(index, numbers, stages.FULL_SIZE, torch.Generator().manual_seed(0))
    assert size == (560, 304)
    for corner in (left, top):
        assert set(corner.flatten().tolist()) == {0, 8, 16}


def test_latents_are_seen_as_the_runtime_scales_them(checkpoint: Path) -> None:
    stage = make("sr2", checkpoint)
    stage.lesson = Lesson(1, (64, 64), 2)
    stage.vae = lambda frames: (torch.ones(len(frames), 4, 8, 8), torch.tensor(-99.0))
    latents, _ = stage.clip(torch.tensor([0]), None, torch.Generator().manual_seed(0))
    torch.testing.assert_close(latents, torch.full((1, 4, 2, 8, 8), 0.18215))


def test_captions_are_left_out_now_and_then(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = make("if2", checkpoint)
    stage.lesson = Lesson(1, (16, 8))
    for share, without in ((0.0, False), (1.0, True)):
        monkeypatch.setattr(stages, "NO_TEXT", share)
        _, _, embeds, _, _ = stage.draw(2, torch.Generator().manual_seed(0))
        assert torch.equal(embeds, stage.no_text.float().expand_as(embeds)) == without


def test_conditions_are_noised_as_in_a_run_or_by_other_levels(checkpoint: Path) -> None:
    stage = make("sr1", checkpoint)
    levels = stage.draw_levels(4000, torch.Generator().manual_seed(0))
    assert 0.45 < (levels == 250).float().mean() < 0.55
    assert levels.min() < 10 and 490 < levels.max() < 500


def test_interpolation_is_trained_on_the_runtimes_condition(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = make("interp", checkpoint)
    stage.lesson = Lesson(1, (16, 8), 5)
    monkeypatch.setattr(stage, "random", lambda generator, *shape, like=None: torch.zeros_like(like))
    clean, condition = stage.clip(torch.tensor([0, 1]), None, torch.Generator().manual_seed(0))
    assert condition is not None
    clean = clean.numpy()
    np.testing.assert_allclose(condition[:, :3], cross_fade(clean[:, :, 0], clean[:, :, -1], 5), rtol=0, atol=1e-6)
    assert (
        condition[:, 3].amax(dim=(-1, -2)).tolist()
        == condition[:, 3].amin(dim=(-1, -2)).tolist()
        == [[1, 0, 0, 0, 1]] * 2
    )


def test_the_target_gives_back_the_clean_clip_in_the_runtimes_schedule(checkpoint: Path) -> None:
    stage = make("if2", checkpoint)
    stage.lesson = Lesson(1, (16, 8))
    config = SchedulerConfig.from_dict(cascade.SCHEDULERS["if2"], "test")
    schedule = make_schedule(config, 1000)
    assert stage.timesteps == 1000
    sample, timestep, _, target, _ = stage.draw(6, torch.Generator().manual_seed(0))
    sample, target = sample[:, :3].numpy(), target.numpy()
    for i, number in enumerate(timestep.int().tolist()):
        index = schedule.timesteps.tolist().index(number)
        x0 = np.empty_like(target[i])
        predict_x0(sample[i], target[i], schedule.pred_weight[index], schedule.divisor[index], out=x0)
        assert np.abs(x0).max() < 1.001
        kept = stage.kept[number].item()
        noise = (sample[i] - x0 * kept**0.5) / (1 - kept) ** 0.5
        assert 0.8 < noise.std() < 1.2


def test_the_loss_is_the_error_of_the_clean_sample(checkpoint: Path) -> None:
    stage = make("base", checkpoint)
    stage.lesson = Lesson(1, (16, 8), 2)
    sample, timestep, embeds, target = stage.draw(3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = stage.loss(sample, timestep, embeds, target)
        predicted = UNetStep(stage.unet, 3)(sample, timestep, *UNetContext(stage.unet)(embeds))[0]
    kept = stage.kept[timestep.long()].reshape(-1, 1, 1, 1, 1)
    clean, given = (kept.sqrt() * sample - (1 - kept).sqrt() * v for v in (target, predicted))
    torch.testing.assert_close(loss, (given - clean).square().mean())


def test_single_pictures_train_the_same_parameters_without_the_layers_over_time(checkpoint: Path) -> None:
    stage = make("base", checkpoint)
    stage.prepare()
    stage.lesson = Lesson(1, (16, 8))
    batch = stage.draw(2, torch.Generator().manual_seed(0))
    # These layers begin as identities: both networks give the same until they are trained.
    with torch.no_grad():
        still, video = (
            UNetStep(unet, 3)(*batch[:2], *UNetContext(unet)(batch[2]))[0] for unet in (stage.still, stage.unet)
        )
    torch.testing.assert_close(still, video)
    names = {name for name, _ in stage.still.named_parameters()}
    for name, parameter in stage.unet.named_parameters():
        assert (name in names) == ("temp_" not in name)
        if name in names:
            assert stage.still.get_parameter(name) is parameter
    if2 = make("if2", checkpoint)
    assert if2.still is if2.unet


def test_weights_that_a_lesson_does_not_use_stay_as_they_are(checkpoint: Path) -> None:
    stage = make("base", checkpoint)
    recipe = replace(RECIPES["base"], lessons=(Lesson(1, (16, 8)),))
    before = {name: value.detach().clone() for name, value in stage.unet.named_parameters()}
    Trainer(stage, recipe, Run(0, 2, 4, 10)).advance()
    for name, value in stage.unet.named_parameters():
        assert torch.equal(value, before[name]) or "temp_" not in name, name
    assert not torch.equal(stage.unet.conv_in.weight, before["conv_in.weight"])


def test_timesteps_are_drawn_where_much_is_decided(checkpoint: Path) -> None:
    base = make("base", checkpoint)
    timesteps = base.draw_timesteps(4000, torch.Generator().manual_seed(0))
    assert timesteps.min() >= 0 and timesteps.max() < base.timesteps
    # Two thirds of three in four, and of the rest what anywhere means; uniform would be 0.27.
    assert 0.55 < ((timesteps > 670) & (timesteps < 940)).float().mean() < 0.63
    sr2 = make("sr2", checkpoint)
    timesteps = sr2.draw_timesteps(4000, torch.Generator().manual_seed(0))
    assert timesteps.min() >= 0 and timesteps.max() < stages.EXPERT_TIMESTEPS
    assert 0.55 < (timesteps < 300).float().mean() < 0.61


def test_slow_clips_are_parts_of_their_motions(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, shown = make("base", checkpoint), []
    monkeypatch.setattr(stage.pool, "frames", lambda index, numbers, size: shown.append(numbers))
    for speed in (0.0, 1.0):
        stage.lesson = Lesson(1, (16, 8), 8, speed=speed)
        stage.clip(torch.zeros(500, dtype=torch.long), None, torch.Generator().manual_seed(0))
    slow, full = shown
    assert (full == torch.arange(0, 29, 4.0)).all()
    assert slow.min() >= 0 and slow.max() <= 28
    spacing = slow.diff(dim=1)
    torch.testing.assert_close(spacing, spacing[:, :1].expand(-1, 7), rtol=0, atol=1e-4)
    assert spacing.min() < 0.1 and spacing.max() > 3.9


def test_a_stage_starts_from_the_weights_of_its_parent(checkpoint: Path) -> None:
    base, interp = cascade.load_network(checkpoint, "base"), make("interp", checkpoint)
    interp.inherit(base)
    filters = interp.unet.conv_in.weight
    torch.testing.assert_close(filters[:, :3], base.conv_in.weight, rtol=0, atol=0)
    assert not filters[:, 3:].any(), "cross-fade and mask are new"
    torch.testing.assert_close(interp.unet.conv_out.weight, base.conv_out.weight, rtol=0, atol=0)
    if2, sr1 = cascade.load_network(checkpoint, "if2"), make("sr1", checkpoint)
    sr1.inherit(if2)
    for name, value in if2.named_parameters():
        torch.testing.assert_close(sr1.unet.get_parameter(name), value, rtol=0, atol=0)


def test_every_stage_ends_with_what_the_runtime_asks_for() -> None:
    for name, recipe in RECIPES.items():
        assert sum(lesson.share for lesson in recipe.lessons) == pytest.approx(1)
        assert sum(recipe.plan(7)) == 7, name
    frames = {"base": Settings().keyframes, "interp": INTERP_FRAMES, "if2": 1, "sr1": Settings().sr1_window}
    for name, size in stage_sizes(Settings().size).items():
        last = RECIPES[name].lessons[-1]
        assert last.size == size, name
        assert last.frames == frames.get(name, last.frames), name  # sr2 sees as many as a training step's memory takes


def test_latents_are_brought_to_unit_deviation_without_changing_the_pictures(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = make("vae", checkpoint)
    stage.lesson = Lesson(1, (96, 64))
    image, _ = stage.draw(4, torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = stage.decoder(stage.encoder(image)[0])
        stage.finish(torch.Generator().manual_seed(2))
        mean, _ = stage.encoder(image)
        after = stage.decoder(mean)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-3)
    assert 0.5 < (mean * 0.18215).std() < 2
    assert abs(mean.mean() * 0.18215) < 0.5


@pytest.mark.parametrize("function", [attention, temporal_attention])
def test_attention_with_a_derivative_is_the_operators(function) -> None:
    q, k, v = torch.randn(3, 4, 5, 16).unbind()
    trained = function(q.clone().requires_grad_(), k, v, 2)
    torch.testing.assert_close(trained, function(q, k, v, 2))
    trained.sum().backward()


# Runs


@pytest.fixture(autouse=True)
def short_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "READING_STEPS", 2)


def weights(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lessons = (Lesson(0.6, (8, 8), 2), Lesson(0.4, (16, 8), 8))
    monkeypatch.setitem(RECIPES, "base", replace(RECIPES["base"], lessons=lessons))
    options = {"steps": 3, "batch": 2, "pool": 8, "report": lambda _: None}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, ["text", "base"], **options)
    calls = 0
    while not train(parts, ["text", "base"], stop_after=0.0, **options):  # one step a call
        calls += 1
        assert calls <= 6
        assert list((parts / "state").glob("*"))
    assert calls >= 4
    assert len(weights(whole)) == 3
    assert weights(whole) == weights(parts)


def test_a_run_is_not_continued_with_other_settings(tmp_path: Path) -> None:
    options = {"steps": 3, "pool": 8, "report": lambda _: None}
    assert not train(tmp_path, ["text"], batch=2, stop_after=0.0, **options)
    with pytest.raises(SettingsError, match=r"batch=2.*not.*batch=3.*Give the same options, or remove it"):
        train(tmp_path, ["text"], batch=3, **options)


def test_a_stage_in_progress_can_be_shipped_as_it_is(tmp_path: Path) -> None:
    options = {"steps": 1000, "pool": 8, "batch": 2, "report": lambda _: None}
    assert not train(tmp_path, ["text"], stop_after=0.0, **options)
    assert train(tmp_path, ["text"], ship=True, **options)
    assert cascade.has_network(tmp_path, "clip")
    assert not list((tmp_path / "state").glob("*"))


def test_averaged_weights_are_shipped(tmp_path: Path, checkpoint: Path) -> None:
    trainer = Trainer(make("base", checkpoint), RECIPES["base"], Run(0, 2, 4, 10))
    trainer.average["networks.base.conv_in.bias"].fill_(0.25)
    trainer.finish(tmp_path)
    assert (cascade.load_network(tmp_path, "base").conv_in.bias == 0.25).all()


def test_a_state_is_written_while_a_stage_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.demo.train._REPORT_EVERY", 0.0)
    kept: list[bool] = []
    options = {"steps": 3, "pool": 8, "batch": 1, "save_every": 0.0}
    state = tmp_path / "state" / "text.safetensors"
    assert train(tmp_path, ["text"], report=lambda _: kept.append(state.is_file()), **options)
    assert kept == [False, False, True, True], "before the steps, and after each"


def test_nothing_is_packed_before_all_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = tmp_path / "x.tar.xz"
    command = ["train-demo", "--stage", "text", "--steps", "1", "--pool", "4", "--batch", "1"]
    assert main([*command, "--out", str(tmp_path / "out"), "--pack", str(packed)]) == 0
    assert "x.tar.xz: not written yet, for want of vae, base, interp," in capsys.readouterr().out
    assert not packed.exists()


def test_an_autoencoder_is_finished_from_its_state(tmp_path: Path) -> None:
    options = {"steps": 2, "pool": 8, "batch": 1, "report": lambda _: None}
    assert not train(tmp_path, ["vae"], stop_after=0.0, **options)
    assert train(tmp_path, ["vae"], ship=True, **options)
    assert cascade.has_network(tmp_path, "vae")
    # The last step's state is a finished one.
    assert train(tmp_path / "other", ["text"], steps=1, pool=8, batch=1, stop_after=0.0, report=lambda _: None)


@pytest.mark.parametrize("bad", [[2], range(30)], ids=["one batch", "all"])
def test_batches_whose_loss_is_not_a_number_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: Sequence[int]
) -> None:
    """One spoilt an autoencoder on a GPU once; it was shipped, rounded to zeros."""
    steps = count()
    loss_before = stages.Text.loss

    def loss(self: stages.Text, *batch: torch.Tensor) -> torch.Tensor:
        return loss_before(self, *batch) * (float("nan") if next(steps) in bad else 1)

    monkeypatch.setattr(stages.Text, "loss", loss)
    monkeypatch.setattr("export.demo.train._REPORT_EVERY", 0.0)
    lines: list[str] = []
    options = {"steps": 15, "pool": 8, "batch": 2, "report": lines.append}
    if len(bad) == 1:
        assert train(tmp_path, ["text"], **options)
        assert sum("batches skipped: 1" in line for line in lines) == 1
        assert not any("nan" in line for line in lines)
        assert all(w.isfinite().all() for w in cascade.load_network(tmp_path, "clip").state_dict().values())
    else:
        for steps_asked, steps_lost in ((15, 10), (3, 3)):
            with pytest.raises(SettingsError, match=f"text: the loss has not been a number for {steps_lost} steps, at"):
                train(tmp_path / str(steps_asked), ["text"], **{**options, "steps": steps_asked})
            assert not cascade.has_network(tmp_path / str(steps_asked), "clip")


@pytest.mark.parametrize("value", [1e5, 65504.0, math.nan], ids=["beyond float16", "rounded up", "not a number"])
def test_weights_that_are_not_finite_are_not_shipped(
    tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if math.isnan(value):  # as a GPU writes it: rounding makes a zero of it
        bits = torch.tensor(0x7FFF, dtype=torch.int16).view(torch.float16)
        monkeypatch.setattr(torch.Tensor, "half", lambda self: bits.expand(self.shape))
    network = cascade.make_network("clip")
    with torch.no_grad():
        next(network.parameters()).fill_(value)
    with pytest.raises(CheckpointError, match=r"clip: .* is not finite in float16"):
        cascade.save_network(tmp_path, "clip", network)
    assert not cascade.has_network(tmp_path, "clip")


def test_a_state_or_checkpoint_of_another_version_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    lines: list[str] = []
    options = {"steps": 3, "pool": 8, "batch": 2, "report": lines.append}
    assert not train(tmp_path, ["text"], stop_after=0.0, **options)
    state = tmp_path / "state" / "text.safetensors"
    assert not train(tmp_path, ["text"], stop_after=0.0, init=checkpoint, **options)
    assert f"text: continues from {state}, --init is not read" in lines
    with safe_open(state, framework="pt") as file:
        tensors, about = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    fewer = {key: value for key, value in tensors.items() if key != min(k for k in tensors if k.startswith("weights"))}
    for content in (
        b"cut short",
        save({"weights/other": torch.zeros(1)}, about),
        save(fewer, about),
        save(tensors, {"about": "{}"}),
    ):
        state.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"text\.safetensors is damaged, or another version's"):
            train(tmp_path, ["text"], **options)
    state.unlink()
    shutil.copytree(checkpoint, tmp_path / "old")
    weights = tmp_path / "old/base/text_encoder/model.safetensors"
    weights.write_bytes(save({"shared.weight": torch.zeros(1)}))
    damaged = r"base.text_encoder.model\.safetensors: another version's network, or damaged"
    with pytest.raises(CheckpointError, match=damaged):
        train(tmp_path, ["text"], init=tmp_path / "old", **options)
    (tmp_path / "old/base/unet/diffusion_pytorch_model.safetensors").unlink()  # else it is finished
    with pytest.raises(CheckpointError, match=damaged):
        train(tmp_path / "old", ["base"], **options)


def test_what_is_no_part_of_a_checkpoint_is_not_packed(tmp_path: Path, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "trained")
    for stray in ("state/base.safetensors", "train.log"):
        (tmp_path / "trained" / stray).parent.mkdir(exist_ok=True)
        (tmp_path / "trained" / stray).write_bytes(b"")
    for folder in (checkpoint, tmp_path / "trained"):
        cascade.pack(folder, tmp_path / f"{folder.name}.tar.xz")
    assert (tmp_path / "trained.tar.xz").read_bytes() == (tmp_path / "checkpoint.tar.xz").read_bytes()


def test_folders_are_made_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[Path] = []
    monkeypatch.setattr("export.demo.train.train", lambda out, *_, **__: trained.append(out))
    command = ["train-demo", "--stage", "text", "--steps", "1", "--out"]
    assert main([*command, str(tmp_path / "out"), "--pack", str(tmp_path / "new" / "x.tar.xz")]) == 0
    assert trained == [tmp_path / "out"] and (tmp_path / "new").is_dir()
    (tmp_path / "file").touch()
    for out, pack in ((tmp_path / "out", tmp_path / "file" / "x.tar.xz"), (tmp_path / "file", tmp_path / "x.tar.xz")):
        assert main([*command, str(out), "--pack", str(pack)]) == 1
        assert f"{tmp_path / 'file'}: cannot be made or written" in capsys.readouterr().err

    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("export.demo.train.tempfile.TemporaryFile", refuse)
    assert main([*command, str(tmp_path / "out")]) == 1
    assert "out: cannot be made or written (Permission denied)" in capsys.readouterr().err
    assert len(trained) == 1


def test_training_goes_on_from_a_finished_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lessons = (Lesson(0.5, (8, 8), 1), Lesson(0.25, (16, 8), 1), Lesson(0.25, (16, 8), 2))
    monkeypatch.setitem(RECIPES, "base", replace(RECIPES["base"], lessons=lessons))
    seen: list[tuple[Lesson, torch.Tensor]] = []
    draw = stages.Base.draw

    def record(stage: stages.Base, *arguments: Any) -> Any:
        seen.append((stage.lesson, stage.unet.conv_in.weight.detach().clone()))
        return draw(stage, *arguments)

    monkeypatch.setattr(stages.Base, "draw", record)
    options = {"steps": 2, "batch": 2, "pool": 8, "report": lambda _: None}
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(first, ["text", "base"], **options)
    seen.clear()
    assert train(second, ["text", "base"], init=first, skip_lessons=1, **options)
    assert [(*lesson.size, lesson.frames) for lesson, _ in seen] == [(16, 8, 1), (16, 8, 2)]
    assert torch.equal(seen[0][1], cascade.load_network(first, "base").conv_in.weight)
    with pytest.raises(CheckpointError, match=r"safetensors.*--init needs a finished demo checkpoint"):
        train(tmp_path / "third", ["text"], init=tmp_path / "nothing", **options)


def test_pictures_beside_clips_are_learned_from_in_the_same_step(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stages.Base(Pool(4, 0, "cpu"), checkpoint)
    lesson = Lesson(1, (16, 8), 2, batch=0.5, beside=Lesson(0, (24, 8), batch=1.5))
    seen: list[tuple[tuple[int, ...], torch.Tensor]] = []
    loss = stage.loss

    def record(*batch: torch.Tensor) -> torch.Tensor:
        found = loss(*batch)
        seen.append((tuple(batch[3].shape), found.detach()))
        return found

    monkeypatch.setattr(stage, "loss", record)
    trainer = Trainer(stage, replace(RECIPES["base"], lessons=(lesson,), batch=2), Run(0, 2, 4, 1))
    whole = trainer.advance()
    assert [shape for shape, _ in seen] == [(1, 3, 2, 8, 16), (3, 3, 1, 8, 24)]
    assert whole == torch.stack([one for _, one in seen]).mean()
    changed = [name for name, value in trainer.weights.items() if not torch.equal(value, trainer.average[name])]
    assert any("temp" in name for name in changed), "what pictures leave out is learned from the clips"


def test_smaller_batches_take_shorter_steps(checkpoint: Path) -> None:
    rates = {}
    for batch in (2, 8, 32):
        recipe = replace(RECIPES["base"], lessons=(Lesson(1, (16, 8)),), batch=8)
        trainer = Trainer(stages.Base(Pool(4, 0, "cpu"), checkpoint), recipe, Run(0, batch, 4, 2))
        trainer.advance()
        rates[batch] = [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers]
    assert rates[2] == pytest.approx([rate / 2 for rate in rates[8]])
    assert rates[32] == rates[8]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"skip_lessons": -1}, "lessons to skip: -1; allowed: 0 or more"),
        ({"stop_after": float("nan")}, "stop after: nan; allowed: 0 or more"),
        ({"seed": -1}, "seed: -1; allowed: 0 to 4294967295"),
        ({"steps": 0}, r"steps: 0; allowed: above 0\."),
        ({"minutes": float("nan"), "steps": None}, r"minutes: nan; allowed: above 0\."),
        ({"minutes": -1.0, "steps": None}, r"minutes: -1\.0; allowed: above 0\."),
        ({"stop_after": -1.0}, r"stop after: -1\.0; allowed: 0 or more"),
        ({"batch": 0}, "batch: 0; allowed"),
        ({"pool": 0}, "pool: 0; allowed"),
    ],
)
def test_numbers_that_train_nothing_are_refused(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        train(tmp_path, ["text"], **{"steps": 1, "pool": 4, "report": lambda _: None, **wrong})
    assert not list(tmp_path.iterdir())


def test_a_stage_asks_for_what_it_builds_on(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Train text, for sr2 vae too"):
        train(tmp_path, ["base"], steps=1, pool=4, report=lambda _: None)


def test_the_time_of_every_lesson_is_turned_into_steps_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(RECIPES["text"], lessons=(Lesson(0.5, (1, 1)), Lesson(0.5, (1, 1), batch=2.0)))
    monkeypatch.setitem(RECIPES, "text", recipe)
    lines: list[str] = []
    assert train(tmp_path, ["text"], minutes=0.02, batch=1, pool=4, report=lines.append)
    planned = [line for line in lines if "steps planned" in line]
    assert [line.split(": ")[1] for line in planned] == ["lesson 1", "lesson 2"]
    assert "text: step" in lines[-1] and "100.0% of the training" in lines[-1]


def test_calls_that_end_at_once_plan_their_lessons_all_the_same(tmp_path: Path) -> None:
    lines: list[str] = []
    options = {"minutes": 0.001, "batch": 1, "pool": 4, "stop_after": 0.0, "report": lines.append}
    for _ in range(8):
        if train(tmp_path, ["text"], **options):
            break
    assert cascade.has_network(tmp_path, "clip")
    assert sum("steps planned" in line for line in lines) == 1


def test_a_stage_is_trained_by_one_process_at_a_time(tmp_path: Path) -> None:
    options = {"steps": 1, "batch": 1, "pool": 4}
    refused: list[str] = []

    def meanwhile(_: str) -> None:
        with pytest.raises(SettingsError, match=r"another process trains text\. Wait until") as caught:
            train(tmp_path, ["text"], report=pytest.fail, **options)
        refused.append(str(caught.value))

    assert train(tmp_path, ["text"], report=meanwhile, **options) and refused
    with FileLock(tmp_path / ".text.lock"):  # nobody waits for a stage that is finished
        assert train(tmp_path, ["text"], report=lambda line: refused.append(line), **options)
    assert refused[-1] == "text: finished before"


def test_a_stage_waits_for_its_parent(tmp_path: Path) -> None:
    options = {"steps": 1, "batch": 1, "pool": 4, "report": lambda _: None}
    assert train(tmp_path, ["text"], **options)
    with pytest.raises(CheckpointError, match=r"interp starts from base's weights. Train that first"):
        train(tmp_path, ["interp"], **options)


def test_a_lesson_that_was_planned_too_short_leaves_its_time_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first 30 steps take 1 s each, all others 0.5 s."""
    recipe = replace(RECIPES["text"], lessons=(Lesson(0.5, (1, 1)), Lesson(0.5, (1, 1))))
    monkeypatch.setitem(RECIPES, "text", recipe)
    monkeypatch.setattr(
        "export.demo.train._now", lambda trainer: min(trainer.step, 30) + 0.5 * max(0, trainer.step - 30)
    )
    lines: list[str] = []
    assert train(tmp_path, ["text"], minutes=80 / 60, batch=1, pool=4, report=lines.append)
    planned = [int(line.split()[-3]) for line in lines if "steps planned" in line]
    assert planned[0] == 40  # of 40 s, 10 were left at 1 s each
    assert planned[1] == 90  # begun after 35 s, so it has 45


def test_a_lesson_is_not_planned_by_a_busy_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take 10 ms, of which a card has done 30 in a moment; the first 40 take ten times as long."""
    recipe = replace(RECIPES["text"], lessons=(Lesson(1.0, (1, 1)),))
    monkeypatch.setitem(RECIPES, "text", recipe)
    monkeypatch.setattr(
        Trainer, "advance", lambda trainer: setattr(trainer, "step", trainer.step + 1) or torch.ones(())
    )
    monkeypatch.setattr(
        "export.demo.train._now", lambda trainer: 0.1 * min(trainer.step, 40) + 0.01 * max(0, trainer.step - 40)
    )
    lines: list[str] = []
    assert train(tmp_path, ["text"], minutes=200 / 60, batch=1, pool=4, report=lines.append)
    (planned,) = (int(line.split()[-3]) for line in lines if "steps planned" in line)
    assert planned > 5000, "by the first 30 steps alone 2000"


def test_a_state_saved_among_the_timed_steps_is_none_of_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps take 1 s, a save 20."""
    now = 0.0

    def advance(trainer: Trainer) -> torch.Tensor:
        nonlocal now
        now += 1
        return step(trainer)

    def save(trainer: Trainer, path: Path) -> None:
        nonlocal now
        now += 20
        write(trainer, path)

    step, write = Trainer.advance, Trainer.save
    monkeypatch.setattr(Trainer, "advance", advance)
    monkeypatch.setattr(Trainer, "save", save)
    monkeypatch.setattr("export.demo.train._now", lambda _: now)
    lines: list[str] = []
    assert train(tmp_path, ["text"], minutes=2, batch=1, pool=4, save_every=15.0, report=lines.append)
    (planned,) = (line for line in lines if "steps planned" in line)
    assert planned.startswith("text: lesson 1: 1.000 s a step")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs torch's CUDA build")
def test_a_captured_step_learns_what_a_plain_one_does(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_trainer() -> Trainer:
        torch.manual_seed(0)
        lesson = Lesson(1, (16, 8), 2, beside=Lesson(0, (16, 8)))
        recipe = replace(RECIPES["base"], lessons=(lesson,), bfloat16=False)
        return Trainer(stages.Base(Pool(4, 0, "cuda"), checkpoint), recipe, Run(0, 2, 4, 12))

    captured, plain = make_trainer(), make_trainer()
    for _ in range(12):
        # From one state in every step: Muon makes so much of rounding that two runs part, by 12 % of the way in these.
        first = {key: value.detach().clone() for key, value in captured.tensors().items()}
        with torch.no_grad():
            for key, value in plain.tensors().items():
                value.copy_(first[key])
        for trainer, plain_steps in ((captured, 3), (plain, 12)):
            monkeypatch.setattr("export.demo.train._EAGER_STEPS", plain_steps)
            trainer.advance()
        for kind in ("weights", "average"):
            ours, theirs = getattr(captured, kind), getattr(plain, kind)
            moved = torch.stack([(theirs[n] - first[f"{kind}/{n}"]).norm() for n in theirs]).norm()
            apart = torch.stack([(theirs[n] - ours[n]).norm() for n in theirs]).norm()
            assert moved > 0 and apart < 0.05 * moved  # sums in another order


def test_muon_moves_matrices_as_torch_does() -> None:
    random = torch.Generator().manual_seed(0)
    shapes = [(4, 9), (4, 9), (9, 4), (6, 6), (4, 9)]
    first = [torch.randn(shape, generator=random) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in first] for _ in range(2))
    optimizers = Muon(ours, lr=0.03, weight_decay=0.01), torch.optim.Muon(theirs, lr=0.03, weight_decay=0.01)
    for step in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=random)
            b.grad = a.grad.clone()
        if step == 2:
            ours[1].grad = theirs[1].grad = None  # unused in this step
        for optimizer in optimizers:
            optimizer.step()
    for a, b, start in zip(ours, theirs, first, strict=True):
        assert (a - b).norm() < 0.01 * (b - start).norm()  # the iteration is in bfloat16
