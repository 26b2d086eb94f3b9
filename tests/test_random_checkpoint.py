"""`export random-checkpoint`: the published format, in shards where it is large, and whole or not there."""

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from engines.catalog import CATALOG
from engines.errors import OutputError, SettingsError
from export import networks, random_checkpoint
from export.__main__ import main
from export.networks import Source

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of golden size, in shards of 256 KiB, so that the larger networks have several."""
    out = tmp_path_factory.mktemp("random") / "checkpoint"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_checkpoint, "_SHARD", 2**18)
        random_checkpoint.random_checkpoint(out)
    return out


@pytest.mark.parametrize("name", CATALOG)
def test_every_network_loads(checkpoint: Path, name: str) -> None:
    source = Source.find(CATALOG[name], checkpoint, "fp16")
    assert networks.load(source, "fp16", (576, 320)).graphs
    if name == "sr2":
        assert len(source.weights) > 1
        index = json.loads((source.folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {path.name for path in source.weights}


def test_the_same_seed_gives_the_same_weights(checkpoint: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        random_checkpoint.random_checkpoint(tmp_path / str(seed), seed=seed)
    first, again, other = (
        Source.find(CATALOG["clip"], folder, "fp16").fingerprint()["weights"]
        for folder in (checkpoint, tmp_path / "0", tmp_path / "1")
    )
    assert first == again != other


def test_a_checkpoint_is_renewed_where_its_networks_are_another_versions(tmp_path: Path) -> None:
    command = ["random-checkpoint", "--out", str(tmp_path / "some"), "--stage", "base", "--renew"]
    config = tmp_path / "some/base/unet/config.json"
    assert main(command) == 0
    written, made = config.read_bytes(), config.stat().st_mtime_ns
    assert main(command) == 0 and config.stat().st_mtime_ns == made
    config.write_text('{"in_channels": 4}')
    assert main(command) == 0 and config.read_bytes() == written
    assert [path.name for path in tmp_path.iterdir()] == ["some"]


def test_a_checkpoint_is_renewed_where_another_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def weights(**options: Any) -> str:
        random_checkpoint.random_checkpoint(tmp_path / "some", renew=True, **options)
        return Source.find(CATALOG["base"], tmp_path / "some", "fp16").fingerprint()["weights"]

    (tmp_path / "some").mkdir()  # empty
    first = weights(stages=["base"])
    assert weights(stages=["base"], seed=1) != first
    assert weights(stages=["base"]) == first
    assert not (tmp_path / "some/sr1/unet").exists()
    monkeypatch.chdir(tmp_path / "some")
    random_checkpoint.random_checkpoint(Path(), renew=True, stages=["base"], seed=2)
    assert weights(stages=["base"], seed=2) != first
    weights(stages=["sr1", "base"])
    assert (tmp_path / "some/sr1/unet/config.json").is_file()


@pytest.mark.parametrize("ours", [False, True], ids=["a folder of others", "beside a random checkpoint"])
def test_only_what_the_command_made_is_replaced(tmp_path: Path, ours: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a stamp it may be a random checkpoint of an older version, or a download of tens of gigabytes."""
    command = ["random-checkpoint", "--out", str(tmp_path / "some"), "--stage", "base"]
    assert not ours or main(command) == 0
    downloaded = tmp_path / "some/show-1-base/unet/config.json"
    downloaded.parent.mkdir(parents=True)
    downloaded.write_text("{}")
    assert main([*command, "--seed", "1", "--renew"]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / 'some'} holds other files, or a random checkpoint of an older version. Delete it" in said
    assert downloaded.read_text() == "{}"


def test_stages_alone_are_what_build_needs_for_them(tmp_path: Path) -> None:
    assert main(["random-checkpoint", "--out", str(tmp_path / "some"), "--stage", "base,sr1"]) == 0
    configs = {path.parent.relative_to(tmp_path / "some").as_posix() for path in tmp_path.rglob("unet/config.json")}
    assert configs == {"base/unet", "if2/unet", "sr1/unet"} and not (tmp_path / "some/base/text_encoder").exists()
    for name in ("base", "if2", "sr1"):
        assert Source.find(CATALOG[name], tmp_path / "some", "fp16").weights
    with pytest.raises(SettingsError, match="unknown stage sr3; allowed: all, text"):
        random_checkpoint.random_checkpoint(tmp_path / "other", stages=["sr3"])


def test_published_networks_have_the_published_numbers_of_parameters() -> None:
    """The UNets' shapes are compared one by one, with the original classes'."""
    totals = {
        folder: sum(shape.numel() for shape in random_checkpoint._shapes(folder, config).values())
        for folder, config in random_checkpoint.CONFIGS["published"].items()
    }
    assert round(totals["base/text_encoder"] / 1e6, 1) == 4762.3
    assert round(totals["sr2/text_encoder"] / 1e6, 1) == 340.4
    assert round(totals["sr2/vae"] / 1e6, 1) == 83.7


def test_what_exists_is_left_alone_and_a_full_disk_is_noticed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match=r"exists\. Choose a new folder"):
        random_checkpoint.random_checkpoint(tmp_path / "there")
    with pytest.raises(SettingsError, match="allowed: published, golden"):
        random_checkpoint.random_checkpoint(tmp_path / "new", "huge")
    monkeypatch.setattr(random_checkpoint.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9})())
    assert main(["random-checkpoint", "--size", "published", "--out", str(tmp_path / "new")]) == 1
    assert "24.2 GB needed, 1 GB free" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_checkpoint.cascade, "save_rest", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        random_checkpoint.random_checkpoint(tmp_path / "new")
    assert not list(tmp_path.iterdir())
