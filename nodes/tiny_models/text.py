"""Small CLIP-style text encoders as ComfyUI's CLIP: one for a U-Net, two with projections for SD3's layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import torch
from torch.nn.functional import pad

from ...core.errors import OneStepError
from ...core.families import of_class
from .anima import anima_target
from .flux2 import klein_target
from .folder import Config, Weights, has_part, read_config, read_weights
from .krea2 import qwen3vl_target
from .lumina2 import gemma2_target
from .qwen import qwen25_target
from .t5 import t5_target
from .wan import umt5_target
from .z_image import qwen3_target

FLOAT32 = {"dtype": torch.float32}  # half precision would be the default on a GPU


class TinyTokenizer(comfy.sd1_clip.SDTokenizer):  # type: ignore[misc]
    """A folder's own tokenizer, padded to the encoder's length with its own padding token."""

    def __init__(
        self, folder: Path, config: Config, embedding_directory: Any = None, tokenizer_data: Config | None = None
    ) -> None:
        super().__init__(
            str(folder),
            max_length=config["max_position_embeddings"],
            embedding_directory=embedding_directory,
            embedding_size=config["hidden_size"],
            embedding_key="clip_l",
        )
        self.pad_token = self.tokenizer.pad_token_id


class TinyEncoder(comfy.sd1_clip.SDClipModel):  # type: ignore[misc]
    """A CLIP text model of any size: vocabulary and projection, which ComfyUI's class fixes, are set here."""

    def __init__(
        self, config: Config, projected: bool, hidden: bool, device: Any, dtype: Any, model_options: Config
    ) -> None:
        tokens = {"start": config["bos_token_id"], "end": config["eos_token_id"], "pad": config["pad_token_id"]}
        super().__init__(
            **{"device": device, "dtype": dtype, "model_options": model_options, "textmodel_json_config": dict(config)},
            **{"max_length": config["max_position_embeddings"], "special_tokens": tokens},
            # Counted from the front: counted from the end, ComfyUI refuses the last but one layer of two.
            **({"layer": "hidden", "layer_idx": config["num_hidden_layers"] - 2} if hidden else {"layer": "last"}),
            **{"layer_norm_hidden_state": not hidden, "return_projected_pooled": projected},
        )
        build = {"dtype": dtype, "device": device}
        vocabulary, width = config["vocab_size"], config["hidden_size"]
        self.transformer.set_input_embeddings(self.operations.Embedding(vocabulary, width, **build))
        projection = self.operations.Linear(width, config.get("projection_dim", width), bias=False, **build)
        self.transformer.text_projection = projection if projected else torch.nn.Identity()
        self.freeze()


class TinyPairTokenizer:
    """Both tokenizers of SD3's layout."""

    def __init__(
        self, clip_l: Any, clip_g: Any, embedding_directory: Any = None, tokenizer_data: Config | None = None
    ) -> None:
        self.clip_l, self.clip_g = (
            clip_l(embedding_directory=embedding_directory),
            clip_g(embedding_directory=embedding_directory),
        )

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options: Any) -> Config:
        return {
            "l": self.clip_l.tokenize_with_weights(text, return_word_ids, **options),
            "g": self.clip_g.tokenize_with_weights(text, return_word_ids, **options),
        }

    def untokenize(self, token_weight_pair: Any) -> Any:
        return self.clip_l.untokenize(token_weight_pair)

    def state_dict(self) -> Weights:
        return {}


