"""Checkpoint folders: what is found and loaded, and what is said of those that cannot be used."""

import json
import lzma
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engines.catalog import CATALOG, TOKENIZERS, UNETS
from engines.errors import CheckpointError, SettingsError
from engines.memory import is_short_of_memory
from export import networks
from export.checkpoint import find_folder, load_vae, load_weights, weight_files
from export.config_file import read_config
from export.download import needed_files
from export.modules.text import CLIPTextEncoder, T5Encoder
from export.modules.unet import UNetConfig, VideoUNet
from export.modules.vae import Autoencoder
from export.networks import Source
from export.random_checkpoint import CONFIGS

pytestmark = pytest.mark.torch

AS_DOWNLOADED = {
    "base": "show-1-base",
    "interpolation": "show-1-interpolation",
    "if2": "IF-II-L-v1.0",
    "sr1": "show-1-sr1",
    "sr2": "show-1-sr2",
}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def empty(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def clip_module(golden: Path) -> nn.Module:
    return empty(lambda: CLIPTextEncoder(read_json(golden / "models/sr2/text_encoder/config.json"), "clip"))


def assert_holds(module: nn.Module, expected: Mapping[str, Tensor]) -> None:
    state = module.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value.to(state[name].dtype), rtol=0, atol=0)


# Weights that fit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_are_cast_to_the_precision_asked_for(golden: Path, dtype: "torch.dtype") -> None:
    path = golden / "models/sr2/text_encoder/model.safetensors"
    module = clip_module(golden)
    load_weights(module, [path], dtype, "clip")
    assert {value.dtype for value in module.state_dict().values()} == {dtype}
    assert_holds(module, load_file(path))


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "model.safetensors.index.fp16.json"])
def test_shards_load_as_the_whole_does(golden: Path, tmp_path: Path, index: str) -> None:
    weights = load_file(golden / "models/sr2/text_encoder/model.safetensors")
    write_shards(tmp_path, index, weights)
    module = clip_module(golden)
    load_weights(module, weight_files(tmp_path, prefer_fp16=False), torch.float32, "clip")
    assert_holds(module, weights)


def test_what_is_downloaded_for_one_precision_builds_in_the_other(tmp_path: Path) -> None:
    """Downloads hold every index, and the shards of one variant."""
    published = []
    for variant, index in (("", "model.safetensors.index.json"), (".fp16", "model.safetensors.index.fp16.json")):
        shards = [f"model{variant}-0000{i}-of-00002.safetensors" for i in (1, 2)]
        published += [index, *shards]
        (tmp_path / index).write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))
    for prefer_fp16 in (True, False):
        fetched = needed_files([f"unet/{name}" for name in published], {"unet"}, prefer_fp16)
        weights = [tmp_path / Path(name).name for name in fetched if name.endswith(".safetensors")]
        assert len(weights) == 2 and len(fetched) == 4
        for path in weights:
            path.touch()
        assert weight_files(tmp_path, prefer_fp16) == weight_files(tmp_path, not prefer_fp16) == weights
        for path in weights:
            path.unlink()
    with pytest.raises(CheckpointError, match=r"index\.json: shards model-00001-of-00002\.safetensors, .* are missing"):
        weight_files(tmp_path, prefer_fp16=False)


def test_a_missing_shard_is_named(golden: Path, tmp_path: Path) -> None:
    weights = load_file(golden / "models/sr2/text_encoder/model.safetensors")
    write_shards(tmp_path, "model.safetensors.index.json", weights)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    (tmp_path / "model.fp16.safetensors").touch()  # not taken in their place, without a word
    with pytest.raises(CheckpointError, match=r"index\.json: shards model-00002-of-00003\.safetensors are missing"):
        weight_files(tmp_path, prefer_fp16=False)
    assert weight_files(tmp_path, prefer_fp16=True) == [tmp_path / "model.fp16.safetensors"]


