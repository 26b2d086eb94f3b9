"""`export download` of a hub that is not there: which files it asks for, and what it says of what cannot be had."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast
from urllib.parse import urlsplit

import pytest
from conftest import ROOT

pytest.importorskip("torch", reason="needs the export extra")

from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

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
def published(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What every repository holds; a test may change it."""
    files = list(FILES)
    hub = SimpleNamespace(list_repo_files=lambda _: files, auth_check=lambda _: None)
    monkeypatch.setattr(module, "HfApi", lambda: hub)
    return files


@pytest.fixture
def asked(published: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Repository -> the files that were asked for."""
    asked: dict[str, list[str]] = {}

    def fetch(repository: str, allow_patterns: list[str], local_dir: Path) -> None:
        asked[repository] = allow_patterns
        for file in allow_patterns:
            (local_dir / file).parent.mkdir(parents=True, exist_ok=True)
            (local_dir / file).touch()

    monkeypatch.setattr(module, "snapshot_download", fetch)
    return asked


@pytest.mark.parametrize(("precision", "weights"), [("fp16", "model.fp16.safetensors"), ("fp32", "model.safetensors")])
def test_only_what_a_build_reads_is_fetched(
    asked: dict[str, list[str]], tmp_path: Path, precision: str, weights: str
) -> None:
    download(tmp_path, ["interp"], precision)
    wanted = ["scheduler/scheduler_config.json", "unet/config.json", f"unet/diffusion_pytorch_{weights}"]
    assert asked == {"showlab/show-1-interpolation": wanted}


@pytest.mark.parametrize(("precision", "weights"), [("fp16", "model.safetensors"), ("fp32", "model.fp16.safetensors")])
def test_weights_of_the_other_precision_are_fetched_where_there_are_no_others(
    asked: dict[str, list[str]], tmp_path: Path, published: list[str], precision: str, weights: str
) -> None:
    published[:] = ["unet/config.json", f"unet/diffusion_pytorch_{weights}"]
    download(tmp_path, ["interp"], precision)
    assert asked == {"showlab/show-1-interpolation": published}


@pytest.mark.parametrize(("stage", "tokenizer"), [("text", True), ("base", False), ("sr2", True)])
def test_tokenizers_are_fetched_with_the_encoders_that_read_them(
    asked: dict[str, list[str]], tmp_path: Path, published: list[str], stage: str, tokenizer: bool
) -> None:
    folders = {"text": ["text_encoder"], "base": ["unet"], "sr2": ["text_encoder", "unet", "vae"]}[stage]
    published[:] = ["tokenizer/vocab.json", *(f"{folder}/model.safetensors" for folder in folders)]
    download(tmp_path, [stage])
    ((_, files),) = asked.items()
    assert ("tokenizer/vocab.json" in files) == tokenizer


@pytest.mark.parametrize(
    "stray",
    [
        "unet/pytorch_model-00001-of-00002.safetensors",  # of a pull request to show-1-base
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.non_ema.bin",
    ],
)
def test_weights_of_a_name_that_no_build_finds_are_passed_over(
    asked: dict[str, list[str]], tmp_path: Path, published: list[str], monkeypatch: pytest.MonkeyPatch, stray: str
) -> None:
    monkeypatch.setattr(module, "convert", lambda *_, **__: [])
    pickle = "unet/diffusion_pytorch_model.bin"
    published[:] = ["unet/config.json", pickle, stray]
    download(tmp_path, ["interp"])
    assert asked == {"showlab/show-1-interpolation": ["unet/config.json", pickle]}


def test_a_repository_without_weights_is_told(
    asked: dict[str, list[str]], tmp_path: Path, published: list[str]
) -> None:
    published[:] = [file for file in FILES if not file.endswith((".safetensors", ".bin"))]
    with pytest.raises(
        CheckpointError, match=r"show-1-interpolation has no weights in unet, neither \.safetensors nor"
    ):
        download(tmp_path, ["interp"])
    assert not asked


def test_a_file_that_did_not_arrive_is_told(
    published: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "snapshot_download", lambda *_, **__: None)  # it warns alone, with some files there
    with pytest.raises(CheckpointError, match=r"unet/config\.json, .* did not arrive\. Run this again"):
        download(tmp_path, ["interp"])


@pytest.mark.parametrize(
    ("status", "kind", "problem"),
    [
        (401, GatedRepoError, r" is gated: log in with `hf auth login` and accept the licence"),
        (403, HfHubHTTPError, r" cannot be fetched \(refused\)\. A fine-grained token must be allowed to read"),
        (404, RepositoryNotFoundError, r" was not found, or you are not allowed to see it"),
        (500, HfHubHTTPError, r" cannot be fetched \(refused\)\. Check the connection"),
    ],
)
def test_a_refusal_is_explained_before_anything_is_fetched(
    asked: dict[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    kind: type[HfHubHTTPError],
    problem: str,
) -> None:
    def refuse(repository: str) -> None:
        if "IF-II" in repository:
            raise kind("refused", response=cast(Any, SimpleNamespace(status_code=status, headers={}, request=None)))

    monkeypatch.setattr(module.HfApi(), "auth_check", refuse)
    with pytest.raises(CheckpointError, match=rf"^DeepFloyd/IF-II-L-v1\.0:?{problem}"):
        download(tmp_path)
    assert not asked


def test_a_hub_out_of_reach_is_told_whatever_its_transport_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ConnectError(Exception):
        """Of a library that is not ours to name."""

    def refuse(_repository: str) -> None:
        raise ConnectError("connection refused")

    monkeypatch.setattr(module, "HfApi", lambda: SimpleNamespace(auth_check=refuse))
    with pytest.raises(CheckpointError, match=r"cannot be fetched \(connection refused\)\. Check the connection"):
        download(tmp_path, ["interp"])


class Hub(BaseHTTPRequestHandler):
    """As much of Hugging Face's protocol as a download takes, over the folders below `root`."""

    protocol_version = "HTTP/1.1"
    root: Path
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        kind, *parts = urlsplit(self.path).path.strip("/").split("/")
        if kind == "api":  # models/OWNER/NAME/...
            folder, request = self.root / parts[2], parts[3]
            files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            answers: dict[str, Any] = {
                "auth-check": {},
                "tree": [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in files],
                "revision": {
                    "id": "/".join(parts[1:3]),
                    "sha": "a" * 40,
                    "siblings": [{"rfilename": f} for f in files],
                },
            }
            self.answer(json.dumps(answers[request]).encode(), {"Content-Type": "application/json"})
        else:  # OWNER/NAME/resolve/REVISION/FILE
            content = self.root.joinpath(parts[0], *parts[3:]).read_bytes()
            self.answer(content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": "a" * 40})
            if self.command == "GET":
                self.asked.append("/".join(parts[3:]))

    do_HEAD = do_GET

    def answer(self, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


def test_the_hubs_own_client_fetches_pickles_once_and_safetensors_are_left(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder = tmp_path / "hub/show-1-base/text_encoder"
    folder.mkdir(parents=True)
    shards = {"shared.weight": "pytorch_model-00001-of-00002.bin", "norm.weight": "pytorch_model-00002-of-00002.bin"}
    for name, shard in shards.items():
        torch.save({name: torch.ones(2)}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "config.json").write_text("{}")

    with ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Hub,), {"root": tmp_path / "hub"})) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
        others = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and k != "HF_HUB_OFFLINE"}
        command = [sys.executable, "-m", "export", "download", "--stage", "text", "--out", str(tmp_path / "out")]
        fetched = []
        for _ in range(2):
            Hub.asked.clear()
            subprocess.run(command, cwd=ROOT, env={**others, **here}, check=True)
            fetched.append(sorted(Path(file).name for file in Hub.asked))
        server.shutdown()
    assert fetched == [sorted(["config.json", "pytorch_model.bin.index.json", *shards.values()]), []]
    assert sorted(path.name for path in (tmp_path / "out/show-1-base/text_encoder").iterdir()) == [
        "config.json",
        "model.fp16-00001-of-00002.safetensors",
        "model.fp16-00002-of-00002.safetensors",
        "model.safetensors.index.fp16.json",
        "pytorch_model.bin.index.json",
    ]
