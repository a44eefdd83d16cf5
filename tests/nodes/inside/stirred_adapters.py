"""stirred_adapters.py CHECKPOINTS FOLDER: adapters away from their start, for each checkpoint.

Guidance and control for all, a negative's for the one with cross-attention.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import torch
from comfy_steering import checkpoint

from onestep.core import control, guidance_adapter, negative_adapter
from onestep.core.adapter_file import save_adapter
from onestep.core.families import detect
from onestep.nodes.guidance_adapter import targets_of

CHECKPOINTS, FOLDER = (Path(argument) for argument in sys.argv[1:])


@torch.no_grad()
def stirred(side):
    draw = torch.Generator().manual_seed(2)
    for _, value in sorted(side.named_parameters()):
        value.add_(0.1 * torch.randn(value.shape, generator=draw))
    return side


for kind in ("sd15", "sd3", "flux"):
    model = checkpoint(CHECKPOINTS, kind).model
    family, channels = detect(model.diffusion_model), model.latent_format.latent_channels
    targets = {target.name: target for target in targets_of(model, family)}
    guidance = guidance_adapter.new_adapter(targets, family, 1)
    edges = control.new_adapter(family, targets, ("canny", 1), (64, 64), (channels, 8, 8), width=16)
    save_adapter(FOLDER / f"guidance-{kind}.safetensors", stirred(guidance), family)
    save_adapter(FOLDER / f"control-{kind}.safetensors", stirred(edges), family)
    if family == "unet":
        heads = negative_adapter.heads_of([model.diffusion_model], targets)
        away = negative_adapter.new_adapter(targets, family, heads, 1)
        save_adapter(FOLDER / f"negative-{kind}.safetensors", stirred(away), family)