class TinyPair(torch.nn.Module):
    """What StableDiffusion3Pipeline.encode_prompt(max_sequence_length=0) makes of a prompt without T5.

    The last but one hidden states of both encoders side by side, padded with zeros to the transformer's text width;
    pooled: both projections side by side. No zero tokens stand where T5's would be: core's SD3 has none either.
    """

    def __init__(
        self,
        clip_l: Any,
        clip_g: Any,
        width: int,
        device: Any = "cpu",
        dtype: Any = None,
        model_options: Config | None = None,
    ) -> None:
        super().__init__()
        build = {"device": device, "dtype": dtype, "model_options": model_options or {}}
        self.clip_l, self.clip_g = clip_l(**build), clip_g(**build)
        self.width = width
        self.dtypes = {dtype}

    def set_clip_options(self, options: Config) -> None:
        self.clip_l.set_clip_options(options)
        self.clip_g.set_clip_options(options)

    def reset_clip_options(self) -> None:
        self.clip_l.reset_clip_options()
        self.clip_g.reset_clip_options()

    def encode_token_weights(self, tokens: Config) -> tuple[torch.Tensor, torch.Tensor]:
        text_l, pooled_l = self.clip_l.encode_token_weights(tokens["l"])
        text_g, pooled_g = self.clip_g.encode_token_weights(tokens["g"])
        length = min(text_l.shape[1], text_g.shape[1])
        text = torch.cat([text_l[:, :length], text_g[:, :length]], -1)
        return pad(text, (0, self.width - text.shape[-1])), torch.cat([pooled_l, pooled_g], -1)

    def load_sd(self, weights: Weights) -> Any:
        return self.load_state_dict(weights, strict=False)


def load_clip(folder: Path) -> comfy.sd.CLIP:
    """The folder's text encoder(s) as one CLIP object."""
    kind = read_config(folder, "text_encoder").get("model_type")
    alone = {"qwen2_5_vl": qwen25_target, "qwen3_vl": qwen3vl_target, "umt5": umt5_target, "t5": t5_target}
    alone["gemma2"] = gemma2_target
    if kind in alone:
        return assembled(*alone[kind](folder))
    if kind == "qwen3":
        family = of_class(read_config(folder, "transformer").get("_class_name", ""))
        return assembled(*{"flux2": klein_target, "anima": anima_target}.get(str(family), qwen3_target)(folder))
    return load_pair(folder) if has_part(folder, "text_encoder_2") else load_single(folder)


def load_single(folder: Path) -> comfy.sd.CLIP:
    config = read_config(folder, "text_encoder")
    tokenizer = partial(TinyTokenizer, folder / "tokenizer", config)
    encoder = partial(TinyEncoder, config, False, False)
    target = comfy.supported_models_base.ClipTarget(
        partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=tokenizer),
        partial(comfy.sd1_clip.SD1ClipModel, clip_name="l", clip_model=encoder),
    )
    return assembled(target, encoder_weights(folder, "text_encoder", "clip_l."))


def load_pair(folder: Path) -> comfy.sd.CLIP:
    configs = [read_config(folder, part) for part in ("text_encoder", "text_encoder_2")]
    transformer = read_config(folder, "transformer")
    tokenizers = [
        partial(TinyTokenizer, folder / part, config)
        for part, config in zip(("tokenizer", "tokenizer_2"), configs, strict=True)
    ]
    encoders = [partial(TinyEncoder, config, True, True) for config in configs]
    target = comfy.supported_models_base.ClipTarget(
        partial(TinyPairTokenizer, tokenizers[0], tokenizers[1]),
        partial(TinyPair, encoders[0], encoders[1], transformer["joint_attention_dim"]),
    )
    weights = encoder_weights(folder, "text_encoder", "clip_l.") | encoder_weights(folder, "text_encoder_2", "clip_g.")
    return assembled(target, weights)


def encoder_weights(folder: Path, part: str, prefix: str) -> Weights:
    """Names as ComfyUI has them, whichever version of transformers saved them (version 5 leaves `text_model.` out)."""
    weights = {name: tensor for name, tensor in read_weights(folder, part).items() if "position_ids" not in name}
    outer = ("text_model.", "text_projection.")
    full = {name if name.startswith(outer) else f"text_model.{name}": tensor for name, tensor in weights.items()}
    return {f"{prefix}transformer.{name}": tensor for name, tensor in full.items()}


def assembled(target: Any, weights: Weights) -> comfy.sd.CLIP:
    count = sum(tensor.numel() for tensor in weights.values())
    clip = comfy.sd.CLIP(target, parameters=count, state_dict=weights, model_options=dict(FLOAT32))
    wanted = {name for name in clip.cond_stage_model.state_dict() if not name.endswith("logit_scale")}
    if wanted != set(weights):
        odd = sorted(wanted ^ set(weights))
        raise OneStepError(
            f"the text encoder and its weights differ in {len(odd)} names, {odd[0]} the first: install the pack again"
        )
    return clip