def write_shards(folder: Path, index: str, weights: Mapping[str, Tensor]) -> None:
    """Three files and their index, as the publishers' libraries split large models."""
    weight_map = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(weights)}
    for shard in set(weight_map.values()):
        save_file({name: weights[name] for name in weights if weight_map[name] == shard}, folder / shard)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model"])
@pytest.mark.parametrize(
    ("there", "prefer_fp16", "chosen"),
    [
        (["", ".fp16"], True, ".fp16"),
        (["", ".fp16"], False, ""),
        ([""], True, ""),
        ([".fp16"], False, ".fp16"),
    ],
)
def test_the_variant_asked_for_is_taken_or_else_the_other(
    tmp_path: Path, stem: str, there: list[str], prefer_fp16: bool, chosen: str
) -> None:
    for variant in there:
        (tmp_path / f"{stem}{variant}.safetensors").touch()
    (tmp_path / f"{stem}.bin").touch()  # beside safetensors a pickle does no harm
    assert weight_files(tmp_path, prefer_fp16) == [tmp_path / f"{stem}{chosen}.safetensors"]


def test_t5_loads_under_any_name_of_its_embedding(golden: Path, tmp_path: Path) -> None:
    folder = golden / "models/base/text_encoder"
    weights = load_file(folder / "model.safetensors")
    config = read_json(folder / "config.json")
    other = {"encoder.embed_tokens.weight": weights["shared.weight"].clone()}
    without = {name: value for name, value in weights.items() if name != "shared.weight"}
    for stored in (weights, {**without, **other}, {**weights, **other}):
        save_file(stored, tmp_path / "model.safetensors")
        source = Source(CATALOG["t5"], tmp_path, config, [tmp_path / "model.safetensors"], None)
        module = networks.load(source, "fp32", (576, 320)).graphs[0].module
        assert isinstance(module, T5Encoder)
        assert_holds(module, weights)


@pytest.mark.parametrize("as_convolution", [False, True], ids=["linear", "1x1 convolution"])
def test_autoencoders_load_under_their_old_attention_names(golden: Path, tmp_path: Path, as_convolution: bool) -> None:
    folder = golden / "models/sr2/vae"
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    stored = {}
    for name, value in weights.items():
        for new, old in old_names.items():
            if f"attentions.0.{new}." in name:
                name = name.replace(new, old)
                if as_convolution and name.endswith("weight"):
                    value = value[..., None, None].clone()
        stored[name] = value
    assert len(stored.keys() - weights.keys()) == 16  # weight and bias of four projections, in encoder and decoder
    save_file(stored, tmp_path / "vae.safetensors")

    vae = empty(lambda: Autoencoder(read_json(folder / "config.json")))
    load_vae(vae, [tmp_path / "vae.safetensors"], torch.float32, "sr2/vae")
    assert_holds(vae, weights)


def test_clip_buffers_that_nothing_reads_are_skipped(golden: Path, tmp_path: Path) -> None:
    weights = load_file(golden / "models/sr2/text_encoder/model.safetensors")
    unread = {"text_model.embeddings.position_ids": torch.arange(77)[None], "text_projection.weight": torch.ones(2, 2)}
    save_file({**weights, **unread}, tmp_path / "model.safetensors")
    config = read_json(golden / "models/sr2/text_encoder/config.json")
    source = Source(CATALOG["clip"], tmp_path, config, [tmp_path / "model.safetensors"], None)
    assert_holds(networks.load(source, "fp32", (576, 320)).graphs[0].module, weights)


# Weights that do not


