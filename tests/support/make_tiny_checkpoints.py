"""Write the smallest checkpoints with random weights that ComfyUI's checkpoint loader recognises.

Runs in ComfyUI's Python through comfy_launch.py: `make_tiny_checkpoints.py FOLDER [sd15 sd3 flux]`. The modules are
ComfyUI's own classes, so the key layout is exact; weights are seeded. The flux file holds no text encoder; its pooled
width is 2048 so that the sd3 file's text encoder serves both.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import comfy.ops
import torch
from comfy.clip_model import CLIPTextModel
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.taesd.taesd import TAESD
from safetensors.torch import save_file

Weights = dict[str, torch.Tensor]
BUILD = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}


def weight(name: str, shape: torch.Size, generator: torch.Generator, gain: float) -> torch.Tensor:
    """Biases 0, norms 1, embeddings small, everything else scaled by its fan-in."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) <= 1:
        return torch.ones(shape)
    scale = 0.02 if "embedding" in name else gain * torch.Size(shape[1:]).numel() ** -0.5
    return torch.randn(shape, generator=generator) * scale


def filled(module: torch.nn.Module, prefix: str, seed: int, dtype: torch.dtype, gain: float = 1.0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    state = module.state_dict()
    return {prefix + name: weight(name, old.shape, generator, gain).to(dtype) for name, old in state.items()}


def autoencoder(channels: int, prefix: str) -> Weights:
    weights = filled(TAESD(latent_channels=channels), prefix, seed=2, dtype=torch.float16, gain=1.4)
    return {**weights, f"{prefix}vae_scale": torch.tensor(1.0), f"{prefix}vae_shift": torch.tensor(0.0)}


def text_encoder(prefix: str) -> Weights:
    config = json.loads(Path("comfy/sd1_clip_config.json").read_text())
    model = CLIPTextModel(config, torch.float32, "cpu", comfy.ops.disable_weight_init)
    weights = filled(model, prefix, seed=1, dtype=torch.float16)
    return {name: tensor for name, tensor in weights.items() if "text_projection" not in name}


def sd15() -> Weights:
    """One level of 320 channels, context 768, convolutional proj_in: what ComfyUI knows SD1.5 by."""
    unet = UNetModel(
        **{"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "channel_mult": [1]},
        **{"num_res_blocks": [1], "transformer_depth": [1], "transformer_depth_output": [1, 1]},
        **{"transformer_depth_middle": -2, "context_dim": 768, "use_linear_in_transformer": False},
        **{"use_spatial_transformer": True, "legacy": False, "num_heads": 8, "num_head_channels": -1},
        **BUILD,
    )
    return {
        **filled(unet, "model.diffusion_model.", seed=0, dtype=torch.float16),
        **autoencoder(4, "first_stage_model."),
        **text_encoder("cond_stage_model.transformer."),
    }


def sd3(depth: int = 2) -> Weights:
    """Width 64 * depth and as many heads as blocks; 16 latent channels; CLIP-L alone."""
    linear = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64 * depth}}
    network = OpenAISignatureMMDITWrapper(
        **{"input_size": None, "patch_size": 2, "in_channels": 16, "out_channels": 16, "depth": depth},
        **{"pos_embed_max_size": 32, "num_patches": 32 * 32, "adm_in_channels": 2048, "qk_norm": "rms"},
        **{"context_embedder_config": linear},
        **BUILD,
    )
    return {
        **filled(network, "model.diffusion_model.", seed=0, dtype=torch.float16),
        **autoencoder(16, "first_stage_model."),
        **text_encoder("text_encoders.clip_l.transformer."),
    }


def flux() -> Weights:
    """Schnell's layout (no guidance_in): one head of 128, one double and one single block, bf16."""
    network = Flux(
        **{"image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 2048, "context_in_dim": 4096},
        **{"hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 1, "depth": 1, "depth_single_blocks": 1},
        **{"axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False},
        **{"txt_ids_dims": []},
        **BUILD,
    )
    weights = filled(network, "model.diffusion_model.", seed=0, dtype=torch.bfloat16)
    return {**weights, **autoencoder(16, "vae.")}


if __name__ == "__main__":
    folder, names = Path(sys.argv[1]), sys.argv[2:] or ["sd15", "sd3", "flux"]
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for name in names:
            save_file(globals()[name](), folder / f"tiny_{name}.safetensors", metadata={"format": "pt"})
