"""A folder of diffusers' Z-Image of any size as ComfyUI's network, and its Qwen3 text encoder as ComfyUI's CLIP."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.ops
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.llama
import comfy.text_encoders.z_image as z_image
from comfy.ldm.modules.diffusionmodules.mmdit import TimestepEmbedder

from ...core.errors import OneStepError
from .folder import Config, Weights, read_config, read_weights
from .mmdit import sampling_settings

PREFIX = "qwen3_4b"
TIME, TIME_OUT = 1024, 256
"""Of the time's embedding: diffusers' is so wide within at any size, ComfyUI's no wider than the network; at its end
diffusers' is no wider than the network, ComfyUI's so wide at any size."""
LAYER = -2  # whose hidden states are the text


class TinyZImage(comfy.supported_models.ZImage):  # type: ignore[misc]
    """Z-Image at any width, which ComfyUI's detection fixes."""

    memory_usage_factor = 1.0

    def get_model(self, state_dict: Weights, prefix: str = "", device: Any = None) -> Any:
        model = super().get_model(state_dict, prefix, device)
        build = {"dtype": model.get_dtype(), "device": device, "operations": comfy.ops.manual_cast}
        out = min(self.unet_config["dim"], TIME_OUT)
        model.diffusion_model.t_embedder = TimestepEmbedder(TIME, output_size=out, **build)
        return model


def z_image_setup(folder: Path) -> tuple[TinyZImage, Weights]:
    """The model configuration and the weights under ComfyUI's names."""
    config, schedule = read_config(folder, "transformer"), read_config(folder, "scheduler")
    weights = comfy.model_detection.convert_diffusers_mmdit(read_weights(folder, "transformer"), "")
    setup = TinyZImage(unet_config(config))
    setup.sampling_settings = sampling_settings(schedule) | {"multiplier": 1.0}
    return setup, weights


def unet_config(config: Config) -> Config:
    """diffusers' configuration in ComfyUI's words."""
    if config.get("siglip_feat_dim") is not None:
        raise OneStepError("this Z-Image reads pictures too (Omni): give one that reads texts alone")
    alike = ("in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads", "cap_feat_dim")
    rotary = {name: config[name] for name in ("axes_dims", "axes_lens", "rope_theta")}
    return {
        **{"image_model": "lumina2", "patch_size": 2, "qk_norm": True, "ffn_dim_multiplier": 8 / 3},
        **{"z_image_modulation": True, "time_scale": config["t_scale"], "pad_tokens_multiple": 32},
        **{name: config[name] for name in alike},
        **rotary,
    }


class TinyTokenizer(comfy.sd1_clip.SDTokenizer):  # type: ignore[misc]
    """A folder's own tokenizer, of Qwen2's kind: no tokens at the ends, and padding only up to ``least``."""

    def __init__(
        self,
        folder: Path,
        width: int,
        embedding_directory: Any = None,
        tokenizer_data: Config | None = None,
        *,
        least: int = 1,
    ) -> None:
        super().__init__(
            str(folder),
            **{"embedding_directory": embedding_directory, "embedding_size": width, "embedding_key": PREFIX},
            **{"tokenizer_class": z_image.Qwen2Tokenizer, "has_start_token": False, "has_end_token": False},
            **{"pad_to_max_length": False, "pad_with_end": False, "max_length": 10**8, "min_length": least},
        )
        self.pad_token = self.tokenizer.pad_token_id


class TinyTemplate(z_image.ZImageTokenizer):  # type: ignore[misc]
    """Z-Image's template around a prompt, before a folder's own tokenizer."""

    def __init__(self, tokenizer: Any, embedding_directory: Any = None, tokenizer_data: Config | None = None) -> None:
        super().__init__(embedding_directory, {**(tokenizer_data or {}), f"{PREFIX}_tokenizer_class": tokenizer})


class TinyEncoder(comfy.sd1_clip.SDClipModel):  # type: ignore[misc]
    """A Qwen3 of any size; heads are 128 wide, as ComfyUI has them. layers: whose hidden states are the text."""

    def __init__(self, config: Config, layers: int | list[int], device: Any, dtype: Any, model_options: Config) -> None:
        layer = {"layer": layers} if isinstance(layers, list) else {"layer": "hidden", "layer_idx": layers}
        names = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
        names |= {"num_key_value_heads"}
        super().__init__(
            **{"device": device, "dtype": dtype, "model_options": model_options, **layer},
            **{"textmodel_json_config": {name: config[name] for name in names}, "layer_norm_hidden_state": False},
            **{"special_tokens": {"pad": config["pad_token_id"]}, "enable_attention_masks": True},
            **{"return_attention_masks": True, "model_class": comfy.text_encoders.llama.Qwen3_4B},
        )


def qwen3_target(folder: Path) -> tuple[Any, Weights]:
    """The CLIP to build, and its weights under ComfyUI's names."""
    config = read_config(folder, "text_encoder")
    tokenizer = partial(TinyTokenizer, folder / "tokenizer", config["hidden_size"])
    target = comfy.supported_models_base.ClipTarget(
        partial(TinyTemplate, tokenizer),
        partial(comfy.sd1_clip.SD1ClipModel, name=PREFIX, clip_model=partial(TinyEncoder, config, LAYER)),
    )
    weights = read_weights(folder, "text_encoder")
    return target, {f"{PREFIX}.transformer.model.{name}": tensor for name, tensor in weights.items()}
