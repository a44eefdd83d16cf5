"""`small_networks` in ComfyUI's words: the `unet_config` of each."""

from __future__ import annotations

from typing import Any

UNET: dict[str, Any] = {
    **{"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "use_spatial_transformer": True},
    **{"legacy": False, "use_checkpoint": False, "context_dim": 24, "use_temporal_attention": False},
    **{"use_temporal_resblock": False, "adm_in_channels": None},
}
MMDIT: dict[str, Any] = {
    **{"in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 2, "input_size": None, "adm_in_channels": 16},
    **{"num_patches": 64, "pos_embed_max_size": 8, "pos_embed_scaling_factor": None},
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 24, "out_features": 128}},
}
IN_COMFY: dict[str, dict[str, Any]] = {
    "sd15": {
        **UNET,
        **{"channel_mult": [1, 2], "num_res_blocks": [2, 2], "transformer_depth": [1, 1, 0, 0]},
        **{"transformer_depth_output": [1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1},
        **{"use_linear_in_transformer": False, "num_heads": 4, "num_head_channels": -1},
    },
    "sdxl": {
        **UNET,
        **{"channel_mult": [1, 2, 2], "num_res_blocks": [2, 2, 2], "transformer_depth": [0, 0, 1, 1, 2, 2]},
        **{"transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2], "transformer_depth_middle": 2},
        **{"use_linear_in_transformer": True, "num_heads": -1, "num_head_channels": 16},
        **{"num_classes": "sequential", "adm_in_channels": 64},
    },
    "sd3": {**MMDIT, "x_block_self_attn_layers": []},
    "sd35": {**MMDIT, "x_block_self_attn_layers": [0], "qk_norm": "rms"},
    "flux": {
        **{"image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 16},
        **{"context_in_dim": 24, "hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 1, "depth": 1},
        **{"depth_single_blocks": 1, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True},
        **{"guidance_embed": True, "txt_ids_dims": []},
    },
    "z_image": {
        **{"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 288, "cap_feat_dim": 24},
        **{"n_layers": 2, "n_refiner_layers": 1, "qk_norm": True, "n_heads": 12, "n_kv_heads": 12},
        **{"axes_dims": [8, 8, 8], "axes_lens": [64, 32, 32], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3},
        **{"z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32},
    },
    "flux2": {
        **{"image_model": "flux2", "in_channels": 128, "out_channels": 128, "patch_size": 1, "vec_in_dim": None},
        **{"context_in_dim": 24, "hidden_size": 64, "mlp_ratio": 3.0, "num_heads": 2, "depth": 1},
        **{"depth_single_blocks": 1, "axes_dim": [8, 8, 8, 8], "theta": 2000, "qkv_bias": False, "ops_bias": False},
        **{"guidance_embed": True, "txt_ids_dims": [3], "global_modulation": True, "mlp_silu_act": True},
        **{"default_ref_method": "index", "ref_index_scale": 10.0},
    },
    "pixart": {
        **{"image_model": "pixart_sigma", "patch_size": 2, "in_channels": 4, "num_heads": 2, "hidden_size": 48},
        **{"depth": 2, "caption_channels": 24, "model_max_length": 7, "micro_condition": False},
    },
    "chroma": {
        **{"image_model": "chroma", "in_channels": 64, "out_channels": 64, "patch_size": 2, "vec_in_dim": None},
        **{"context_in_dim": 24, "hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 2, "depth": 19},
        **{"depth_single_blocks": 38, "axes_dim": [4, 6, 6], "theta": 10000, "qkv_bias": True, "txt_ids_dims": []},
        **{"in_dim": 64, "out_dim": 32, "hidden_dim": 40, "n_layers": 5},
    },
    "qwen_image": {
        **{"image_model": "qwen_image", "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2},
        **{"in_channels": 64, "joint_attention_dim": 24, "axes_dims_rope": (8, 12, 12)},
    },
    "anima": {
        **{"image_model": "anima", "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16},
        **{"out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "concat_padding_mask": True},
        **{"model_channels": 48, "num_blocks": 2, "num_heads": 2, "crossattn_emb_channels": 24},
        **{"pos_emb_cls": "rope3d", "pos_emb_learnable": True, "pos_emb_interpolation": "crop", "min_fps": 1},
        **{"max_fps": 30, "use_adaln_lora": True, "adaln_lora_dim": 16, "extra_per_block_abs_pos_emb": False},
        **{"rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0, "rope_t_extrapolation_ratio": 1.0},
        "rope_enable_fps_modulation": False,
    },
    "krea2": {
        **{"image_model": "krea2", "features": 64, "channels": 16, "patch": 2, "layers": 2, "heads": 4, "kvheads": 2},
        **{"tdim": 32, "txtlayers": 3, "txtdim": 8, "txtheads": 2, "txtkvheads": 2},
    },
    "wan": {
        **{"image_model": "wan2.1", "model_type": "t2v", "dim": 24, "out_dim": 16, "in_dim": 16, "num_heads": 2},
        **{"ffn_dim": 40, "num_layers": 2, "patch_size": (1, 2, 2), "freq_dim": 32, "text_dim": 24},
        **{"window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6},
    },
    "lumina2": {
        **{"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 96, "cap_feat_dim": 24},
        **{"n_layers": 2, "n_refiner_layers": 1, "qk_norm": True, "n_heads": 6, "n_kv_heads": 2, "multiple_of": 128},
        **{"axes_dims": [4, 6, 6], "axes_lens": [300, 32, 32], "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0},
    },
}
