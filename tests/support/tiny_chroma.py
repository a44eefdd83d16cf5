"""Chroma's pipeline with random weights, a few channels wide: diffusers' classes with a T5 as their text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from tiny_folders import autoencoder, shaken, t5_tokenizer
from transformers import T5Config, T5EncoderModel

PUBLISHED: dict[str, Any] = {"shift": 1.0}
"""Steps that are not shifted, as ComfyUI's template image_chroma_text_to_image draws."""


def encoder(vocabulary: int, width: int = 24) -> T5EncoderModel:
    config = {"vocab_size": vocabulary, "d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5EncoderModel(T5Config(**config, feed_forward_proj="gated-gelu"))


def transformer(channels: int = 16, width: int = 24, **more: Any) -> ChromaTransformer2DModel:
    return ChromaTransformer2DModel(
        **{"in_channels": channels, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": width},
        **{"axes_dims_rope": (4, 6, 6), "approximator_hidden_dim": 40, **more},
    )


def chroma(vae: Any, channels: int = 16, **more: Any) -> ChromaPipeline:
    """more: of its network, and ``scheduler``, of that."""
    tokenizer, told = t5_tokenizer(), more.pop("scheduler", {})
    return ChromaPipeline(
        **{"transformer": transformer(channels, **more), "vae": vae, "tokenizer": tokenizer},
        **{"text_encoder": encoder(len(tokenizer)), "scheduler": FlowMatchEulerDiscreteScheduler(**PUBLISHED | told)},
    )


def chroma_folder(folder: Path, **scheduler: Any) -> Path:
    """ChromaPipeline's layout, with weights of none at its special start: as many blocks as ComfyUI's class has
    modulations for."""
    torch.manual_seed(1)
    pipe = chroma(shaken(autoencoder(0.8, 0.1, plain=True), 2), scheduler=scheduler)
    shaken(pipe.transformer, 3)
    shaken(pipe.text_encoder, 4)
    pipe.save_pretrained(folder)
    return folder
