"""The published networks' and schedulers' settings, and what makes configs of other widths in the same format."""

from typing import Any


def pixel(
    in_channels: int, channels: list[int], attended: int, kind: str, heads: int, text_dim: int, dim: int, **more: Any
) -> dict[str, Any]:
    """A pixel UNet with attention on its `attended` coarsest levels."""
    finer = len(channels) - attended
    return {
        "_class_name": "UNet3DConditionModel" if kind == "3D" else "UNet2DConditionModel",
        "act_fn": "gelu",
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": heads,
        "attention_head_dim": heads,
        "block_out_channels": channels,
        "cross_attention_dim": dim,
        "cross_attention_norm": "group_norm",
        "down_block_types": [f"ResnetDownsampleBlock{kind}"] * finer + [f"SimpleCrossAttnDownBlock{kind}"] * attended,
        "encoder_hid_dim": text_dim,
        "encoder_hid_dim_type": "text_proj",
        "in_channels": in_channels,
        "mid_block_type": f"UNetMidBlock{kind}SimpleCrossAttn",
        "out_channels": 6,
        "resnet_time_scale_shift": "scale_shift",
        "up_block_types": [f"SimpleCrossAttnUpBlock{kind}"] * attended + [f"ResnetUpsampleBlock{kind}"] * finer,
        **more,
    }


def super_resolution(dim: int) -> dict[str, Any]:
    return {
        "class_embed_type": "timestep",
        "mid_block_scale_factor": 1.4142271248762552,
        "resnet_out_scale_factor": 1.4142271248762552,
        "resnet_skip_time_act": True,
        "time_embedding_act_fn": "gelu",
        "time_embedding_dim": dim,
    }


def latent(channels: list[int], attended: int, heads: list[int], dim: int, **more: Any) -> dict[str, Any]:
    """A latent UNet with attention on its `attended` finest levels."""
    coarser = len(channels) - attended
    return {
        "_class_name": "UNet3DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": heads,
        "block_out_channels": channels,
        "cross_attention_dim": dim,
        "down_block_types": ["CrossAttnDownBlock3D"] * attended + ["DownBlock3D"] * coarser,
        "in_channels": 4,
        "mid_block_type": "UNetMidBlock3DCrossAttn",
        "out_channels": 4,
        "up_block_types": ["UpBlock3D"] * coarser + ["CrossAttnUpBlock3D"] * attended,
        "use_linear_projection": True,
        **more,
    }


def t5(dim: int, inner: int, heads: int, head_dim: int, layers: int, vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["T5EncoderModel"],
        "d_ff": inner,
        "d_kv": head_dim,
        "d_model": dim,
        "feed_forward_proj": "gated-gelu",
        "num_heads": heads,
        "num_layers": layers,
        "vocab_size": vocabulary,
    }


def clip(dim: int, inner: int, heads: int, layers: int, vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "hidden_act": "gelu",
        "hidden_size": dim,
        "intermediate_size": inner,
        "max_position_embeddings": 77,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
    }


def vae(channels: list[int], layers: int) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "latent_channels": 4,
        "layers_per_block": layers,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }


_PIXEL = {"heads": 64, "text_dim": 4096}
_MOVING = {**_PIXEL, "channels": [320, 640, 960, 1280], "attended": 3, "kind": "3D", "dim": 1280, "layers_per_block": 3}
_LARGER = {**_PIXEL, "in_channels": 6, "attended": 2}
PUBLISHED: dict[str, dict[str, Any]] = {  # folder -> config.json
    "base/text_encoder": t5(4096, 10240, 64, 64, 24, 32128),
    "base/unet": pixel(3, **_MOVING),
    "interpolation/unet": pixel(7, **_MOVING),
    "if2/unet": pixel(
        channels=[160, 320, 640, 960, 1280],
        kind="2D",
        dim=1280,
        layers_per_block=[2, 2, 3, 5, 5],
        **_LARGER,
        **super_resolution(1280),
    ),
    "sr1/unet": pixel(
        channels=[128, 256, 512, 768, 768],
        kind="3D",
        dim=768,
        layers_per_block=[2, 2, 3, 4, 2],
        **_LARGER,
        **super_resolution(768),
    ),
    "sr2/text_encoder": clip(1024, 4096, 16, 23, 49408),
    "sr2/unet": latent([320, 640, 1280, 1280], 3, [5, 10, 20, 20], 1024, layers_per_block=2, transfromer_in_opt=True),
    "sr2/vae": vae([128, 256, 512, 512], 2),
}

DPM = {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 2, "lower_order_final": True}
COSINE = {"beta_schedule": "squaredcos_cap_v2", "thresholding": True, "dynamic_thresholding_ratio": 0.95}
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
NOISING = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"}
_MOVING_STEPS = {**DPM, **COSINE, "sample_max_value": 1.5, "lambda_min_clipped": -5.1, "variance_type": "fixed_small"}
SCHEDULERS: dict[str, dict[str, Any]] = {  # network -> scheduler_config.json
    "base": _MOVING_STEPS,
    "interp": _MOVING_STEPS,
    "if2": {"_class_name": "DDPMScheduler", **COSINE, "sample_max_value": 1.0, "variance_type": "learned_range"},
    "sr1": {**DPM, **COSINE, "sample_max_value": 1.0, "variance_type": "fixed_small"},
    "sr2": {**DPM, **LATENT},
}