def test_every_missing_unexpected_and_misshapen_parameter_is_listed(tmp_path: Path) -> None:
    save_file(
        {
            "0.weight": torch.ones(2, 2),
            "1.weight": torch.ones(3, 3, 1),
            "2.weight": torch.ones(3, 3, 3, 3),
            "2.bias": torch.ones(3),
            "ema.decay": torch.ones(1),
            "3.weight": torch.ones(3, 3),
        },
        tmp_path / "model.safetensors",
    )
    module = empty(lambda: nn.Sequential(*(nn.Linear(3, 3) for _ in range(3))))
    with pytest.raises(CheckpointError) as caught:
        load_weights(module, [tmp_path / "model.safetensors"], torch.float32, "base/unet")
    assert str(caught.value) == (
        "base/unet: the weights do not fit the config beside them. "
        "2 missing: 0.bias, 1.bias; "
        "2 unexpected: 3.weight, ema.decay; "
        "3 misshapen: 0.weight [2, 2], wanted [3, 3], 1.weight [3, 3, 1], wanted [3, 3], "
        "2.weight [3, 3, 3, 3], wanted [3, 3]."
    )


@pytest.mark.parametrize("name", ["model.bin", "diffusion_pytorch_model.pt", "model.ckpt", "model.pth"])
def test_a_pickle_is_refused_and_the_safe_file_asked_for(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=rf"{name} is a pickle.*refused.*\.safetensors.*export convert"):
        weight_files(tmp_path, prefer_fp16=False)


def test_a_folder_without_weights_says_which_files_it_wants(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \.safetensors weights \(diffusion_pytorch_model or model"):
        weight_files(tmp_path, prefer_fp16=False)
    with pytest.raises(CheckpointError, match=r"is missing\. Download the whole checkpoint again"):
        weight_files(tmp_path / "absent", prefer_fp16=False)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_a_truncated_file_is_named(golden: Path, tmp_path: Path, kept: int) -> None:
    whole = (golden / "models/sr2/text_encoder/model.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(whole[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read \(.+\)\. Download it again"):
        load_weights(clip_module(golden), [path], torch.float32, "clip")


def test_too_little_memory_is_not_blamed_on_the_checkpoint(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "_t5", lambda *_: torch.empty(2**60))
    with pytest.raises(MemoryError, match=r"t5: .*allocate"):
        networks.load(Source.find(CATALOG["t5"], golden / "models", "fp32"), "fp32", (576, 320))


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes", True),
        ("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes", True),
        ("bad allocation", True),
        ("std::bad_alloc", True),
        ("CUDA out of memory. Tried to allocate 9.50 GiB", True),
        ("Die Auslagerungsdatei ist zu klein (os error 1455)", True),
        ("couldn't open file mapping: <C:/model.bin>, error code: <1455>", True),
        ("invalid header", False),
        ("expected 1455 values", False),
    ],
)
def test_libraries_that_get_no_memory_are_understood_on_every_system(text: str, short: bool) -> None:
    assert is_short_of_memory(RuntimeError(text)) is short
    assert is_short_of_memory(MemoryError()), "which says nothing, as Python raises it"


def test_another_stages_checkpoint_in_a_folder_is_recognised(golden: Path, tmp_path: Path) -> None:
    models = link_models(golden, tmp_path, {"interpolation": "base"})
    source = Source.find(CATALOG["base"], models, "fp32")
    with pytest.raises(
        CheckpointError, match=r"7 channels in and 6 out; the base network has 3 in.*Is another stage's"
    ):
        networks.load(source, "fp32", (576, 320))


