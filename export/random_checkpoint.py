"""Small checkpoints of random weights in the published format: something to build and run where the real ones are not.

Nothing is learned: the videos are noise in colour.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from torch import nn

from engines.errors import OutputError
from export.modules.text import CLIPTextEncoder, T5Encoder
from export.modules.unet import UNetConfig, VideoUNet
from export.modules.vae import Autoencoder, VAEDecoder

_TEXT_DIM = 64
_CLIP_DIM = 32
_PIECES = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(33, 127))]

_PIXEL: dict[str, Any] = {
    "_class_name": "UNet3DConditionModel",
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 8,
    "attention_head_dim": 16,
    "cross_attention_dim": 64,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": _TEXT_DIM,
    "encoder_hid_dim_type": "text_proj",
    "layers_per_block": 1,
    "out_channels": 6,
    "resnet_time_scale_shift": "scale_shift",
}


def _pixel(in_channels: int, channels: list[int], kind: str, **more: Any) -> dict[str, Any]:
    """A UNet with attention on its coarsest level, as the published ones have it on their coarser ones."""
    finer = len(channels) - 1
    return {
        **_PIXEL,
        "in_channels": in_channels,
        "block_out_channels": channels,
        "down_block_types": [f"ResnetDownsampleBlock{kind}"] * finer + [f"SimpleCrossAttnDownBlock{kind}"],
        "mid_block_type": f"UNetMidBlock{kind}SimpleCrossAttn",
        "up_block_types": [f"SimpleCrossAttnUpBlock{kind}"] + [f"ResnetUpsampleBlock{kind}"] * finer,
        **more,
    }


_SUPER_RESOLUTION = {
    "class_embed_type": "timestep",
    "mid_block_scale_factor": 1.4142271248762552,
    "resnet_out_scale_factor": 1.4142271248762552,
    "resnet_skip_time_act": True,
    "time_embedding_act_fn": "gelu",
    "time_embedding_dim": 64,
}

_UNETS: dict[str, dict[str, Any]] = {
    "base": _pixel(3, [32, 64], "3D"),
    "interpolation": _pixel(7, [32, 64], "3D"),
    "if2": _pixel(6, [32, 32, 64], "2D", _class_name="UNet2DConditionModel", **_SUPER_RESOLUTION),
    "sr1": _pixel(6, [32, 32, 64], "3D", **_SUPER_RESOLUTION),
    "sr2": {
        "_class_name": "UNet3DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": [2, 4],
        "block_out_channels": [32, 64],
        "cross_attention_dim": _CLIP_DIM,
        "down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D"],
        "in_channels": 4,
        "layers_per_block": 1,
        "mid_block_type": "UNetMidBlock3DCrossAttn",
        "out_channels": 4,
        "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D"],
        "use_linear_projection": True,
    },
}

_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [32, 32, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}

_T5 = {
    "architectures": ["T5EncoderModel"],
    "d_ff": 128,
    "d_kv": 16,
    "d_model": _TEXT_DIM,
    "feed_forward_proj": "gated-gelu",
    "num_heads": 4,
    "num_layers": 2,
    "vocab_size": len(_PIECES),
}

_CLIP = {
    "architectures": ["CLIPTextModel"],
    "hidden_act": "gelu",
    "hidden_size": _CLIP_DIM,
    "intermediate_size": 64,
    "max_position_embeddings": 77,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 514,
}

_DPM = {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 2, "lower_order_final": True}
_COSINE = {"beta_schedule": "squaredcos_cap_v2", "thresholding": True, "dynamic_thresholding_ratio": 0.95}
_SCHEDULERS = {
    "base": {**_DPM, **_COSINE, "sample_max_value": 1.5, "lambda_min_clipped": -5.1, "variance_type": "fixed_small"},
    "interpolation": {
        **_DPM,
        **_COSINE,
        "sample_max_value": 1.5,
        "lambda_min_clipped": -5.1,
        "variance_type": "fixed_small",
    },
    "if2": {"_class_name": "DDPMScheduler", **_COSINE, "sample_max_value": 1.0, "variance_type": "fixed_small"},
    "sr1": {**_DPM, **_COSINE, "sample_max_value": 1.0, "lambda_min_clipped": -5.1, "variance_type": "fixed_small"},
    "sr2": {**_DPM, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1},
}
_NOISING = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"}


def random_checkpoint(out: Path, seed: int = 0) -> None:
    """Write the checkpoint folders base, interpolation, if2, sr1 and sr2 below `out`, which must not exist."""
    if out.exists():
        raise OutputError(f"{out} exists. Choose a new folder for --out.")
    torch.manual_seed(seed)
    _save(out / "base" / "text_encoder", _T5, _initialised(T5Encoder(_T5, "T5")))
    _save_t5_tokenizer(out / "base" / "tokenizer")
    _save(out / "sr2" / "text_encoder", _CLIP, _initialised(CLIPTextEncoder(_CLIP, "CLIP")))
    _save_clip_tokenizer(out / "sr2" / "tokenizer")

    vae = _initialised(Autoencoder(_VAE))
    _raise_contrast(VAEDecoder(vae), vae.decoder.conv_out)
    _save(out / "sr2" / "vae", _VAE, vae)
    for name, config in _UNETS.items():
        unet = _initialised(VideoUNet(UNetConfig.from_dict(config, name)))
        _save(out / name / "unet", config, unet)
        _write_json(out / name / "scheduler" / "scheduler_config.json", _SCHEDULERS[name])
        if name in ("if2", "sr1"):
            _write_json(out / name / "image_noising_scheduler" / "scheduler_config.json", _NOISING)


def _save(folder: Path, config: dict[str, Any], module: nn.Module) -> None:
    _write_json(folder / "config.json", config)
    stem = "model" if folder.name == "text_encoder" else "diffusion_pytorch_model"
    state = {name: value.half().contiguous() for name, value in module.state_dict().items()}
    save_file(state, folder / f"{stem}.safetensors")


def _initialised(module: Any) -> Any:
    """Default weights; matrices and filters rounded to 11 levels, which pack to a quarter and are exact in float16."""
    for value in module.eval().requires_grad_(False).parameters():
        if value.ndim > 1 and value.any():
            step = (value.std() * 0.6).half().float()
            value.copy_((value / step).round().clamp(-5, 5) * step)
    return module


def _raise_contrast(decoder: nn.Module, last: nn.Conv2d) -> None:
    """Scale the last layer so that pictures spread over [-1, 1]; untrained ones are all but grey."""
    with torch.no_grad():
        spread = decoder(torch.randn(1, 4, 16, 16)).std()
        last.weight *= 0.5 / spread
        last.bias.zero_()


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _save_t5_tokenizer(folder: Path) -> None:
    """Letters, digits and punctuation as pieces: the format of a sentencepiece model, not its compression."""
    kinds = {"<unk>": 2, "<pad>": 3, "</s>": 3}  # unknown, control; others are normal
    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = 1  # unigram
    for piece in _PIECES:
        model.pieces.add(piece=piece, score=-2.0, type=kinds.get(piece, 1))
    _write_json(folder / "tokenizer_config.json", {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"})
    (folder / "spiece.model").write_bytes(model.SerializeToString())


def _save_clip_tokenizer(folder: Path) -> None:
    """CLIP's byte alphabet, alone and at the end of a word, without merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    _write_json(folder / "vocab.json", {piece: index for index, piece in enumerate(pieces)})
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    end = "<|endoftext|>"
    special = {"bos_token": "<|startoftext|>", "eos_token": end, "pad_token": end, "unk_token": end}
    _write_json(folder / "tokenizer_config.json", {**special, "model_max_length": 77})
