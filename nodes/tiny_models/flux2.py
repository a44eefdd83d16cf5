"""A folder of diffusers' FLUX.2 of any size as ComfyUI's network, and klein's Qwen3 text encoder as ComfyUI's CLIP."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.text_encoders.flux import Flux2TEModel, KleinTokenizer

from ...core.families import FAMILIES
from .folder import Config, Weights, read_config, read_weights
from .z_image import PREFIX, TinyEncoder, TinyTokenizer

LAYERS = [9, 18, 27]
"""Of the text encoder, whose hidden states beside one another are the text."""
EMBEDDERS = {"timestep_embedder": "time_in", "guidance_embedder": "guidance_in"}
MODULATIONS = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")


class TinyFlux2(comfy.supported_models.Flux2):  # type: ignore[misc]
    """FLUX.2 at any width, which ComfyUI's detection counts in heads of 128."""


def flux2_setup(folder: Path) -> tuple[TinyFlux2, Weights]:
    """The model configuration and the weights under ComfyUI's names."""
    config = unet_config(read_config(folder, "transformer"))
    return TinyFlux2(config), renamed(read_weights(folder, "transformer"), config, dict(beside()))


def unet_config(config: Config) -> Config:
    """diffusers' configuration in ComfyUI's words."""
    heads = config["num_attention_heads"]
    return {
        **{"image_model": "flux2", "patch_size": 1, "vec_in_dim": None, "txt_ids_dims": [3], "mlp_silu_act": True},
        **{"in_channels": config["in_channels"], "out_channels": config["out_channels"] or config["in_channels"]},
        **{"context_in_dim": config["joint_attention_dim"], "hidden_size": heads * config["attention_head_dim"]},
        **{"num_heads": heads, "mlp_ratio": config["mlp_ratio"], "theta": config["rope_theta"]},
        **{"depth": config["num_layers"], "depth_single_blocks": config["num_single_layers"]},
        **{"axes_dim": list(config["axes_dims_rope"]), "qkv_bias": False, "ops_bias": False},
        **{"guidance_embed": config["guidance_embeds"], "global_modulation": True},
        **{"default_ref_method": "index", "ref_index_scale": 10.0},
    }


def renamed(weights: Weights, config: Config, lacking: dict[str, str]) -> Weights:
    """By ComfyUI's own map of Flux' blocks, and by hand what that lacks."""
    return fused(weights, comfy.utils.flux_to_diffusers(config) | lacking)


def fused(weights: Weights, table: Config) -> Weights:
    """diffusers' weights by one of ComfyUI's own maps: what it makes one layer of is one."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in weights.items():
        entry = table[name]
        key, rows, change = (entry, None, None) if isinstance(entry, str) else (*entry, None, None)[:3]
        found.setdefault(key, {})[rows[1] if rows else 0] = change(tensor) if change else tensor
    return {key: torch.cat([parts[start] for start in sorted(parts)]) for key, parts in found.items()}


def beside() -> list[tuple[str, str]]:
    told = [
        (f"time_guidance_embed.{ours}.linear_{at}.weight", f"{theirs}.{way}_layer.weight")
        for ours, theirs in EMBEDDERS.items()
        for at, way in ((1, "in"), (2, "out"))
    ]
    return [*told, *((f"{name}.linear.weight", f"{name}.lin.weight") for name in MODULATIONS)]


class TinyTemplate(KleinTokenizer):  # type: ignore[misc]
    """klein's template around a prompt, before a folder's own tokenizer."""

    def __init__(self, tokenizer: Any, embedding_directory: Any = None, tokenizer_data: Config | None = None) -> None:
        super().__init__(embedding_directory, {**(tokenizer_data or {}), f"{PREFIX}_tokenizer_class": tokenizer})


def klein_target(folder: Path) -> tuple[Any, Weights]:
    """The CLIP to build, and its weights under ComfyUI's names."""
    config, least = read_config(folder, "text_encoder"), FAMILIES["flux2"].tokens
    tokenizer = partial(TinyTokenizer, folder / "tokenizer", config["hidden_size"], least=least)
    target = comfy.supported_models_base.ClipTarget(
        partial(TinyTemplate, tokenizer),
        partial(Flux2TEModel, name=PREFIX, clip_model=partial(TinyEncoder, config, LAYERS)),
    )
    weights = read_weights(folder, "text_encoder")
    return target, {f"{PREFIX}.transformer.{name}": value for name, value in weights.items() if "lm_head" not in name}
