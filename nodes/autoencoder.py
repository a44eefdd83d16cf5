"""IMAGEs and LATENTs by a VAE, also by one of videos, of which a picture is a single frame."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management as management
import torch
from torch import Tensor

from ..core.ordinary import make_ordinary
from .denoiser import framed, unframed


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """[B, H, W, 3] of latents [B, C, h, w] or [B, C, 1, h, w] in the autoencoder's own scale."""
    made: Tensor = vae.decode(latents)
    return made.flatten(0, -4)  # as VAE Decode does with [B, T, H, W, 3]


def encoded(vae: Any, pictures: Tensor) -> Tensor:
    """The other way. ComfyUI takes a batch for the frames of one video, where the autoencoder is one of videos."""
    each = pictures.split(1 if getattr(vae, "latent_dim", 2) == 3 else len(pictures))
    return torch.cat([vae.encode(few) for few in each])


def differentiable(model: Any, vae: Any) -> Callable[[Tensor], Tensor]:
    """Pictures [B, 3, H, W] of latents in the scale of ``model``, as far beyond [0, 1] as they are drawn, with a
    gradient in the latents."""
    with torch.inference_mode():
        management.load_models_gpu([vae.patcher])
    make_ordinary(vae.first_stage_model)
    vae.first_stage_model.requires_grad_(False)

    def decode(latents: Tensor) -> Tensor:
        own = model.process_latent_out(framed(model, latents))
        made = vae.first_stage_model.decode(own.to(vae.device, vae.vae_dtype))
        return unframed(model, made).to(latents.device, torch.float32) / 2 + 0.5

    return decode
