"""A diffusers SD3Transformer2DModel folder as ComfyUI's SD3 network."""

from __future__ import annotations

from pathlib import Path

import comfy.model_detection
import comfy.supported_models

from ...core.errors import OneStepError
from .folder import Config, Weights, read_config, read_weights, require


class TinySD3(comfy.supported_models.SD3):  # type: ignore[misc]
    """SD3 with any number of latent channels."""

    memory_usage_factor = 1.0


def mmdit_setup(folder: Path) -> tuple[TinySD3, Weights]:
    """The model configuration and the weights under ComfyUI's names."""
    config, schedule = read_config(folder, "transformer"), read_config(folder, "scheduler")
    require("the transformer", config, {"attention_head_dim": 64, "num_attention_heads": config["num_layers"]})
    given = read_weights(folder, "transformer")
    weights = comfy.model_detection.convert_diffusers_mmdit(given, "")
    if weights is None or given:
        raise OneStepError(
            f"{len(given)} transformer weights are unknown to ComfyUI's SD3 class, {min(given)} "
            f"the first: this layout is not supported"
        )
    setup = TinySD3(comfy.model_detection.detect_unet_config(weights, ""))
    setup.sampling_settings = sampling_settings(schedule)
    return setup, weights


def sampling_settings(schedule: Config) -> Config:
    if schedule.get("use_dynamic_shifting"):
        raise OneStepError(
            "the scheduler shifts by the picture's size (use_dynamic_shifting), which SD3 in "
            "ComfyUI does not: give a fixed shift"
        )
    return {"shift": schedule.get("shift", 1.0), "multiplier": 1000}
