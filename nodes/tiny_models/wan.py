"""A folder of diffusers' Wan of any size as ComfyUI's network, and its UMT5 text encoder as ComfyUI's CLIP."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.t5
from comfy.text_encoders.anima import T5TokenizerFast

from ...core.families import FAMILIES
from .folder import Config, Weights, read_config, read_weights, require
from .mmdit import sampling_settings

PREFIX = "umt5xxl"
# What ComfyUI's classes take as given.
FIXED = {"patch_size": [1, 2, 2], "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "image_dim": None}
BESIDE = {"patch_embedding": "patch_embedding", "scale_shift_table": "head.modulation"}
IN_BLOCKS = {"norm2": "norm3", "scale_shift_table": "modulation"}
IN_BLOCKS |= {
    f"{ours}.norm_{letter}": f"{theirs}.norm_{letter}"
    for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
    for letter in "qk"
}


class TinyWan(comfy.supported_models.WAN21_T2V):  # type: ignore[misc]
    """Wan with heads and a text of any width, which ComfyUI's detection fixes."""


def wan_setup(folder: Path) -> tuple[TinyWan, Weights]:
    """The model configuration and the weights under ComfyUI's names."""
    config, schedule = read_config(folder, "transformer"), read_config(folder, "scheduler")
    require("the transformer", config, FIXED)
    setup = TinyWan(unet_config(config))
    # a scheduler of several families has the shift of a flow under a name of its own
    shift = schedule.get("flow_shift", schedule.get("shift", 1.0))
    setup.sampling_settings = sampling_settings({**schedule, "shift": shift})
    return setup, renamed(read_weights(folder, "transformer"), config["num_layers"])


def unet_config(config: Config) -> Config:
    """diffusers' configuration in ComfyUI's words."""
    heads = config["num_attention_heads"]
    return {
        **{"image_model": "wan2.1", "model_type": "t2v", "dim": heads * config["attention_head_dim"]},
        **{"in_dim": config["in_channels"], "out_dim": config["out_channels"], "num_heads": heads},
        **{"ffn_dim": config["ffn_dim"], "num_layers": config["num_layers"], "patch_size": (1, 2, 2)},
        **{"freq_dim": config["freq_dim"], "text_dim": config["text_dim"], "window_size": (-1, -1)},
        **{"qk_norm": True, "cross_attn_norm": True, "eps": config.get("eps", 1e-6)},
    }


def renamed(weights: Weights, blocks: int) -> Weights:
    """diffusers' weights by ComfyUI's names; no layer is fused."""
    table = BESIDE | {name: row.host for row in FAMILIES["wan"].rows(blocks) for name in row.names}
    for block in range(blocks):
        table |= {f"blocks.{block}.{ours}": f"blocks.{block}.{theirs}" for ours, theirs in IN_BLOCKS.items()}
    return {_renamed(name, table): value for name, value in weights.items()}


def _renamed(name: str, table: dict[str, str]) -> str:
    layer, _, kind = name.rpartition(".")
    return f"{table[layer]}.{kind}" if kind in ("weight", "bias") else table[name]


class TinyTokens(comfy.sd1_clip.SDTokenizer):  # type: ignore[misc]
    """A folder's own tokenizer, of T5's kind, whose texts are filled up to the model's length."""

    def __init__(
        self, folder: Path, width: int, embedding_directory: Any = None, tokenizer_data: Config | None = None
    ) -> None:
        super().__init__(
            str(folder),
            **{"embedding_directory": embedding_directory, "embedding_size": width, "embedding_key": PREFIX},
            **{"tokenizer_class": T5TokenizerFast, "has_start_token": False, "pad_with_end": False, "pad_token": 0},
            **{"pad_to_max_length": False, "max_length": 10**8, "min_length": FAMILIES["wan"].tokens},
        )


class TinyEncoder(comfy.sd1_clip.SDClipModel):  # type: ignore[misc]
    """A UMT5 of any size, whose padding gives zeros."""

    def __init__(self, config: Config, device: Any, dtype: Any, model_options: Config) -> None:
        names = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "dense_act_fn", "is_gated_act")
        activation = {"gelu_new": "gelu_pytorch_tanh"}.get(config["dense_act_fn"], config["dense_act_fn"])
        told = {name: config[name] for name in names} | {"dense_act_fn": activation, "model_type": "umt5"}
        super().__init__(
            **{"device": device, "dtype": dtype, "model_options": model_options, "layer": "last"},
            **{"textmodel_json_config": told, "special_tokens": {"end": 1, "pad": 0}},
            **{"enable_attention_masks": True, "zero_out_masked": True, "model_class": comfy.text_encoders.t5.T5},
        )


def umt5_target(folder: Path) -> tuple[Any, Weights]:
    """The CLIP to build, and its weights under ComfyUI's names."""
    config = read_config(folder, "text_encoder")
    tokenizer = partial(TinyTokens, folder / "tokenizer", config["d_model"])
    target = comfy.supported_models_base.ClipTarget(
        partial(comfy.sd1_clip.SD1Tokenizer, clip_name=PREFIX, tokenizer=tokenizer),
        partial(comfy.sd1_clip.SD1ClipModel, name=PREFIX, clip_model=partial(TinyEncoder, config)),
    )
    weights = read_weights(folder, "text_encoder")
    # two names of one table, of which either may be in the file
    table = weights.pop("encoder.embed_tokens.weight", None)
    shared = weights if table is None else {"shared.weight": table, **weights}
    return target, {f"{PREFIX}.transformer.{name}": value for name, value in shared.items()}
