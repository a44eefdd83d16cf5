"""The smallest networks of six families whose layers can be stored in all of ComfyUI's ways, as its own checkpoint
loader takes them in this process. Runs in ComfyUI's Python:

small_modern.py FAMILY FILE    ->    a checkpoint of its network with random weights, seeded
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))

import comfy.ldm.anima.model as anima
import comfy.supported_models
import torch
from make_tiny_checkpoints import filled
from safetensors.torch import save_file

from onestep.nodes.tiny_models.chroma import TinyChroma
from onestep.nodes.tiny_models.lumina2 import TinyLumina2
from onestep.nodes.tiny_models.pixart import TinyPixArt
from onestep.nodes.tiny_models.qwen import TinyQwenImage
from onestep.nodes.tiny_models.wan import TinyWan

CONFIGS: dict[str, dict[str, Any]] = {
    "anima": {
        **{"image_model": "anima", "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16},
        **{"out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "concat_padding_mask": True},
        **{"model_channels": 128, "num_blocks": 1, "num_heads": 2, "crossattn_emb_channels": 64},
        **{"pos_emb_cls": "rope3d", "pos_emb_learnable": True, "pos_emb_interpolation": "crop", "min_fps": 1},
        **{"max_fps": 30, "use_adaln_lora": True, "adaln_lora_dim": 64, "extra_per_block_abs_pos_emb": False},
        **{"rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0, "rope_t_extrapolation_ratio": 1.0},
        "rope_enable_fps_modulation": False,
    },
    "chroma": {
        **{"image_model": "chroma", "in_channels": 64, "out_channels": 64, "patch_size": 2, "vec_in_dim": None},
        **{"context_in_dim": 24, "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2, "depth": 19},
        **{"depth_single_blocks": 38, "axes_dim": [8, 12, 12], "theta": 10000, "qkv_bias": True, "txt_ids_dims": []},
        **{"in_dim": 64, "out_dim": 64, "hidden_dim": 64, "n_layers": 5},
    },
    "lumina2": {
        **{"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 192, "cap_feat_dim": 24},
        **{"n_layers": 2, "n_refiner_layers": 1, "qk_norm": True, "n_heads": 6, "n_kv_heads": 2, "multiple_of": 64},
        **{"axes_dims": [8, 12, 12], "axes_lens": [300, 32, 32], "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0},
    },
    "pixart": {
        **{"image_model": "pixart_sigma", "patch_size": 2, "in_channels": 4, "num_heads": 2, "hidden_size": 64},
        **{"depth": 2, "caption_channels": 24, "model_max_length": 7, "micro_condition": False},
    },
    "qwen_image": {
        **{"image_model": "qwen_image", "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2},
        **{"patch_size": 2, "in_channels": 64, "out_channels": 16, "joint_attention_dim": 24},
        "axes_dims_rope": (8, 12, 12),
    },
    "wan": {
        **{"image_model": "wan2.1", "model_type": "t2v", "dim": 128, "out_dim": 16, "in_dim": 16, "num_heads": 2},
        **{"ffn_dim": 256, "num_layers": 2, "patch_size": (1, 2, 2), "freq_dim": 64, "text_dim": 64},
        **{"window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6},
    },
}
CLASSES: dict[str, Any] = {
    **{"anima": comfy.supported_models.Anima, "chroma": TinyChroma, "lumina2": TinyLumina2},
    **{"pixart": TinyPixArt, "qwen_image": TinyQwenImage, "wan": TinyWan},
}
ADAPTER = {"source_dim": 64, "target_dim": 64, "model_dim": 64, "num_layers": 1, "num_heads": 2}
"""Of Anima's text, which ComfyUI makes of one size."""
FOUND = {"anima": "model_channels", "chroma": "hidden_size", "lumina2": "dim", "pixart": "depth", "wan": "dim"}
"""What ComfyUI finds out of a file that tells a small one; of Qwen-Image no width."""


def small(family: str) -> Any:
    """ComfyUI finds out of a file the least of a configuration, and knows the rest at published sizes alone."""
    config = CONFIGS[family]
    known = {name: config[name] for name in ("image_model", FOUND.get(family, "image_model"))}

    def __init__(self: Any, unet_config: dict[str, Any]) -> None:
        CLASSES[family].__init__(self, {**unet_config, **config})

    return type(f"Small{family}", (CLASSES[family],), {"unet_config": known, "__init__": __init__})


def known() -> None:
    adapter: Any = anima
    adapter.LLMAdapter = partial(anima.LLMAdapter, **ADAPTER)
    for family in CONFIGS:
        comfy.supported_models.models.insert(0, small(family))


if __name__ == "__main__":
    known()
    with torch.no_grad():
        setup = small(sys.argv[1])({})
        setup.set_inference_dtype(torch.float32, None)
        network = setup.get_model({}, "", device="cpu").diffusion_model
        save_file(filled(network, "model.diffusion_model.", seed=0, dtype=torch.bfloat16), sys.argv[2])
