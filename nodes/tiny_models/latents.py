"""The latent format of a tiny model: its scale, its reduction, and a linear map to colours for previews."""

from __future__ import annotations

import itertools
from pathlib import Path

import comfy.latent_formats
import comfy.sd
import torch

from ..autoencoder import encoded
from .autoencoder import channels, reduction
from .folder import read_config
from .video_autoencoder import is_video, video_latent


class TinyLatent(comfy.latent_formats.LatentFormat):  # type: ignore[misc]
    """Model latents = (autoencoder latents - shift) * scale."""

    def __init__(self, channels: int, scale: float, shift: float, pixels: int) -> None:
        self.latent_channels = channels
        self.scale_factor = scale
        self.shift_factor = shift
        self.spacial_downscale_ratio = pixels  # spelled so in ComfyUI

    def process_in(self, latent: torch.Tensor) -> torch.Tensor:
        return (latent - self.shift_factor) * self.scale_factor

    def process_out(self, latent: torch.Tensor) -> torch.Tensor:
        return latent / self.scale_factor + self.shift_factor


def latent_format(folder: Path) -> comfy.latent_formats.LatentFormat:
    config = read_config(folder, "vae")
    if is_video(config):
        return video_latent(config)
    scale, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
    return TinyLatent(channels(config), float(scale), float(shift), reduction(config))


@torch.no_grad()
def fit_preview_colours(latent: comfy.latent_formats.LatentFormat, vae: comfy.sd.VAE) -> None:
    """Least squares from the latents of flat colours to these colours in [-1, 1]: what step previews are drawn with."""
    side = 4 * latent.spacial_downscale_ratio
    colours = torch.tensor(list(itertools.product((0.0, 0.5, 1.0), repeat=3)))
    pictures = colours[:, None, None, :].expand(-1, side, side, -1)
    inner = latent.process_in(encoded(vae, pictures).float().cpu())[..., 1:-1, 1:-1].flatten(2).mean(2)
    known = torch.cat([inner, torch.ones(len(inner), 1)], 1)
    solution = torch.linalg.pinv(known.double()) @ (2 * colours.double() - 1)
    latent.latent_rgb_factors = solution[:-1].tolist()
    latent.latent_rgb_factors_bias = solution[-1].tolist()
