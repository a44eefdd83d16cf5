"""diffusers' AutoencoderKLWan or AutoencoderKLQwenImage of any width as ComfyUI's VAE."""

from __future__ import annotations

import re
from pathlib import Path

import comfy.latent_formats
import comfy.sd
import torch

from .folder import Config, Weights, read_config, read_weights, require

RENAMED = (
    *((rf"\.{ours}\.", rf".residual.{at}.") for ours, at in (("norm1", 0), ("conv1", 2), ("norm2", 3), ("conv2", 6))),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.", ".downsamples."),
)
# What ComfyUI's loader takes as given.
FIXED = {"z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}


class VideoLatent(comfy.latent_formats.Wan21):  # type: ignore[misc]
    """Wan's latents, [B, 16, T, h, w], with an autoencoder's own mean and deviation of each channel."""

    def __init__(self, mean: list[float], deviation: list[float]) -> None:
        super().__init__()
        self.latents_mean, self.latents_std = (torch.tensor(value).view(1, -1, 1, 1, 1) for value in (mean, deviation))


def is_video(config: Config) -> bool:
    """Whether an autoencoder's configuration is one of videos."""
    return "temperal_downsample" in config  # spelled so in diffusers


def video_latent(config: Config) -> VideoLatent:
    return VideoLatent(config["latents_mean"], config["latents_std"])


def load_video_vae(folder: Path) -> comfy.sd.VAE:
    """The folder's `vae` as a VAE object."""
    require("the autoencoder", read_config(folder, "vae"), FIXED)
    return comfy.sd.VAE(sd=renamed(read_weights(folder, "vae")), dtype=torch.float32)


def rename(name: str) -> str:
    name = re.sub(
        r"\.up_blocks\.(\d+)\.resnets\.(\d+)\.", lambda at: f".upsamples.{4 * int(at[1]) + int(at[2])}.", name
    )
    name = re.sub(r"\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda at: f".upsamples.{4 * int(at[1]) + 3}.", name)
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    return name


def renamed(weights: Weights) -> Weights:
    return {rename(name): tensor for name, tensor in weights.items()}
