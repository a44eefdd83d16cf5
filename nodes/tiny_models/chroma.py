"""A folder of diffusers' Chroma of any width as ComfyUI's network."""

from __future__ import annotations

import math
from pathlib import Path

import comfy.supported_models

from .flux2 import renamed
from .folder import Config, Weights, read_config, read_weights, require

BLOCKS = {"num_layers": 19, "num_single_layers": 38}
"""ComfyUI's class makes the modulations of so many, however many there are."""
MAKER = "distilled_guidance_layer"


class TinyChroma(comfy.supported_models.Chroma):  # type: ignore[misc]
    """Chroma at any width, which ComfyUI's detection fixes."""


def chroma_setup(folder: Path) -> tuple[TinyChroma, Weights]:
    """The model configuration and the weights under ComfyUI's names."""
    config, schedule = read_config(folder, "transformer"), read_config(folder, "scheduler")
    require("the transformer", config, BLOCKS)
    setup = TinyChroma(unet_config(config))
    if not schedule.get("use_dynamic_shifting"):
        setup.sampling_settings = {**setup.sampling_settings, "shift": math.log(schedule.get("shift", 1.0))}
    beside = dict(of_maker(config["approximator_layers"]))
    return setup, renamed(read_weights(folder, "transformer"), unet_config(config), beside)


def unet_config(config: Config) -> Config:
    """diffusers' configuration in ComfyUI's words."""
    heads, channels = config["num_attention_heads"], config["in_channels"]
    width = heads * config["attention_head_dim"]
    return {
        **{"image_model": "chroma", "patch_size": 2, "vec_in_dim": None, "txt_ids_dims": [], "qkv_bias": True},
        **{"in_channels": channels, "out_channels": config["out_channels"] or channels, "hidden_size": width},
        **{"context_in_dim": config["joint_attention_dim"], "num_heads": heads, "mlp_ratio": 4.0, "theta": 10000},
        **{"depth": config["num_layers"], "depth_single_blocks": config["num_single_layers"]},
        **{"axes_dim": list(config["axes_dims_rope"]), "in_dim": config["approximator_num_channels"]},
        **{"out_dim": width, "hidden_dim": config["approximator_hidden_dim"]},
        "n_layers": config["approximator_layers"],
    }


def of_maker(layers: int) -> list[tuple[str, str]]:
    """Of what makes the modulations, which ComfyUI's map lacks."""
    alike = ["in_proj", "out_proj", *(f"norms.{n}" for n in range(layers))]
    ways = ((1, "in"), (2, "out"))
    apart = [(f"layers.{n}.linear_{at}", f"layers.{n}.{way}_layer") for n in range(layers) for at, way in ways]
    paths = [*((path, path) for path in alike), *apart]
    return [
        (f"{MAKER}.{ours}.{kind}", f"{MAKER}.{theirs}.{kind}") for ours, theirs in paths for kind in ("weight", "bias")
    ]