def test_a_config_of_other_weights_is_told_apart_from_them(golden: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(golden / "models/base", models / "base")
    config = read_json(models / "base/unet/config.json")
    (models / "base/unet/config.json").write_text(json.dumps({**config, "cross_attention_dim": 32}))
    with pytest.raises(CheckpointError, match=r"misshapen: .*encoder_hid_proj\.weight \[64, 64\], wanted \[32, 64\]"):
        networks.load(Source.find(CATALOG["base"], models, "fp32"), "fp32", (576, 320))


def test_a_precision_that_modules_do_not_have_is_not_blamed_on_the_config(golden: Path) -> None:
    source = Source.find(CATALOG["clip"], golden / "models", "fp32")
    with pytest.raises(SettingsError, match="precision 'int8'; allowed: fp32, fp16, bf16"):
        networks.load(source, "int8", (576, 320))


# Configs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "relu"}, "act_fn is 'relu'; supported: 'gelu' or 'silu' or 'swish'"),
        ({"class_embed_type": "projection"}, "class_embed_type is 'projection'; supported: None or 'timestep'"),
        ({"num_attention_heads": 8}, "num_attention_heads is 8; supported: null"),
        (
            {"mid_block_type": "UNetMidBlock2DCrossAttn"},
            "mid_block_type is 'UNetMidBlock2DCrossAttn'; supported: 'UNetMid",
        ),
        (
            {"down_block_types": ["AttnDownBlock3D", "DownBlock3D"]},
            "block type is 'AttnDownBlock3D'; supported: Resnet",
        ),
        ({"up_block_types": ["UpBlock", "UpBlock3D"]}, "block type is 'UpBlock'; supported: .* with 2D or 3D"),
        ({"layers_per_block": [1, 2, 3]}, r"layers_per_block is \[1, 2, 3\]; supported: one value, or .* 2 levels"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'; supported: 'positional'"),
    ],
)
def test_unsupported_values_of_a_unet_are_named_with_what_is_supported(
    golden: Path, changes: dict[str, Any], message: str
) -> None:
    config = read_json(golden / "models/base/unet/config.json")
    with pytest.raises(CheckpointError, match=f"base/unet: {message}"):
        UNetConfig.from_dict({**config, **changes}, "base/unet")


@pytest.mark.parametrize("key", ["block_out_channels", "in_channels"])
def test_a_unet_config_without_an_essential_key_is_refused(golden: Path, key: str) -> None:
    config = read_json(golden / "models/base/unet/config.json")
    del config[key]
    with pytest.raises(CheckpointError, match=f"'{key}' is missing. Is this a UNet's config.json"):
        UNetConfig.from_dict(config, "base/unet")


def test_a_config_of_diffusers_own_3d_class_is_that_of_the_latent_stage(golden: Path) -> None:
    config = read_json(golden / "models/sr2/unet/config.json")
    without = {key: value for key, value in config.items() if key != "mid_block_type"}
    assert UNetConfig.from_dict(without, "sr2/unet") == UNetConfig.from_dict(config, "sr2/unet")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("t5", {"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu'; supported: 'gated-gelu'"),
        ("clip", {"hidden_act": "relu"}, "activation 'relu' is not supported; allowed: gelu, quick_gelu"),
        ("clip", {"vocab_size": None}, "text_encoder/config.json: 'vocab_size' is missing"),
    ],
)
def test_unsupported_text_encoders_are_refused(golden: Path, name: str, changes: dict[str, Any], message: str) -> None:
    source = Source.find(CATALOG[name], golden / "models", "fp32")
    config = {key: value for key, value in {**source.config, **changes}.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        networks.load(replace(source, config=config), "fp32", (576, 320))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("base", {"block_out_channels": 32}),
        ("base", {"norm_num_groups": 7}),
        ("base", {"attention_head_dim": 0}),
        ("base", {"down_block_types": ["ResnetDownsampleBlock3D"]}),
        ("base", {"layers_per_block": None}),
        ("t5", {"num_layers": "2"}),
        ("vae_decoder", {"act_fn": "sine"}),
    ],
)
def test_values_that_make_no_network_are_blamed_on_the_config(golden: Path, name: str, changes: dict[str, Any]) -> None:
    source = Source.find(CATALOG[name], golden / "models", "fp32")
    with pytest.raises(CheckpointError, match=rf"{source.where}/config\.json"):
        networks.load(replace(source, config={**source.config, **changes}), "fp32", (576, 320))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "cannot be read as JSON"), (b"[1]", "expected a JSON object, found list"), (b"\xff\xfe", "cannot be read")],
)
def test_a_config_that_is_no_json_object_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json.*{message}"):
        read_config(tmp_path / "config.json")


# Folders


def link_models(golden: Path, tmp_path: Path, names: Mapping[str, str]) -> Path:
    """A checkpoint folder with some of the golden models under other names."""
    models = tmp_path / "models"
    models.mkdir()
    for name, other in names.items():
        (models / other).symlink_to(golden / "models" / name, target_is_directory=True)
    return models


