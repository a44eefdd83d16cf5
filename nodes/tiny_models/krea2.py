"""A folder of diffusers' Krea 2 of any size as ComfyUI's network, and its Qwen3-VL, which reads texts alone, as
ComfyUI's CLIP."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import torch
from comfy.text_encoders import krea2, llama, qwen3vl

from ...core.families import FAMILIES
from ...core.families.krea2 import layout_of_canonical
from .folder import Config, Weights, read_config, read_weights, require
from .z_image import TinyTokenizer

PREFIX = "qwen3vl_4b"
TEMPLATE = 34
"""Tokens before a prompt, which ComfyUI finds by the published tokenizer's own numbers."""
FUSED = {"num_layerwise_text_blocks": 2, "num_refiner_text_blocks": 2, "rope_theta": 1000.0, "norm_eps": 1e-5}
"""What ComfyUI's class takes as given."""
NORMS = {"norm1.weight": "prenorm.scale", "norm2.weight": "postnorm.scale"}
NORMS |= {f"attn.norm_{part}.weight": f"attn.qknorm.{part}norm.scale" for part in "qk"}
BESIDE = {
    "txt_in.norm.weight": "txtmlp.0.scale",
    "final_layer.norm.weight": "last.norm.scale",
    "final_layer.scale_shift_table": "last.modulation.lin",
}


class TinyKrea2(comfy.supported_models.Krea2):  # type: ignore[misc]
    """Krea 2 at any width, which ComfyUI's detection counts in heads of 128 and twenty of the text's."""


def krea2_setup(folder: Path) -> tuple[TinyKrea2, Weights]:
    """The model configuration and the weights under ComfyUI's names."""
    config, schedule = read_config(folder, "transformer"), read_config(folder, "scheduler")
    require("the transformer", config, FUSED)
    setup = TinyKrea2(unet_config(config))
    if not schedule.get("use_dynamic_shifting"):
        setup.sampling_settings = {**setup.sampling_settings, "shift": math.log(schedule.get("shift", 1.0))}
    return setup, renamed(read_weights(folder, "transformer"))


def unet_config(config: Config) -> Config:
    """diffusers' configuration in ComfyUI's words."""
    names = {"num_layers": "layers", "num_attention_heads": "heads", "num_key_value_heads": "kvheads"}
    names |= {"timestep_embed_dim": "tdim", "text_hidden_dim": "txtdim", "num_text_layers": "txtlayers"}
    names |= {"text_num_attention_heads": "txtheads", "text_num_key_value_heads": "txtkvheads"}
    return {
        **{"image_model": "krea2", "patch": 2, "channels": config["in_channels"] // 4},
        "features": config["attention_head_dim"] * config["num_attention_heads"],
        **{theirs: config[ours] for ours, theirs in names.items()},
    }


def renamed(weights: Weights) -> Weights:
    """diffusers' weights by ComfyUI's names; no layer is fused."""
    layout = layout_of_canonical(weights)
    paths = {row.names[0]: row.host for row in FAMILIES["krea2"].rows(layout)}
    table = BESIDE | {f"{ours}.{kind}": f"{paths[ours]}.{kind}" for ours in paths for kind in ("weight", "bias")}
    blocks = {ours.removesuffix(".attn.to_q"): paths[ours].removesuffix(".attn.wq") for ours in paths if "to_q" in ours}
    for ours, theirs in blocks.items():
        table |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in NORMS.items()}
        table[f"{ours}.scale_shift_table"] = f"{theirs}.mod.lin"
    return {table[name]: value.flatten() if "mod.lin" in table[name] else value for name, value in weights.items()}


class TinyTemplate(krea2.Krea2Tokenizer):  # type: ignore[misc]
    """Krea 2's template around a prompt, before a folder's own tokenizer."""

    def __init__(self, tokenizer: Any, embedding_directory: Any = None, tokenizer_data: Config | None = None) -> None:
        comfy.sd1_clip.SD1Tokenizer.__init__(
            self, embedding_directory, tokenizer_data=tokenizer_data or {}, name=PREFIX, tokenizer=tokenizer
        )
        self.llama_template = krea2.KREA2_TEMPLATE


class Blind(qwen3vl.Qwen3VL):  # type: ignore[misc]
    """Qwen3-VL without its eyes, which no text passes through."""

    def __init__(self, config_dict: Config, dtype: Any, device: Any, operations: Any) -> None:
        torch.nn.Module.__init__(self)
        config = llama.Qwen3VL_4BConfig(**config_dict)
        self.num_layers, self.dtype = config.num_hidden_layers, dtype
        self.model = llama.Llama2_(config, device=device, dtype=dtype, ops=operations)


class TinyEncoder(comfy.sd1_clip.SDClipModel):  # type: ignore[misc]
    """A Qwen3-VL of any size; heads are 128 wide, as ComfyUI has them. layers: whose inputs are the text."""

    def __init__(self, config: Config, layers: list[int], device: Any, dtype: Any, model_options: Config) -> None:
        names = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
        names |= {"num_key_value_heads"}
        super().__init__(
            **{"device": device, "dtype": dtype, "model_options": model_options, "layer": layers},
            **{"textmodel_json_config": {name: config[name] for name in names}, "layer_norm_hidden_state": False},
            **{"special_tokens": {"pad": config["pad_token_id"]}, "enable_attention_masks": True},
            **{"return_attention_masks": True, "model_class": Blind},
        )


class TinyText(krea2.Krea2TEModel):  # type: ignore[misc]
    """Without the template's tokens."""

    def __init__(
        self,
        config: Config,
        layers: list[int],
        device: Any = "cpu",
        dtype: Any = None,
        model_options: Config | None = None,
    ) -> None:
        clip = partial(TinyEncoder, config, layers)
        comfy.sd1_clip.SD1ClipModel.__init__(
            self, device=device, dtype=dtype, name=PREFIX, clip_model=clip, model_options=model_options or {}
        )

    def encode_token_weights(self, token_weight_pairs: Any, template_end: int = TEMPLATE) -> Any:
        return super().encode_token_weights(token_weight_pairs, template_end)


def qwen3vl_target(folder: Path) -> tuple[Any, Weights]:
    """The CLIP to build, and its weights under ComfyUI's names."""
    config = read_config(folder, "text_encoder")["text_config"]
    told = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    tokenizer = partial(TinyTokenizer, folder / "tokenizer", config["hidden_size"])
    target = comfy.supported_models_base.ClipTarget(
        partial(TinyTemplate, tokenizer), partial(TinyText, config, list(told["text_encoder_select_layers"]))
    )
    weights = read_weights(folder, "text_encoder")
    read = {name.removeprefix("language_model."): value for name, value in weights.items() if "visual." not in name}
    return target, {f"{PREFIX}.transformer.model.{name}": value for name, value in read.items()}
