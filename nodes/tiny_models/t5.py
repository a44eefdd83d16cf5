"""A folder's T5 of any size, the one text encoder of its model, as ComfyUI's CLIP of type chroma or pixart."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import comfy.sd1_clip
import comfy.supported_models_base
import comfy.text_encoders.t5
from comfy.text_encoders import pixart_t5

from .folder import Config, Weights, read_config, read_weights

PREFIX = "t5xxl"
ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh", "relu": "relu"}
"""transformers' words in ComfyUI's."""


class TinyTokenizer(comfy.sd1_clip.SDTokenizer):  # type: ignore[misc]
    """A folder's own tokenizer, without padding."""

    def __init__(
        self, folder: Path, width: int, embedding_directory: Any = None, tokenizer_data: Config | None = None
    ) -> None:
        super().__init__(
            str(folder),
            **{"embedding_directory": embedding_directory, "embedding_size": width, "embedding_key": PREFIX},
            **{"tokenizer_class": pixart_t5.T5TokenizerFast, "has_start_token": False, "pad_with_end": False},
            **{"pad_to_max_length": False, "max_length": 10**8, "min_length": 1},
        )


class TinyT5(comfy.sd1_clip.SDClipModel):  # type: ignore[misc]
    """Its encoder, which attends to every token that it is given."""

    def __init__(self, config: Config, device: Any, dtype: Any, model_options: Config) -> None:
        names = ("d_model", "d_kv", "d_ff", "num_heads", "num_layers", "is_gated_act", "vocab_size", "model_type")
        told = {name: config[name] for name in names}
        told["dense_act_fn"] = ACTIVATIONS[config["dense_act_fn"]]
        super().__init__(
            **{"device": device, "dtype": dtype, "model_options": model_options, "layer": "last"},
            **{"textmodel_json_config": told, "special_tokens": {"end": 1, "pad": 0}},
            model_class=comfy.text_encoders.t5.T5,
        )


def t5_target(folder: Path) -> tuple[Any, Weights]:
    """The CLIP to build, and its weights under ComfyUI's names."""
    config = read_config(folder, "text_encoder")
    tokenizer = partial(TinyTokenizer, folder / "tokenizer", config["d_model"])
    target = comfy.supported_models_base.ClipTarget(
        partial(comfy.sd1_clip.SD1Tokenizer, clip_name=PREFIX, tokenizer=tokenizer),
        partial(comfy.sd1_clip.SD1ClipModel, name=PREFIX, clip_model=partial(TinyT5, config)),
    )
    weights = read_weights(folder, "text_encoder")
    # its copy of the embeddings, which versions of transformers save
    return target, {
        f"{PREFIX}.transformer.{name}": value for name, value in weights.items() if "embed_tokens" not in name
    }
