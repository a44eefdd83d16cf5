"""A folder of diffusers' Qwen-Image of any size as ComfyUI's network, and its Qwen2.5-VL, which reads texts alone, as
ComfyUI's CLIP."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import torch
from comfy.text_encoders import llama, qwen_image

from ...core.errors import OneStepError
from .folder import Config, Weights, read_config, read_weights
from .z_image import TinyTokenizer

PREFIX = "qwen25_7b"
TEMPLATE = 34
"""Tokens before a prompt, which ComfyUI finds by the published tokenizer's own numbers."""


class TinyQwenImage(comfy.supported_models.QwenImage):  # type: ignore[misc]
    """Qwen-Image at any width, which ComfyUI's detection fixes."""


def qwen_image_setup(folder: Path) -> tuple[TinyQwenImage, Weights]:
    """The model configuration and the weights, whose names are the same in both hosts."""
    config, schedule = read_config(folder, "transformer"), read_config(folder, "scheduler")
    if config.get("zero_cond_t") or config.get("use_additional_t_cond"):
        raise OneStepError("this Qwen-Image edits pictures or draws layers: give one that draws a text's picture")
    names = ("patch_size", "in_channels", "out_channels", "num_layers", "attention_head_dim", "num_attention_heads")
    told = {name: config[name] for name in (*names, "joint_attention_dim", "axes_dims_rope")}
    setup = TinyQwenImage({"image_model": "qwen_image", **told})
    if not schedule.get("use_dynamic_shifting"):
        setup.sampling_settings = {**setup.sampling_settings, "shift": math.log(schedule.get("shift", 1.0))}
    return setup, read_weights(folder, "transformer")


class TinyTemplate(qwen_image.QwenImageTokenizer):  # type: ignore[misc]
    """Qwen-Image's template around a prompt, before a folder's own tokenizer."""

    def __init__(self, tokenizer: Any, embedding_directory: Any = None, tokenizer_data: Config | None = None) -> None:
        super().__init__(embedding_directory, {**(tokenizer_data or {}), f"{PREFIX}_tokenizer_class": tokenizer})


class Blind(llama.Qwen25_7BVLI):  # type: ignore[misc]
    """Qwen2.5-VL without its eyes, half a billion weights that no text passes through."""

    def __init__(self, config_dict: Config, dtype: Any, device: Any, operations: Any) -> None:
        torch.nn.Module.__init__(self)
        config = llama.Qwen25_7BVLI_Config(**config_dict)
        self.num_layers, self.dtype = config.num_hidden_layers, dtype
        self.model = llama.Llama2_(config, device=device, dtype=dtype, ops=operations)


class TinyEncoder(comfy.sd1_clip.SDClipModel):  # type: ignore[misc]
    """A Qwen2.5-VL of any size, whose last hidden states are the text; heads are 128 wide, as ComfyUI has them."""

    def __init__(self, config: Config, device: Any, dtype: Any, model_options: Config) -> None:
        names = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
        names |= {"num_key_value_heads"}
        super().__init__(
            **{"device": device, "dtype": dtype, "model_options": model_options, "layer": "last"},
            **{"textmodel_json_config": {name: config[name] for name in names}, "layer_norm_hidden_state": False},
            **{"special_tokens": {"pad": config["pad_token_id"]}, "enable_attention_masks": True},
            **{"return_attention_masks": True, "model_class": Blind},
        )


class TinyText(qwen_image.QwenImageTEModel):  # type: ignore[misc]
    """Without the template's tokens."""

    def __init__(self, config: Config, device: Any = "cpu", dtype: Any = None, model_options: Config | None = None):
        clip = partial(TinyEncoder, config)
        comfy.sd1_clip.SD1ClipModel.__init__(
            self, device=device, dtype=dtype, name=PREFIX, clip_model=clip, model_options=model_options or {}
        )

    def encode_token_weights(self, token_weight_pairs: Any, template_end: int = TEMPLATE) -> Any:
        return super().encode_token_weights(token_weight_pairs, template_end)


def qwen25_target(folder: Path) -> tuple[Any, Weights]:
    """The CLIP to build, and its weights under ComfyUI's names."""
    config = read_config(folder, "text_encoder")["text_config"]
    tokenizer = partial(TinyTokenizer, folder / "tokenizer", config["hidden_size"])
    target = comfy.supported_models_base.ClipTarget(partial(TinyTemplate, tokenizer), partial(TinyText, config))
    weights = read_weights(folder, "text_encoder")
    # versions of transformers name the part that reads differently
    inner = {name.replace("model.language_model.", "model."): value for name, value in weights.items()}
    read = ("model.layers.", "model.embed_tokens.", "model.norm.")
    return target, {f"{PREFIX}.transformer.{name}": value for name, value in inner.items() if name.startswith(read)}
