"""A folder of diffusers' Anima of any size as ComfyUI's network, and its Qwen3 text encoder as ComfyUI's CLIP."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import comfy.ops
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.anima as anima
import comfy.text_encoders.llama
from comfy.ldm.anima.model import LLMAdapter

from ...core.families import FAMILIES
from .folder import Config, Weights, read_config, read_weights, require
from .mmdit import sampling_settings
from .z_image import TinyTokenizer

PREFIX = "qwen3_06b"
# What ComfyUI's classes take as given.
FIXED = {"patch_size": [1, 2, 2], "concat_padding_mask": True, "extra_pos_embed_type": None, "mlp_ratio": 4.0}
BESIDE = {"time_embed.norm": "t_embedding_norm"}
NORMS = {"attn1.norm_q": "self_attn.q_norm", "attn1.norm_k": "self_attn.k_norm"}
NORMS |= {"attn2.norm_q": "cross_attn.q_norm", "attn2.norm_k": "cross_attn.k_norm"}


class TinyAnima(comfy.supported_models.Anima):  # type: ignore[misc]
    """Anima at any width, which ComfyUI's detection fixes, and with a text's adapter of any size. adapter: that of
    diffusers' configuration."""

    adapter: Config

    def get_model(self, state_dict: Weights, prefix: str = "", device: Any = None) -> Any:
        model, told = super().get_model(state_dict, prefix, device), self.adapter
        build = {"dtype": model.get_dtype(), "device": device, "operations": comfy.ops.manual_cast}
        sizes = {name: told[name] for name in ("source_dim", "target_dim", "model_dim", "num_layers")}
        made = LLMAdapter(**sizes, num_heads=told["num_attention_heads"], **build)
        made.embed = comfy.ops.manual_cast.Embedding(
            told["target_vocab_size"], told["target_dim"], dtype=model.get_dtype(), device=device
        )
        model.diffusion_model.llm_adapter = made
        return model


def anima_setup(folder: Path) -> tuple[TinyAnima, Weights]:
    """The model configuration and the weights under ComfyUI's names."""
    config, schedule = read_config(folder, "transformer"), read_config(folder, "scheduler")
    require("the transformer", config, FIXED)
    adapter = read_config(folder, "text_conditioner")
    require("the text's conditioner", adapter, {"use_layer_norm": False, "use_self_attention": True, "mlp_ratio": 4.0})
    setup = TinyAnima(unet_config(config))
    setup.adapter, setup.sampling_settings = adapter, sampling_settings(schedule) | {"multiplier": 1.0}
    weights = renamed(read_weights(folder, "transformer"), config["num_layers"])
    return setup, weights | {
        f"llm_adapter.{name}": value for name, value in read_weights(folder, "text_conditioner").items()
    }


def unet_config(config: Config) -> Config:
    """diffusers' configuration in ComfyUI's words."""
    heads, (t, h, w), most = config["num_attention_heads"], config["rope_scale"], config["max_size"]
    return {
        **{"image_model": "anima", "max_img_h": most[1], "max_img_w": most[2], "max_frames": most[0]},
        **{"in_channels": config["in_channels"], "out_channels": config["out_channels"], "concat_padding_mask": True},
        **{"patch_spatial": 2, "patch_temporal": 1, "num_blocks": config["num_layers"], "num_heads": heads},
        **{"model_channels": heads * config["attention_head_dim"], "crossattn_emb_channels": config["text_embed_dim"]},
        **{"pos_emb_cls": "rope3d", "pos_emb_learnable": True, "pos_emb_interpolation": "crop"},
        **{"min_fps": 1, "max_fps": 30, "use_adaln_lora": True, "adaln_lora_dim": config["adaln_lora_dim"]},
        **{"extra_per_block_abs_pos_emb": False, "rope_enable_fps_modulation": False},
        **{f"rope_{axis}_extrapolation_ratio": scale for axis, scale in zip("thw", (t, h, w), strict=True)},
    }


def renamed(weights: Weights, blocks: int) -> Weights:
    """diffusers' weights by ComfyUI's names; no layer is fused."""
    table = BESIDE | {name: row.host for row in FAMILIES["anima"].rows(blocks) for name in row.names}
    for block in range(blocks):
        table |= {f"transformer_blocks.{block}.{ours}": f"blocks.{block}.{theirs}" for ours, theirs in NORMS.items()}
    return {f"{table[name.removesuffix('.weight')]}.weight": value for name, value in weights.items()}


class TinyTokens(anima.AnimaTokenizer):  # type: ignore[misc]
    """A folder's two tokenizers: the encoder's, and the one whose ids the network's adapter reads."""

    def __init__(
        self, folder: Path, width: int, embedding_directory: Any = None, tokenizer_data: Config | None = None
    ) -> None:
        self.qwen3_06b = TinyTokenizer(folder / "tokenizer", width, embedding_directory)
        self.t5xxl = comfy.sd1_clip.SDTokenizer(
            str(folder / "t5_tokenizer"),
            **{"embedding_directory": embedding_directory, "embedding_size": width, "embedding_key": "t5xxl"},
            **{"tokenizer_class": anima.T5TokenizerFast, "has_start_token": False, "pad_with_end": False},
            **{"pad_to_max_length": False, "max_length": 10**8, "min_length": 1},
        )


class TinyEncoder(comfy.sd1_clip.SDClipModel):  # type: ignore[misc]
    """A Qwen3 of any size, whose last hidden states are the text; heads are 128 wide, as ComfyUI has them."""

    def __init__(self, config: Config, device: Any, dtype: Any, model_options: Config) -> None:
        names = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
        names |= {"num_key_value_heads"}
        super().__init__(
            **{"device": device, "dtype": dtype, "model_options": model_options, "layer": "last"},
            **{"textmodel_json_config": {name: config[name] for name in names}, "layer_norm_hidden_state": False},
            **{"special_tokens": {"pad": config["pad_token_id"]}, "enable_attention_masks": True},
            **{"return_attention_masks": True, "model_class": comfy.text_encoders.llama.Qwen3_06B},
        )


class TinyText(anima.AnimaTEModel):  # type: ignore[misc]
    """The encoder, and the other tokenizer's ids beside its text."""

    def __init__(self, config: Config, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
        comfy.sd1_clip.SD1ClipModel.__init__(
            self,
            **{"device": device, "dtype": dtype, "name": PREFIX, "clip_model": partial(TinyEncoder, config)},
            model_options=model_options or {},
        )


def anima_target(folder: Path) -> tuple[Any, Weights]:
    """The CLIP to build, and its weights under ComfyUI's names."""
    config = read_config(folder, "text_encoder")
    target = comfy.supported_models_base.ClipTarget(
        partial(TinyTokens, folder, config["hidden_size"]), partial(TinyText, config)
    )
    weights = read_weights(folder, "text_encoder")
    return target, {f"{PREFIX}.transformer.model.{name}": value for name, value in weights.items()}