@pytest.mark.parametrize("names", [{name: name for name in AS_DOWNLOADED}, AS_DOWNLOADED], ids=["short", "published"])
def test_all_networks_are_found_under_both_kinds_of_folder_names(
    golden: Path, tmp_path: Path, names: Mapping[str, str]
) -> None:
    models = link_models(golden, tmp_path, names)
    for network in CATALOG.values():
        source = Source.find(network, models, "fp32")
        assert source.where == f"{names[golden_name(network.folders)]}/{network.subfolder}"
        assert source.weights
    for folders in TOKENIZERS.values():
        assert find_folder(models, folders, "tokenizer").is_dir()
    sources = [Source.find(network, models, "fp32") for network in CATALOG.values()]
    assert set(networks.schedulers(sources)) == {*UNETS, "if2.noising", "sr1.noising"}


def test_a_network_that_is_there_under_both_of_its_names_is_refused(golden: Path, tmp_path: Path) -> None:
    models = link_models(golden, tmp_path, AS_DOWNLOADED)
    (models / "sr1").symlink_to(golden / "models" / "sr1", target_is_directory=True)  # e.g. by random-checkpoint
    assert Source.find(CATALOG["base"], models, "fp32")
    with pytest.raises(CheckpointError, match=r"holds sr1 and show-1-sr1, .*\. Move all but one of them away"):
        Source.find(CATALOG["sr1"], models, "fp32")


def golden_name(folders: Iterable[str]) -> str:
    return next(name for name in folders if name in AS_DOWNLOADED)


@pytest.mark.parametrize("name", CATALOG)
def test_a_missing_folder_is_named_with_both_of_its_names(tmp_path: Path, name: str) -> None:
    folders = " or ".join(CATALOG[name].folders)
    with pytest.raises(CheckpointError, match=rf"no folder {folders}\. Give --checkpoint .*export download"):
        Source.find(CATALOG[name], tmp_path, "fp32")


@pytest.mark.parametrize("path", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_a_missing_file_of_a_checkpoint_is_named(golden: Path, tmp_path: Path, path: str) -> None:
    shutil.copytree(golden / "models/base", tmp_path / "base")
    (tmp_path / "base" / path).unlink()
    with pytest.raises(CheckpointError, match=rf"base/{path} is missing. Download the whole folder again"):
        Source.find(CATALOG["base"], tmp_path, "fp32")


def test_a_schedule_of_noise_that_does_not_exist_is_told_before_a_build(golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden / "models/sr1", tmp_path / "sr1")
    path = tmp_path / "sr1/image_noising_scheduler/scheduler_config.json"
    path.write_text(json.dumps({**read_json(path), "beta_schedule": "other"}))
    with pytest.raises(CheckpointError, match=r"sr1/image_noising_scheduler/scheduler_config\.json.*beta_schedule"):
        networks.schedulers([Source.find(CATALOG["sr1"], tmp_path, "fp32")])


# Published sizes

FOLDERS = {"base": "base", "interp": "interpolation", "if2": "if2", "sr1": "sr1", "sr2": "sr2"}


@pytest.fixture(scope="module")
def published_shapes() -> dict[str, dict[str, list[int]]]:
    """Of the original classes, with the published configs."""
    packed = Path(__file__).parent / "golden" / "state_dict_shapes.json.xz"
    return json.loads(lzma.decompress(packed.read_bytes()))


@pytest.mark.parametrize("name", FOLDERS)
def test_parameters_have_the_names_and_shapes_of_the_published_checkpoints(
    published_shapes: dict[str, dict[str, list[int]]], name: str
) -> None:
    config = CONFIGS["published"][f"{FOLDERS[name]}/unet"]
    unet = empty(lambda: VideoUNet(UNetConfig.from_dict(config, name)))
    assert {key: list(value.shape) for key, value in unet.state_dict().items()} == published_shapes[name]
