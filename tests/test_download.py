"""`export download` of a hub that is not there: which files it asks for, and what it says of what cannot be had."""

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("torch", reason="needs the export extra")

from engines.errors import CheckpointError
from export import download as module
from export.download import download

FILES = [
    "README.md",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "scheduler/scheduler_config.json",
    "safety_checker/model.safetensors",
]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Repository -> the files that were asked for."""
    asked: dict[str, list[str]] = {}
    monkeypatch.setattr(module, "HfApi", lambda: SimpleNamespace(list_repo_files=lambda _: FILES))
    monkeypatch.setattr(
        module, "snapshot_download", lambda name, allow_patterns, local_dir: asked.update({name: allow_patterns})
    )
    return asked


@pytest.mark.parametrize(("precision", "weights"), [("fp16", "model.fp16.safetensors"), ("fp32", "model.safetensors")])
def test_only_what_a_build_reads_is_fetched(
    asked: dict[str, list[str]], tmp_path: Path, precision: str, weights: str
) -> None:
    download(tmp_path, ["interp"], precision)
    wanted = ["scheduler/scheduler_config.json", "unet/config.json", f"unet/diffusion_pytorch_{weights}"]
    assert asked == {"showlab/show-1-interpolation": wanted}


def test_a_repository_without_weights_is_told(
    asked: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [file for file in FILES if not file.endswith((".safetensors", ".bin"))]
    monkeypatch.setattr(module, "HfApi", lambda: SimpleNamespace(list_repo_files=lambda _: others))
    with pytest.raises(
        CheckpointError, match=r"show-1-interpolation has no weights in unet, neither \.safetensors nor"
    ):
        download(tmp_path, ["interp"])
    assert not asked


def test_a_hub_out_of_reach_is_told_whatever_its_transport_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ConnectError(Exception):
        """Of a library that is not ours to name."""

    def refuse(_repository: str) -> None:
        raise ConnectError("connection refused")

    monkeypatch.setattr(module, "HfApi", lambda: SimpleNamespace(list_repo_files=refuse))
    with pytest.raises(CheckpointError, match=r"cannot be fetched \(connection refused\)\. Check the connection"):
        download(tmp_path, ["interp"])
