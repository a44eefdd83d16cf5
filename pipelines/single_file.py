"""A single .safetensors checkpoint of SD1.5, SD2 or SDXL as a diffusers pipeline, offline.

diffusers' own from_single_file converts the weights; configurations and CLIP's tokenizer lie in configs/.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from ..core.errors import OneStepError
from ..core.tensor_file import Header, read_header, read_tensors
from .clip_tokenizer import clip_tokenizer
from .quiet import attempt

CONFIGS = Path(__file__).resolve().parent / "configs"
UNET, VAE = "model.diffusion_model.", "first_stage_model."
FIRST = UNET + "input_blocks.0.0.weight"
FOLDERS = "give the diffusers folder that holds model_index.json instead"
# By ComfyUI's own rule (supported_models.SD20.model_type): this bias is spread in models that predict v.
SPREAD_IN_V = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"


@dataclass(frozen=True)
class Kind:
    """One kind of checkpoint: its folder under configs/, its text encoders' prefixes and the tokenizers' padding.

    ignored: parts of keys under these prefixes that no encoder takes.
    """

    config: str
    encoders: tuple[str, ...]
    pads: tuple[str, ...]
    ignored: tuple[str, ...] = ("position_ids", "logit_scale")


OPEN_CLIP = "cond_stage_model.model."
KINDS = (
    Kind("sdxl", ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."), ("<|endoftext|>", "!")),
    # SD2 reads the last but one layer
    Kind("sd2", (OPEN_CLIP,), ("!",), ("logit_scale", "text_projection", "attn_mask", "resblocks.23.")),
    Kind("sd15", ("cond_stage_model.transformer.",), ("<|endoftext|>",)),
)


def load_single_file(path: Path, dtype: torch.dtype, configs: Path = CONFIGS) -> Any:
    """The pipeline of a checkpoint file. Raises OneStepError, with what it is instead, for every other file."""
    header = read_header(path)
    kind = kind_of(path, header)
    folder = configs / kind.config
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    cls = getattr(diffusers, index["_class_name"])
    tokenizers = {f"tokenizer{number}": clip_tokenizer(pad) for number, pad in zip(("", "_2"), kind.pads, strict=False)}
    pipe = attempt(
        path,
        lambda: cls.from_single_file(
            str(path), config=str(folder), local_files_only=True, torch_dtype=dtype, **tokenizers, **_spared(cls)
        ),
    )
    _refuse_incomplete(path, header, kind, pipe)
    _set_prediction(pipe, path, header, kind)
    return pipe


def kind_of(path: Path, header: Header) -> Kind:
    """Which kind of checkpoint a file holds, by its keys."""
    keys, name = header.tensors, path.name[:80]
    if FIRST not in keys:
        raise OneStepError(f"{name} {_what_else(keys)}")
    channels = keys[FIRST].shape[1]
    if channels != 4:
        raise OneStepError(f"{name} has {channels} input channels (inpainting or the like): use a text-to-image base")
    if "edm_mean" in keys:
        raise OneStepError(f"{name} was trained with EDM's noise levels (Playground), which are not supported yet")
    for kind in KINDS:
        if all(_has(keys, prefix) for prefix in kind.encoders):
            return kind
    if _has(keys, "conditioner.embedders.0.model."):
        raise OneStepError(f"{name} is SDXL's refiner, which draws nothing by itself: use the SDXL base")
    raise OneStepError(f"{name} holds a U-Net without its text encoder: use a whole checkpoint, or {FOLDERS}")


def _what_else(keys: Iterable[str]) -> str:
    """What a file is that is no checkpoint of a U-Net, and what to do."""
    text = "\n".join(keys)
    signs: list[tuple[Callable[[str], bool], str]] = [
        (lambda t: "lora_" in t, "is a LoRA, not a checkpoint: give it as the LoRA, with its base as the model"),
        (
            lambda t: "joint_blocks." in t or "double_blocks." in t,
            f"is an SD3 or Flux checkpoint, whose T5 tokenizer does not travel with us: {FOLDERS}",
        ),
        (lambda t: "down_blocks." in t or "transformer_blocks." in t, f"is one part of a pipeline: {FOLDERS}"),
    ]
    known = (told for test, told in signs if test(text))
    return next(known, "is no checkpoint of SD1.5, SD2 or SDXL: give one of these, or a diffusers folder")


def _refuse_incomplete(path: Path, header: Header, kind: Kind, pipe: Any) -> None:
    """Every part must have taken as many numbers as the file holds for it: diffusers would leave the rest as it was."""
    encoders = [pipe.text_encoder, getattr(pipe, "text_encoder_2", None)]
    parts = [("U-Net", (UNET,), pipe.unet), ("VAE", (VAE,), pipe.vae)]
    parts += [("text encoder", (prefix,), part) for prefix, part in zip(kind.encoders, encoders, strict=False)]
    for title, prefixes, module in parts:
        held = sum(
            torch.Size(entry.shape).numel()
            for key, entry in header.tensors.items()
            if key.startswith(prefixes) and not any(word in key for word in kind.ignored)
        )
        needed = sum(weight.numel() for weight in module.parameters())
        if held != needed:
            raise OneStepError(
                f"{path.name[:80]} holds {held} numbers for the {title}, {kind.config} needs {needed}: "
                "it is incomplete or of another architecture"
            )


def _set_prediction(pipe: Any, path: Path, header: Header, kind: Kind) -> None:
    """Give the pipeline the scheduler of what its U-Net predicts, where the file tells it."""
    if not predicts_v(path, header, kind):
        return
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in header.tensors}
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    if kind.config == "sd2":
        pipe.unet.register_to_config(sample_size=96)  # those that predict v were trained at 768 pixels


def predicts_v(path: Path, header: Header, kind: Kind) -> bool:
    """By the header's word, by the mark that SDXL's v models carry, or, for SD2, by ComfyUI's rule."""
    told = header.metadata.get("modelspec.prediction_type")
    if told is not None:
        return told.startswith("v")
    if kind.config == "sd2" and SPREAD_IN_V in header.tensors:
        return float(read_tensors(path, [SPREAD_IN_V])[SPREAD_IN_V].float().std(unbiased=False)) > 0.09
    return "v_pred" in header.tensors


def _has(keys: Iterable[str], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in keys)


def _spared(cls: Any) -> dict[str, Any]:
    return {"add_watermarker": False} if "XL" in cls.__name__ else {"safety_checker": None}
