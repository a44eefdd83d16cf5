"""PixArt-Sigma's pipeline with random weights, a few channels wide: diffusers' classes with a T5 as their text
encoder, and latents as large as pictures, for ComfyUI places no fewer than 33 by 33."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from tiny_chroma import encoder
from tiny_folders import shaken, t5_tokenizer

PUBLISHED: dict[str, Any] = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}


def transformer(**more: Any) -> PixArtTransformer2DModel:
    told = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "cross_attention_dim": 48}
    told |= {"caption_channels": 24, "sample_size": 64, "use_additional_conditions": False}
    return PixArtTransformer2DModel(**told | more)


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        **{"block_out_channels": (32,), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 32},
        **{"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)},
        **{"mid_block_add_attention": False, "sample_size": 40, "scaling_factor": 0.6},
    )


def pixart(**scheduler: Any) -> PixArtSigmaPipeline:
    tokenizer = t5_tokenizer()
    return PixArtSigmaPipeline(
        **{"transformer": transformer(), "vae": vae(), "tokenizer": tokenizer},
        **{"text_encoder": encoder(len(tokenizer)), "scheduler": DPMSolverMultistepScheduler(**PUBLISHED | scheduler)},
    )


def pixart_folder(folder: Path, **scheduler: Any) -> Path:
    """PixArtSigmaPipeline's layout, with weights of none at its special start."""
    torch.manual_seed(1)
    pipe = pixart(**scheduler)
    for seed, part in enumerate((pipe.vae, pipe.transformer, pipe.text_encoder), 2):
        shaken(part, seed)
    pipe.save_pretrained(folder)
    return folder
