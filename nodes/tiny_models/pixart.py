"""A folder of diffusers' PixArt-Sigma of any size as ComfyUI's network."""

from __future__ import annotations

from pathlib import Path

import comfy.supported_models
import comfy.utils
import torch

from .flux2 import fused
from .folder import Config, Weights, read_config, read_weights, require


class TinyPixArt(comfy.supported_models.PixArtSigma):  # type: ignore[misc]
    """PixArt-Sigma at any width, which ComfyUI's detection fixes."""


def pixart_setup(folder: Path) -> tuple[TinyPixArt, Weights]:
    """The model configuration and the weights under ComfyUI's names."""
    config, schedule = read_config(folder, "transformer"), read_config(folder, "scheduler")
    wanted = {"beta_schedule": "linear", "prediction_type": "epsilon", "beta_start": 0.0001, "beta_end": 0.02}
    require("the scheduler", schedule, wanted)
    require("the transformer", config, {"out_channels": 2 * config["in_channels"], "patch_size": 2})
    told = unet_config(config)
    weights = fused(read_weights(folder, "transformer"), comfy.utils.pixart_to_diffusers(told))
    # what captions are dropped for in its authors' training
    weights["y_embedder.y_embedding"] = torch.zeros(told["model_max_length"], told["caption_channels"])
    return TinyPixArt(told), weights


def unet_config(config: Config) -> Config:
    """diffusers' configuration in ComfyUI's words."""
    heads = config["num_attention_heads"]
    return {
        **{"image_model": "pixart_sigma", "patch_size": 2, "in_channels": config["in_channels"], "num_heads": heads},
        **{"hidden_size": heads * config["attention_head_dim"], "depth": config["num_layers"]},
        **{"caption_channels": config["caption_channels"], "model_max_length": 300, "micro_condition": False},
    }
