"""A Krea 2 of 256 channels, which ComfyUI's own checkpoint loader takes. Runs in ComfyUI's Python:

small_krea2.py FILE    ->    a checkpoint of its network with random weights, seeded
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import torch
from comfy.ldm.krea2.model import SingleStreamDiT
from make_tiny_checkpoints import BUILD, filled
from safetensors.torch import save_file

CONFIG = {
    **{"image_model": "krea2", "features": 256, "channels": 16, "patch": 2, "layers": 1, "heads": 2, "kvheads": 1},
    **{"txtlayers": 2, "txtdim": 40},
}

if __name__ == "__main__":
    with torch.no_grad():
        weights = filled(SingleStreamDiT(**CONFIG, **BUILD), "model.diffusion_model.", seed=0, dtype=torch.bfloat16)
        save_file(weights, sys.argv[1], metadata={"format": "pt"})
