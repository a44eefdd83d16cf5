"""Lumina 2's pipeline with random weights, a few channels wide: diffusers' classes with a Gemma-2 as their text
encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from tiny_folders import shaken
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")


def tokenizer(folder: Path | None = None) -> GemmaTokenizer:
    """A tokenizer of Gemma's kind that spells every word."""
    letters = [chr(code) for code in range(33, 127)]
    made = GemmaTokenizer(
        {piece: at for at, piece in enumerate([*SPECIAL, "\u2581", *letters])}, [], add_bos_token=True
    )
    if folder is not None:
        made.save_pretrained(folder)
    return made


def encoder(vocabulary: int, width: int, head: int = 256) -> Gemma2Model:
    """ComfyUI's heads are 256 wide, and it does not cap their scores, which transformers does at 50. The last but one
    of its layers is not the first."""
    config = Gemma2Config(
        **{"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": head, "query_pre_attn_scalar": head},
        **{
            "attn_logit_softcapping": None,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
            "max_position_embeddings": 1024,
        },
    )
    return Gemma2Model(config)


def lumina2(vae: Any, width: int = 24, head: int = 256, **scheduler: Any) -> Lumina2Pipeline:
    """Two blocks after one of refining for each stream. width: of a text token. head: of the text encoder's."""
    words = tokenizer()
    transformer = Lumina2Transformer2DModel(
        **{"hidden_size": 96, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 6, "num_kv_heads": 2},
        **{"multiple_of": 128, "axes_dim_rope": (4, 6, 6), "axes_lens": (300, 32, 32), "cap_feat_dim": width},
        **{"in_channels": vae.config.latent_channels, "sample_size": 8},
    )
    return Lumina2Pipeline(
        **{"scheduler": FlowMatchEulerDiscreteScheduler(**{"shift": 6.0, **scheduler}), "vae": vae},
        **{"transformer": transformer, "text_encoder": encoder(len(words), width, head), "tokenizer": words},
    )


def lumina2_folder(folder: Path, vae: Any, **more: Any) -> Path:
    """Lumina2Pipeline's layout, with weights of none at its special start."""
    torch.manual_seed(1)
    pipe = lumina2(vae, **more)
    shaken(pipe.transformer, 3)
    shaken(pipe.text_encoder, 4)
    pipe.save_pretrained(folder)
    return folder
