"""A folder of diffusers' Lumina 2 of any size as ComfyUI's network, and its Gemma-2 text encoder as ComfyUI's CLIP."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.llama
import torch
from comfy.text_encoders.sd3_clip import T5TokenizerFast

from ...core.families import FAMILIES
from .folder import Config, Weights, read_config, read_weights
from .mmdit import sampling_settings

PREFIX = "gemma2_2b"
TokenizerFile: Any = T5TokenizerFast.__base__
"""transformers' class of any kind of tokenizer, which is what its file says."""
LAYER = -2  # whose hidden states are the text
NORMS = (
    (r"\.norm1(\.norm)?\.weight$", ".attention_norm1.weight"),
    (r"\.norm2\.weight$", ".attention_norm2.weight"),
    (r"\.attn\.norm_([qk])\.", r".attention.\1_norm."),
    (r"^time_caption_embed\.caption_embedder\.", "cap_embedder."),
)
"""diffusers' gains by ComfyUI's names; others are alike."""


class TinyLumina2(comfy.supported_models.Lumina2):  # type: ignore[misc]
    """Lumina 2 at any width, which ComfyUI's detection fixes."""


def lumina2_setup(folder: Path) -> tuple[TinyLumina2, Weights]:
    """The model configuration and the weights under ComfyUI's names."""
    config, schedule = read_config(folder, "transformer"), read_config(folder, "scheduler")
    setup = TinyLumina2(unet_config(config))
    setup.sampling_settings = sampling_settings(schedule) | {"multiplier": 1.0}
    return setup, renamed(read_weights(folder, "transformer"))


def unet_config(config: Config) -> Config:
    """diffusers' configuration in ComfyUI's words."""
    return {
        **{"image_model": "lumina2", "patch_size": 2, "qk_norm": True, "rope_theta": 10000.0},
        **{"in_channels": config["in_channels"], "dim": config["hidden_size"], "cap_feat_dim": config["cap_feat_dim"]},
        **{"n_layers": config["num_layers"], "n_refiner_layers": config["num_refiner_layers"]},
        **{"n_heads": config["num_attention_heads"], "n_kv_heads": config["num_kv_heads"]},
        **{"multiple_of": config["multiple_of"], "ffn_dim_multiplier": 4.0 * (config["ffn_dim_multiplier"] or 1.0)},
        **{"axes_dims": list(config["axes_dim_rope"]), "axes_lens": list(config["axes_lens"])},
    }


def renamed(weights: Weights) -> Weights:
    """diffusers' weights by ComfyUI's names, fused where its layers are."""
    family, left, found = FAMILIES["lumina2"], dict(weights), {}
    layout = family.layout_of_canonical(weights)
    for row in family.rows(layout):
        for end in ("weight", "bias"):
            parts = [left.pop(f"{name}.{end}") for name in row.names if f"{name}.{end}" in left]
            if parts:
                found[f"{row.host}.{end}"] = torch.cat(parts)
    for name, value in left.items():
        for pattern, new in NORMS:
            name = re.sub(pattern, new, name)
        found[name] = value
    return found


class TinyTokenizer(comfy.sd1_clip.SDTokenizer):  # type: ignore[misc]
    """A folder's own tokenizer, of Gemma's kind: a token begins every text, none pads it."""

    def __init__(
        self, folder: Path, width: int, embedding_directory: Any = None, tokenizer_data: Config | None = None
    ) -> None:
        super().__init__(
            str(folder),
            **{"embedding_directory": embedding_directory, "embedding_size": width, "embedding_key": PREFIX},
            **{"tokenizer_class": TokenizerFile, "has_end_token": False, "pad_with_end": False},
            **{"pad_to_max_length": False, "max_length": 10**8, "min_length": 1},
        )


class TinyEncoder(comfy.sd1_clip.SDClipModel):  # type: ignore[misc]
    """A Gemma-2 of any size; heads are 256 wide, as ComfyUI has them."""

    def __init__(self, config: Config, device: Any, dtype: Any, model_options: Config) -> None:
        names = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
        names |= {"num_key_value_heads"}
        super().__init__(
            **{"device": device, "dtype": dtype, "model_options": model_options, "layer": "hidden", "layer_idx": LAYER},
            **{"textmodel_json_config": {name: config[name] for name in names}, "layer_norm_hidden_state": False},
            **{"special_tokens": {"start": config["bos_token_id"], "pad": config["pad_token_id"]}},
            **{"enable_attention_masks": True, "return_attention_masks": True},
            model_class=comfy.text_encoders.llama.Gemma2_2B,
        )


def gemma2_target(folder: Path) -> tuple[Any, Weights]:
    """The CLIP to build, and its weights under ComfyUI's names."""
    config = read_config(folder, "text_encoder")
    tokenizer = partial(TinyTokenizer, folder / "tokenizer", config["hidden_size"])
    target = comfy.supported_models_base.ClipTarget(
        partial(comfy.sd1_clip.SD1Tokenizer, name=PREFIX, tokenizer=tokenizer),
        partial(comfy.sd1_clip.SD1ClipModel, name=PREFIX, clip_model=partial(TinyEncoder, config)),
    )
    weights = read_weights(folder, "text_encoder")
    return target, {f"{PREFIX}.transformer.model.{name}": tensor for name, tensor in weights.items()}
