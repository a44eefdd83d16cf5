"""A diffusers UNet2DConditionModel folder as ComfyUI's U-Net."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.supported_models_base
import comfy.utils

from ...core.errors import OneStepError
from .folder import Config, Weights, read_config, read_weights, require

# Fixed in ComfyUI's class; diffusers' defaults are the same values.
FIXED: Config = {
    **{"norm_num_groups": 32, "norm_eps": 1e-5, "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0},
    **{"downsample_padding": 1, "resnet_time_scale_shift": "default", "mid_block_type": "UNetMidBlock2DCrossAttn"},
    **{"conv_in_kernel": 3, "conv_out_kernel": 3, "time_cond_proj_dim": None, "class_embed_type": None},
    **{"addition_embed_type": None, "center_input_sample": False, "dual_cross_attention": False},
}
PREDICTIONS = {"epsilon": comfy.model_base.ModelType.EPS, "v_prediction": comfy.model_base.ModelType.V_PREDICTION}
BETAS = {"scaled_linear": "linear", "linear": "sqrt_linear"}  # diffusers' word -> ComfyUI's


class TinyUNet(comfy.supported_models_base.BASE):  # type: ignore[misc]
    """A model configuration that states everything itself."""

    unet_extra_config: Config = {}
    memory_usage_factor = 1.0
    prediction = comfy.model_base.ModelType.EPS

    def model_type(self, state_dict: Weights, prefix: str = "") -> Any:
        return self.prediction


def unet_setup(folder: Path) -> tuple[TinyUNet, Weights]:
    """The model configuration and the weights under ComfyUI's names."""
    config, schedule = read_config(folder, "unet"), read_config(folder, "scheduler")
    require("the U-Net", config, FIXED)
    setup = TinyUNet(architecture(config))
    setup.prediction = PREDICTIONS[schedule.get("prediction_type", "epsilon")]
    setup.sampling_settings = sampling_settings(schedule)
    return setup, rename(read_weights(folder, "unet"), setup.unet_config)


def architecture(config: Config) -> Config:
    """diffusers' configuration in the words of ComfyUI's UNetModel."""
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    if any(width % widths[0] for width in widths):
        raise OneStepError(f"the U-Net's widths {widths} are no multiples of the first, which ComfyUI's class needs")
    down, up = attention_depths(config)
    return {
        **{"image_size": 32, "in_channels": config["in_channels"], "out_channels": config["out_channels"]},
        **{"model_channels": widths[0], "channel_mult": [width // widths[0] for width in widths]},
        **{"num_res_blocks": [layers] * len(widths), "context_dim": config["cross_attention_dim"]},
        "transformer_depth": [depth for depth in down for _ in range(layers)],
        "transformer_depth_output": [depth for depth in up for _ in range(layers + 1)],
        "transformer_depth_middle": per_level(config, "transformer_layers_per_block")[-1],
        **{"use_spatial_transformer": True, "use_linear_in_transformer": bool(config.get("use_linear_projection"))},
        **{"legacy": False, "use_checkpoint": False, "adm_in_channels": None},
        **{"use_temporal_attention": False, "use_temporal_resblock": False},
        **heads(config),
    }


def per_level(config: Config, key: str) -> list[int]:
    value = config.get(key, 1)
    return [value] * len(config["block_out_channels"]) if isinstance(value, int) else list(value)


def attention_depths(config: Config) -> tuple[list[int], list[int]]:
    """Transformer blocks per level on the way down and up, top level first; 0 where a block has no attention."""
    depths = per_level(config, "transformer_layers_per_block")
    down = [depth if "CrossAttn" in kind else 0 for kind, depth in zip(config["down_block_types"], depths, strict=True)]
    rising = reversed(config["up_block_types"])
    return down, [depth if "CrossAttn" in kind else 0 for kind, depth in zip(rising, depths, strict=True)]


def heads(config: Config) -> Config:
    """diffusers' attention_head_dim means the number of heads; ComfyUI takes one number or one width for all levels."""
    given = config.get("num_attention_heads") or config["attention_head_dim"]
    if isinstance(given, int):
        return {"num_heads": given, "num_head_channels": -1}
    head_widths = {width // count for width, count in zip(config["block_out_channels"], given, strict=True)}
    if len(head_widths) != 1:
        raise OneStepError(
            f"the U-Net has heads {given}: ComfyUI's class needs one number of heads or one head width for all levels"
        )
    return {"num_heads": -1, "num_head_channels": head_widths.pop()}


def rename(weights: Weights, unet_config: Config) -> Weights:
    """ComfyUI's own map of diffusers' names; nothing may be left over."""
    names = comfy.utils.unet_to_diffusers(unet_config)
    if foreign := sorted(set(weights) - set(names)):
        raise OneStepError(
            f"{len(foreign)} U-Net weights are unknown to ComfyUI's class, {foreign[0]} the "
            f"first: this layout is not supported"
        )
    return {names[name]: tensor for name, tensor in weights.items()}


def sampling_settings(schedule: Config) -> Config:
    return {
        "beta_schedule": BETAS[schedule.get("beta_schedule", "linear")],
        "linear_start": schedule.get("beta_start", 0.0001),
        "linear_end": schedule.get("beta_end", 0.02),
        "timesteps": schedule.get("num_train_timesteps", 1000),
        "zsnr": bool(schedule.get("rescale_betas_zero_snr", False)),
    }
