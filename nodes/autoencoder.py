"""IMAGEs and LATENTs by a VAE, also by one of videos, of which a picture is a single frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """[B, H, W, 3] of latents [B, C, h, w] or [B, C, 1, h, w] in the autoencoder's own scale."""
    made: Tensor = vae.decode(latents)
    return made.flatten(0, -4)  # as VAE Decode does with [B, T, H, W, 3]


def encoded(vae: Any, pictures: Tensor) -> Tensor:
    """The other way. ComfyUI takes a batch for the frames of one video, where the autoencoder is one of videos."""
    each = pictures.split(1 if getattr(vae, "latent_dim", 2) == 3 else len(pictures))
    return torch.cat([vae.encode(few) for few in each])
