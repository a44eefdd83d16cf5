"""A FLUX.2 klein of 128 channels, which ComfyUI's own checkpoint loader takes. Runs in ComfyUI's Python:

small_flux2.py FILE    ->    a checkpoint of its network with random weights, seeded
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import torch
from comfy.ldm.flux.model import Flux
from make_tiny_checkpoints import BUILD, filled
from safetensors.torch import save_file

CONFIG = {
    **{"image_model": "flux2", "in_channels": 128, "out_channels": 128, "patch_size": 1, "vec_in_dim": None},
    **{"context_in_dim": 64, "hidden_size": 128, "mlp_ratio": 3.0, "num_heads": 1, "depth": 1, "theta": 2000},
    **{"depth_single_blocks": 1, "axes_dim": [32] * 4, "qkv_bias": False, "ops_bias": False, "mlp_silu_act": True},
    **{"guidance_embed": False, "txt_ids_dims": [3], "global_modulation": True},
}

if __name__ == "__main__":
    with torch.no_grad():
        weights = filled(Flux(**CONFIG, **BUILD), "model.diffusion_model.", seed=0, dtype=torch.bfloat16)
        save_file(weights, sys.argv[1], metadata={"format": "pt"})
