"""A diffusers AutoencoderKL or AutoencoderKLFlux2 of any number of levels as ComfyUI's VAE."""

from __future__ import annotations

import re
from pathlib import Path

import comfy.sd
import torch

from ...core.errors import OneStepError
from .folder import Config, Weights, read_config, read_weights, require
from .video_autoencoder import is_video, load_video_vae

# ComfyUI's own converter counts on four levels, so names are mapped here.
RENAMED = (
    (r"\.resnets\.(\d+)\.", r".block.\1."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"^(encoder|decoder)\.down_blocks\.", r"\1.down."),
    (r"\.conv_norm_out\.", ".norm_out."),
)
MIDDLE = (
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
)


def load_vae(folder: Path) -> comfy.sd.VAE:
    """The folder's `vae` as a VAE object with its own reduction (4 for three levels)."""
    config = read_config(folder, "vae")
    if is_video(config):
        return load_video_vae(folder)
    require("the autoencoder", config, {"norm_num_groups": 32, "act_fn": "silu", "in_channels": 3, "out_channels": 3})
    weights = complete(convert(read_weights(folder, "vae"), levels(config)), config)
    params = {"ddconfig": architecture(config), "embed_dim": config["latent_channels"]}
    vae = comfy.sd.VAE(sd=weights, config={"params": params}, dtype=torch.float32)
    vae.downscale_ratio = vae.upscale_ratio = reduction(config)
    vae.latent_channels = channels(config)
    return vae


def levels(config: Config) -> int:
    return len(config["block_out_channels"])


def reduction(config: Config) -> int:
    """Pixels per latent along one side: each level but the last halves, and so does what folds latents."""
    return int(2 ** (levels(config) - 1)) * (2 if folds(config) else 1)


def channels(config: Config) -> int:
    """Of the latents as the network has them."""
    return int(config["latent_channels"]) * (4 if folds(config) else 1)


def folds(config: Config) -> bool:
    """Whether 2 x 2 latents become one, normed by statistics, as FLUX.2's."""
    return "batch_norm_eps" in config


def architecture(config: Config) -> Config:
    """The configuration in the words of ComfyUI's Encoder and Decoder."""
    widths = config["block_out_channels"]
    if any(width % widths[0] for width in widths):
        raise OneStepError(
            f"the autoencoder's widths {widths} are no multiples of the first, which ComfyUI's class needs"
        )
    return {
        **{"double_z": True, "z_channels": config["latent_channels"], "resolution": 256, "in_channels": 3, "out_ch": 3},
        **{"ch": widths[0], "ch_mult": [width // widths[0] for width in widths]},
        **{"num_res_blocks": config["layers_per_block"], "attn_resolutions": [], "dropout": 0.0},
        "batch_norm_latent": folds(config),
    }


def convert(weights: Weights, count: int) -> Weights:
    """Diffusers names -> ComfyUI names; attention weights become 1x1 convolutions."""
    return {rename(name, count): pointwise(name, tensor) for name, tensor in weights.items()}


def rename(name: str, count: int) -> str:
    for pattern, new in MIDDLE:
        name = re.sub(pattern, new, name)
    name = re.sub(r"^decoder\.up_blocks\.(\d+)\.", lambda found: f"decoder.up.{count - 1 - int(found[1])}.", name)
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    return name


def pointwise(name: str, tensor: torch.Tensor) -> torch.Tensor:
    attention = ".attentions." in name and name.endswith(".weight") and tensor.ndim == 2
    return tensor[:, :, None, None] if attention else tensor


def complete(weights: Weights, config: Config) -> Weights:
    """Add, as the identity, what ComfyUI's class always has: middle attention and convolutions at the latents."""
    width = config["block_out_channels"][-1]
    for side in ("encoder", "decoder"):
        if f"{side}.mid.attn_1.q.weight" not in weights:
            weights |= silent_attention(f"{side}.mid.attn_1.", width)
    channels = config["latent_channels"]
    for name, count in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        weights.setdefault(f"{name}.weight", torch.eye(count)[:, :, None, None].clone())
        weights.setdefault(f"{name}.bias", torch.zeros(count))
    return weights


def silent_attention(prefix: str, width: int) -> Weights:
    """An attention layer whose output is zero, so that its residual passes the input on."""
    layers = {f"{prefix}{name}.weight": torch.zeros(width, width, 1, 1) for name in ("q", "k", "v", "proj_out")}
    biases = {f"{prefix}{name}.bias": torch.zeros(width) for name in ("q", "k", "v", "proj_out", "norm")}
    return {**layers, **biases, f"{prefix}norm.weight": torch.zeros(width)}
