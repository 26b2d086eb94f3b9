"""Weights that were published as pickles: written as safetensors, and never run."""

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines.catalog import CATALOG
from engines.errors import CheckpointError
from export import convert as module
from export import download as hub
from export import networks
from export.__main__ import main
from export.checkpoint import weight_files
from export.convert import convert
from export.networks import Source

pytestmark = pytest.mark.torch

WEIGHTS = {"first.weight": torch.arange(6.0).reshape(2, 3), "second.weight": torch.ones(4), "third.bias": torch.ones(1)}


def pickle_shards(folder: Path, weights: Mapping[str, Tensor], variant: str = "") -> None:
    """Two shards and their index, named as transformers names them."""
    names = [f"pytorch_model{variant}-0000{i}-of-00002.bin" for i in (1, 2)]
    weight_map = {name: names[i % 2] for i, name in enumerate(weights)}
    for shard in names:
        torch.save({name: weights[name] for name in weights if weight_map[name] == shard}, folder / shard)
    (folder / f"pytorch_model.bin.index{variant}.json").write_text(json.dumps({"weight_map": weight_map}))


def contents(files: list[Path]) -> dict[str, Tensor]:
    return {name: value for file in files for name, value in load_file(file).items()}


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


@pytest.fixture
def pickled(golden: Path, tmp_path: Path) -> Path:
    """The golden checkpoint as Show-1's is published: pickles, T5 in float32 shards; IF-II as it is."""
    for network in CATALOG.values():
        short, name = network.folders
        home = tmp_path / "checkpoints" / name
        if not home.exists():
            shutil.copytree(golden / "models" / short, home)
        if (file := home / network.subfolder / "model.safetensors").is_file():
            weights = load_file(file)
            if network.name == "t5":
                weights["encoder.embed_tokens.weight"] = weights["shared.weight"]  # one memory, two names
                pickle_shards(file.parent, {name: value.float() for name, value in weights.items()})
            else:
                weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
                torch.save(weights, file.parent / "pytorch_model.bin")
            file.unlink()
        elif network.name != "if2" and (file := file.with_name("diffusion_pytorch_model.safetensors")).is_file():
            torch.save(load_file(file), file.with_suffix(".bin"))
            file.unlink()
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_pickled_checkpoint_is_refused_then_converted_and_loads_as_the_safe_one(
    pickled: Path, golden: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CheckpointError, match=r"is a pickle.*refused.*`python -m export convert`"):
        Source.find(CATALOG["t5"], pickled, precision)
    before = sorted(pickled.rglob("*.bin"))
    assert len(before) == 8  # 2 of T5, 1 of CLIP, of the autoencoder and of four UNets
    command = ["convert", "--checkpoint", str(pickled), "--precision", precision]
    assert main(command) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert len(written) == 9  # of T5 two shards and an index, of seven networks a file
    assert all((".fp16" in path.name) is (precision == "fp16") for path in written)
    assert sorted(pickled.rglob("*.bin")) == before

    for name, network in CATALOG.items():
        loaded, expected = (
            networks.load(Source.find(network, checkpoint, precision), "fp32", (576, 320))
            for checkpoint in (pickled, golden / "models")
        )
        for graph, reference in zip(loaded.graphs, expected.graphs, strict=True):
            assert_equal(graph.module.state_dict(), reference.module.state_dict())
        assert loaded.properties == expected.properties, name

    assert main(command) == 0
    assert "needs none" in capsys.readouterr().err


def test_full_weights_are_converted_after_halves_and_taken_for_full_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "show-1-interpolation" / "unet"
    folder.mkdir(parents=True)
    torch.save(WEIGHTS, folder / "diffusion_pytorch_model.bin")
    for precision, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
        command = ["convert", "--checkpoint", str(tmp_path), "--stage", "interp", "--precision", precision]
        assert main(command) == 0
        (written,) = capsys.readouterr().out.split()
        files = weight_files(folder, precision == "fp16")
        assert files == [Path(written)] and {value.dtype for value in contents(files).values()} == {dtype}
    assert main(command) == 0 and capsys.readouterr().out == ""


def test_a_converted_file_says_what_it_is_as_others_do(tmp_path: Path) -> None:
    """transformers refuses safetensors without this note."""
    torch.save(WEIGHTS, tmp_path / "pytorch_model.bin")
    (file,) = convert(tmp_path, fp16=False)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "torch's oldest format"])
def test_views_of_one_memory_are_each_written_whole(tmp_path: Path, zipped: bool) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    weights = {"whole": whole, "same": whole, "turned": whole.t(), "part": whole[1:, 2:], "other": torch.ones(2)}
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_equal(contents(convert(tmp_path, fp16=False)), weights)


class Exploit:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
def test_code_in_a_pickle_is_not_run(
    tmp_path: Path, save: Callable[[Any, Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint" / "show-1-interpolation" / "unet"
    folder.mkdir(parents=True)
    path = folder / "diffusion_pytorch_model.bin"
    save({**WEIGHTS, "exploit": Exploit(tmp_path / "run")}, path)
    assert main(["convert", "--checkpoint", str(tmp_path / "checkpoint"), "--stage", "interp"]) == 1
    assert "holds objects that are no tensors and could run code" in capsys.readouterr().err
    assert list(folder.iterdir()) == [path] and not (tmp_path / "run").exists()
    pickle.loads(pickle.dumps(Exploit(tmp_path / "run")))
    assert (tmp_path / "run").exists()  # what it would have done


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n", r"git-lfs.*Download it again"),
        (b"", r"cannot be read \(EOFError\)\. Download it again"),
        (None, r"cannot be read \(.*zip.*\)\. Download it again"),
        ({"state_dict": WEIGHTS}, r"does not hold the tensors of one network by their names"),
        ([torch.ones(1)], r"does not hold the tensors of one network by their names"),
    ],
)
def test_what_is_no_table_of_tensors_is_refused(tmp_path: Path, content: Any, problem: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(WEIGHTS if content is None else content, path)
    if content is None:
        path.write_bytes(path.read_bytes()[:-100])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin .*{problem}"):
        convert(tmp_path, fp16=False)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "weights",
    [{1: torch.ones(1)}, {"a": torch.ones(2).to_sparse()}, {"a": torch.empty(2, device="meta")}, {"a": 1}],
    ids=["numbered", "sparse", "empty", "number"],
)
def test_what_is_no_weight_of_a_network_is_refused(tmp_path: Path, weights: Any) -> None:
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="does not hold the tensors of one network by their names"):
        convert(tmp_path, fp16=False)


