"""The published models' full networks in diffusers' classes, on the meta device: names and shapes without weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    ChromaTransformer2DModel,
    CosmosTransformer3DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from torch import nn

XL: dict[str, Any] = {
    **{"block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "use_linear_projection": True},
    **{"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")},
    **{"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")},
    **{"transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20)},
    **{"addition_embed_type": "text_time", "addition_time_embed_dim": 256},
    **{"projection_class_embeddings_input_dim": 2816},
}
SD3: dict[str, Any] = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
V2: dict[str, Any] = {"cross_attention_dim": 1024, "use_linear_projection": True, "attention_head_dim": (5, 10, 20, 20)}

FLUX2: dict[str, dict[str, Any]] = {
    name: dict(
        zip(("num_layers", "num_single_layers", "num_attention_heads", "joint_attention_dim"), sizes, strict=True)
    )
    for name, sizes in {
        "klein_4b": (5, 20, 24, 7680),
        "klein_9b": (8, 24, 32, 12288),
        "flux2_dev": (8, 48, 48, 15360),
    }.items()
}

ANIMA: dict[str, Any] = {
    **{"num_attention_heads": 16, "attention_head_dim": 128, "num_layers": 28, "text_embed_dim": 1024},
    **{"adaln_lora_dim": 256, "rope_scale": (1.0, 4.0, 4.0), "extra_pos_embed_type": None},
}

WAN: dict[str, dict[str, Any]] = {
    name: dict(zip(("num_attention_heads", "ffn_dim", "num_layers", "in_channels"), sizes, strict=True))
    for name, sizes in {
        "wan_1b": (12, 8960, 30, 16),
        "wan_14b": (40, 13824, 40, 16),
        "wan_5b": (24, 14336, 30, 48),
    }.items()
}

# By name: (family, diffusers' class, its config).
PUBLISHED: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "sd15": ("unet", UNet2DConditionModel, {"cross_attention_dim": 768, "attention_head_dim": 8}),
    "sd2": ("unet", UNet2DConditionModel, V2),
    "sdxl": ("unet", UNet2DConditionModel, XL),
    "sd3": ("sd3", SD3Transformer2DModel, SD3),
    "sd35_medium": (
        "sd3",
        SD3Transformer2DModel,
        {**SD3, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
    ),
    "flux": ("flux", FluxTransformer2DModel, {"guidance_embeds": True}),
    "z_image": ("z_image", ZImageTransformer2DModel, {}),
    "qwen_image": ("qwen_image", QwenImageTransformer2DModel, {}),
    "anima": ("anima", CosmosTransformer3DModel, ANIMA),
    "krea2": ("krea2", Krea2Transformer2DModel, {}),
    "chroma": ("chroma", ChromaTransformer2DModel, {}),
    "pixart": (
        "pixart",
        PixArtTransformer2DModel,
        {"caption_channels": 4096, "use_additional_conditions": False},
    ),
    **{
        name: ("wan", WanTransformer3DModel, {**config, "out_channels": config["in_channels"]})
        for name, config in WAN.items()
    },
    "lumina2": ("lumina2", Lumina2Transformer2DModel, {"cap_feat_dim": 2304}),
    **{
        name: ("flux2", Flux2Transformer2DModel, {**config, "guidance_embeds": name == "flux2_dev"})
        for name, config in FLUX2.items()
    },
}
# The same models as ComfyUI detects them.
UNET: dict[str, Any] = {
    **{"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "use_spatial_transformer": True},
    **{"legacy": False, "use_checkpoint": False, "use_temporal_attention": False, "use_temporal_resblock": False},
    **{"channel_mult": [1, 2, 4, 4], "num_res_blocks": [2, 2, 2, 2], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0]},
    **{"transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1},
}
MMDIT: dict[str, Any] = {
    **{"in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 24, "input_size": None},
    **{"adm_in_channels": 2048, "num_patches": 36864, "pos_embed_max_size": 192, "pos_embed_scaling_factor": None},
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
}
IN_COMFY: dict[str, dict[str, Any]] = {
    "sd15": {**UNET, "context_dim": 768, "num_heads": 8, "num_head_channels": -1, "use_linear_in_transformer": False},
    "sd2": {**UNET, "context_dim": 1024, "num_heads": -1, "num_head_channels": 64, "use_linear_in_transformer": True},
    "sdxl": {
        **{**UNET, "channel_mult": [1, 2, 4], "num_res_blocks": [2, 2, 2], "transformer_depth": [0, 0, 2, 2, 10, 10]},
        **{"transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10},
        **{"context_dim": 2048, "num_heads": -1, "num_head_channels": 64, "use_linear_in_transformer": True},
        **{"num_classes": "sequential", "adm_in_channels": 2816},
    },
    "sd3": {**MMDIT, "x_block_self_attn_layers": []},
    "sd35_medium": {**MMDIT, "x_block_self_attn_layers": list(range(13)), "qk_norm": "rms"},
    "flux": {
        **{"image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 768},
        **{"context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19},
        **{"depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True},
        **{"guidance_embed": True, "txt_ids_dims": []},
    },
    "z_image": {
        **{"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 3840, "cap_feat_dim": 2560},
        **{"n_layers": 30, "qk_norm": True, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48]},
        **{"axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3},
        **{"z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32},
    },
    "pixart": {
        **{"image_model": "pixart_sigma", "patch_size": 2, "in_channels": 4, "num_heads": 16, "hidden_size": 1152},
        **{"depth": 28, "model_max_length": 300, "micro_condition": False},
    },
    "chroma": {
        **{"image_model": "chroma", "in_channels": 64, "out_channels": 64, "patch_size": 2, "vec_in_dim": None},
        **{"context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19},
        **{"depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True, "txt_ids_dims": []},
        **{"in_dim": 64, "out_dim": 3072, "hidden_dim": 5120, "n_layers": 5},
    },
    "qwen_image": {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60},
    **{
        name: {
            **{"image_model": "flux2", "in_channels": 128, "out_channels": 128, "patch_size": 1, "vec_in_dim": None},
            **{"context_in_dim": config["joint_attention_dim"], "hidden_size": 128 * config["num_attention_heads"]},
            **{"num_heads": config["num_attention_heads"], "mlp_ratio": 3.0, "depth": config["num_layers"]},
            **{"depth_single_blocks": config["num_single_layers"], "axes_dim": [32, 32, 32, 32], "theta": 2000},
            **{"qkv_bias": False, "ops_bias": False, "txt_ids_dims": [3], "global_modulation": True},
            **{"mlp_silu_act": True, "guidance_embed": name == "flux2_dev"},
        }
        for name, config in FLUX2.items()
    },
    "anima": {
        **{"image_model": "anima", "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16},
        **{"out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "concat_padding_mask": True},
        **{"model_channels": 2048, "num_blocks": 28, "num_heads": 16, "crossattn_emb_channels": 1024},
        **{"pos_emb_cls": "rope3d", "pos_emb_learnable": True, "pos_emb_interpolation": "crop", "min_fps": 1},
        **{"max_fps": 30, "use_adaln_lora": True, "adaln_lora_dim": 256, "extra_per_block_abs_pos_emb": False},
        **{"rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0, "rope_t_extrapolation_ratio": 1.0},
        "rope_enable_fps_modulation": False,
    },
    "lumina2": {
        **{"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 2304, "cap_feat_dim": 2304},
        **{"n_layers": 26, "qk_norm": True, "n_heads": 24, "n_kv_heads": 8, "axes_dims": [32, 32, 32]},
        **{"axes_lens": [300, 512, 512], "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0},
    },
    "krea2": {
        **{"image_model": "krea2", "features": 6144, "channels": 16, "patch": 2, "layers": 28, "heads": 48},
        **{"kvheads": 12, "txtlayers": 12, "txtdim": 2560},
    },
    **{
        name: {
            **{"image_model": "wan2.1", "model_type": "t2v", "dim": 128 * config["num_attention_heads"]},
            **{"num_heads": config["num_attention_heads"], "ffn_dim": config["ffn_dim"], "patch_size": (1, 2, 2)},
            **{"num_layers": config["num_layers"], "in_dim": config["in_channels"], "out_dim": config["in_channels"]},
            **{"freq_dim": 256, "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6},
        }
        for name, config in WAN.items()
    },
}


def on_meta(name: str) -> nn.Module:
    """The published model in diffusers' class, without memory for its weights."""
    _, network, config = PUBLISHED[name]
    with torch.device("meta"):
        return network(**config)
