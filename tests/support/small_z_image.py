"""A Z-Image of 384 channels that ComfyUI's own checkpoint loader takes, in this process. Runs in ComfyUI's Python:

small_z_image.py FILE    ->    a checkpoint of its network with random weights, seeded
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import comfy.supported_models
import torch
from comfy.ldm.lumina.model import NextDiT
from make_tiny_checkpoints import BUILD, filled
from safetensors.torch import save_file

KNOWN = {"image_model": "lumina2", "dim": 384}
CONFIG = {
    **{**KNOWN, "patch_size": 2, "in_channels": 16, "cap_feat_dim": 64, "n_layers": 1, "n_refiner_layers": 2},
    **{"n_heads": 16, "n_kv_heads": 16, "axes_dims": [8, 8, 8], "axes_lens": [1536, 512, 512], "rope_theta": 256.0},
    **{"qk_norm": True, "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True, "time_scale": 1000.0},
    "pad_tokens_multiple": 32,
}


class SmallZImage(comfy.supported_models.ZImage):
    """ComfyUI finds out of a file how wide it is, and knows the rest at the published width alone."""

    unet_config = KNOWN

    def __init__(self, unet_config: dict[str, object]) -> None:
        super().__init__({**unet_config, **CONFIG})


def known() -> None:
    comfy.supported_models.models.insert(0, SmallZImage)


if __name__ == "__main__":
    with torch.no_grad():
        told = {name: value for name, value in CONFIG.items() if name != "image_model"}
        weights = filled(NextDiT(**told, **BUILD), "model.diffusion_model.", seed=0, dtype=torch.bfloat16)
        save_file(weights, sys.argv[1], metadata={"format": "pt"})