def test_numbers_that_half_precision_has_not_are_not_made_infinite(tmp_path: Path) -> None:
    torch.save({"scale": torch.tensor([1e6])}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"scale is out of half precision's range\. Use --precision fp32"):
        convert(tmp_path, fp16=True)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]
    assert len(convert(tmp_path, fp16=False)) == 1
    infinite = {"mask": torch.tensor([-math.inf, 1.0])}  # which half precision has
    torch.save(infinite, tmp_path / "pytorch_model.bin")
    assert_equal(contents(convert(tmp_path, fp16=True)), {"mask": infinite["mask"].half()})


@pytest.mark.parametrize("remove", [True, False])
def test_an_interrupted_conversion_is_never_taken_for_a_whole_one_and_goes_on(
    tmp_path: Path, remove: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickle_shards(tmp_path, WEIGHTS)

    def fail(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
        if "00002-of" in path.name:
            path.write_bytes(b"half")
            raise OSError("no space left on device")
        save_file(dict(tensors), path, dict(metadata))

    monkeypatch.setattr(module, "save_weights", fail)
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors cannot be written \(no space left"):
        convert(tmp_path, fp16=False, remove=remove)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="is a pickle"):
        weight_files(tmp_path, prefer_fp16=False)
    assert (tmp_path / "pytorch_model-00001-of-00002.bin").exists() is not remove
    assert sorted(tmp_path.glob(".*")) == []

    convert(tmp_path, fp16=False, remove=remove)
    assert_equal(contents(weight_files(tmp_path, prefer_fp16=False)), WEIGHTS)
    assert len(list(tmp_path.glob("*.bin"))) == (0 if remove else 2)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    pickle_shards(tmp_path, WEIGHTS)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"index\.json: shards pytorch_model-00002-of-00002\.bin are missing"):
        convert(tmp_path, fp16=False)


def test_full_weights_are_halved_where_half_precision_is_asked_for(tmp_path: Path) -> None:
    """A build to fp16 maps files of that precision, and would hold a copy of any other: of T5-XXL 9.5 GB."""
    weights = {**WEIGHTS, "position_ids": torch.arange(3), "turned": torch.arange(6.0).reshape(2, 3).t()}
    pickle_shards(tmp_path, weights)
    written = convert(tmp_path, fp16=True)
    names = [f"model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert [path.name for path in written] == [*names, "model.safetensors.index.fp16.json"]
    assert len({path.stat().st_mode for path in written}) == 1  # for all who may read the others
    assert [path.name for path in weight_files(tmp_path, prefer_fp16=False)] == names
    half = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    assert_equal(contents(written[:2]), half)


def test_a_download_of_pickles_ends_as_safetensors_and_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    published, out = tmp_path / "published", tmp_path / "checkpoints"
    for subfolder in ("text_encoder", "tokenizer", "scheduler"):
        (published / subfolder).mkdir(parents=True)
    pickle_shards(published / "text_encoder", WEIGHTS)
    half = {name: value.half() for name, value in WEIGHTS.items()}
    for file in ("text_encoder/config.json", "text_encoder/training_args.bin", "tokenizer/spiece.model"):
        (published / file).write_text("{}")
    listed = [path.relative_to(published).as_posix() for path in published.rglob("*") if path.is_file()]
    asked: list[str] = []

    def fetch(_repository: str, allow_patterns: list[str], local_dir: Path) -> None:
        asked[:] = sorted(allow_patterns)
        for file in allow_patterns:
            (local_dir / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(published / file, local_dir / file)

    api = SimpleNamespace(list_repo_files=lambda _: listed, auth_check=lambda _: None)
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    monkeypatch.setattr(hub, "snapshot_download", fetch)
    folder = out / "show-1-base/text_encoder"
    small = {"config.json", "pytorch_model.bin.index.json", "spiece.model"}
    shards = {f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)}

    for precision, expected in (("fp16", half), ("fp32", WEIGHTS)):
        hub.download(out, ["text"], precision)
        assert {Path(file).name for file in asked} == small | shards
        assert not list(folder.glob("*.bin"))
        assert_equal(contents(weight_files(folder, prefer_fp16=precision == "fp16")), expected)
        capsys.readouterr()
        shutil.copy(published / "text_encoder/pytorch_model-00001-of-00002.bin", folder)
        hub.download(out, ["text"], precision)
        assert {Path(file).name for file in asked} == small and "pickles" not in capsys.readouterr().err
        assert len(list(folder.glob("*.bin"))) == 1, "what it has not fetched it leaves alone"
        (folder / "pytorch_model-00001-of-00002.bin").unlink()
        for index in folder.glob("model.safetensors.index*"):  # what a run that was interrupted had not come to
            index.unlink()
        hub.download(out, ["text"], precision)
        assert_equal(contents(weight_files(folder, prefer_fp16=precision == "fp16")), expected)
