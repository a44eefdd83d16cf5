"""A single .safetensors checkpoint of SD1.5, SD2 or SDXL as a diffusers pipeline, offline.

Configurations and CLIP's tokenizer lie in configs/. Each module is asked for its tensors, one by one and by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from ..core.errors import OneStepError
from ..core.families import choices, named
from ..core.families.later import LATER_MARKS
from ..core.tensor_file import Header, read_header
from .clip_tokenizer import clip_tokenizer
from .quiet import quiet
from .single_marks import SPREAD_IN_V as SPREAD_IN_V
from .single_marks import UNET, prediction_in, refuse_marks
from .single_names import clip_sources, unet_sources, vae_sources
from .single_parts import Part, filled, places_of
from .single_scaled import scales_of

CONFIGS = Path(__file__).resolve().parent / "configs"
FIRST = UNET + "input_blocks.0.0.weight"
FOLDERS = "give the diffusers folder that holds model_index.json instead"
REFINER = 384  # channels of SDXL's refiner, where all others begin with 320


@dataclass(frozen=True)
class Kind:
    """One kind of checkpoint: its folder under configs/, where each of its text encoders may lie, and the tokenizers'
    padding."""

    config: str
    encoders: tuple[tuple[str, ...], ...]
    pads: tuple[str, ...]


SDXL_CLIP = ("conditioner.embedders.0.transformer.",)
SD2_AS_SGM = "conditioner.embedders.0.model."
ENCODERS = (("text encoder", "text_encoder"), ("second text encoder", "text_encoder_2"))
VAES = ("first_stage_model.", "vae.")
KINDS = (
    Kind("sdxl", (SDXL_CLIP, ("conditioner.embedders.1.model.",)), ("<|endoftext|>", "!")),
    Kind("sd2", (("cond_stage_model.model.", SD2_AS_SGM),), ("!",)),
    Kind("sd15", (("cond_stage_model.transformer.",),), ("<|endoftext|>",)),
)


def parts_of(kind: Kind) -> list[Part]:
    # SD2 reads the last but one of open_clip's layers
    layers = r"(transformer\.resblocks|(text_model\.)?encoder\.layers)\." + ("(?!23)" if kind.config == "sd2" else "")
    blocks = r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\."
    coders = r"(encoder|decoder|quant_conv|post_quant_conv)\."
    return [
        Part("U-Net", "unet", (UNET,), unet_sources, blocks),
        # the VAE's encoder is for pictures that are given; none is needed to draw
        Part("VAE", "vae", VAES, vae_sources, coders, spared=r"(encoder|quant_conv)\."),
        *(
            Part(*names, prefixes, clip_sources, layers)
            for names, prefixes in zip(ENCODERS, kind.encoders, strict=False)
        ),
    ]


def load_single_file(path: Path, dtype: torch.dtype, configs: Path = CONFIGS, *, stored: bool = False) -> Any:
    """The pipeline of a checkpoint file. stored: whether the network's blocks keep weights of fp8 as they are. Raises
    OneStepError, with what it is instead, for every other file."""
    header = read_header(path)
    # before how it is stored, which is of no use to know where it is another model's
    kind = kind_of(path, header)
    scales = scales_of(path, header)
    header = scales.without(header)
    folder = configs / kind.config
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    prediction = prediction_in(path, header, kind.config == "sd2")
    # everything is looked for before anything is read
    places = [(part, places_of(path, header, part, folder)) for part in parts_of(kind)]
    with quiet():
        modules = {part.name: filled(path, part, found, folder, dtype, scales, stored) for part, found in places}
    cls = getattr(diffusers, index["_class_name"])
    tokenizers = {f"tokenizer{number}": clip_tokenizer(pad) for number, pad in zip(("", "_2"), kind.pads, strict=False)}
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(folder, subfolder="scheduler")
    with quiet():
        pipe = cls(**modules, **tokenizers, scheduler=scheduler, **_spared(cls))
    if prediction.v:
        changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": prediction.zero_terminal}
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
        if kind.config == "sd2":
            pipe.unet.register_to_config(sample_size=96)  # those that predict v were trained at 768 pixels
    return pipe


# -- what a file is ---------------------------------------------------------------------------------------------------


def kind_of(path: Path, header: Header) -> Kind:
    """Which kind of checkpoint a file holds, by its keys."""
    keys, name = header.tensors, path.name[:80]
    if FIRST not in keys:
        raise OneStepError(f"{name} {_what_else(keys, name)}")
    shape = keys[FIRST].shape
    if len(shape) != 4 or shape[1] != 4:
        channels = shape[1] if len(shape) == 4 else list(shape)
        raise OneStepError(f"{name} has {channels} input channels (inpainting or the like): use a text-to-image base")
    refuse_marks(path, header)
    refiner = _has(keys, (SD2_AS_SGM,)) and shape[0] == REFINER
    for kind in KINDS:
        if all(_has(keys, prefixes) for prefixes in kind.encoders) and not refiner:
            return kind
    if refiner:
        raise OneStepError(f"{name} is SDXL's refiner, which draws nothing by itself: use the SDXL base")
    raise OneStepError(f"{name} holds a U-Net without its text encoder: use a whole checkpoint, or {FOLDERS}")


def predicts_v(path: Path, header: Header, kind: Kind) -> bool:
    """Whether the file's model predicts v, else noise."""
    return prediction_in(path, header, kind.config == "sd2").v


def _what_else(keys: Collection[str], name: str) -> str:
    """What a file is that is no checkpoint of a U-Net, and what to do."""
    text, parts = "\n".join(keys), {part for key in keys for part in key.split(".")}
    flux2, editing = "double_stream_modulation_img" in parts, named("flux2", name)
    later = next((title for mark, title in LATER_MARKS.items() if parts.issuperset(mark.split("."))), "")
    signs: list[tuple[Callable[[str], bool], str]] = [
        (lambda t: "lora_" in t, "is a LoRA, not a checkpoint: give it as the LoRA, with its base as the model"),
        (lambda t: bool(later), f"is a checkpoint of {later}, which is not served: use {choices()}"),
        (
            lambda t: "noise_refiner." in t and "x_pad_token" in parts,
            f"is a Z-Image checkpoint, whose text encoder and tokenizer lie elsewhere: {FOLDERS}, or use ComfyUI",
        ),
        (
            lambda t: "noise_refiner." in t and "cap_embedder" in parts,
            f"is a Lumina 2 checkpoint, whose text encoder and tokenizer lie elsewhere: {FOLDERS}, or use ComfyUI",
        ),
        (
            lambda t: {"t_block", "y_embedder"} <= parts,
            f"is a PixArt-Sigma checkpoint, whose text encoder and tokenizer lie elsewhere: {FOLDERS}, or use ComfyUI",
        ),
        (
            lambda t: "transformer_blocks." in t and "txt_norm" in parts,
            f"is a Qwen-Image checkpoint, whose text encoder and tokenizer lie elsewhere: {FOLDERS}, or use ComfyUI",
        ),
        (lambda t: flux2 and bool(editing), f"is {editing}, which is not served: use {choices()}"),
        (
            lambda t: flux2,
            f"is a FLUX.2 checkpoint, whose text encoder and tokenizer lie elsewhere: {FOLDERS}, or use ComfyUI",
        ),
        (
            lambda t: "distilled_guidance_layer." in t,
            f"is a Chroma checkpoint, whose text encoder and tokenizer lie elsewhere: {FOLDERS}, or use ComfyUI",
        ),
        (
            lambda t: "txtfusion." in t,
            f"is a Krea 2 checkpoint, whose text encoder and tokenizer lie elsewhere: {FOLDERS}, or use ComfyUI",
        ),
        (
            lambda t: "llm_adapter." in t and "adaln_modulation_mlp" in parts,
            f"is an Anima checkpoint, whose text encoder and tokenizers lie elsewhere: {FOLDERS}, or use ComfyUI",
        ),
        (
            lambda t: "adaln_modulation_mlp" in parts,
            f"is a checkpoint of Cosmos-Predict2, which is not served: use {choices()}",
        ),
        (
            lambda t: "time_projection." in t and "head.modulation" in t,
            f"is a Wan checkpoint, whose text encoder and tokenizer lie elsewhere: {FOLDERS}, or use ComfyUI",
        ),
        (
            lambda t: "joint_blocks." in t or "double_blocks." in t,
            f"is an SD3 or Flux checkpoint, whose T5 tokenizer does not travel with us: {FOLDERS}",
        ),
        (lambda t: "down_blocks." in t or "transformer_blocks." in t, f"is one part of a pipeline: {FOLDERS}"),
    ]
    known = (told for test, told in signs if test(text))
    return next(known, "is no checkpoint of SD1.5, SD2 or SDXL: give one of these, or a diffusers folder")


def _has(keys: Iterable[str], prefixes: tuple[str, ...]) -> bool:
    return any(key.startswith(prefixes) for key in keys)


def _spared(cls: Any) -> dict[str, Any]:
    """The parts that are never used here."""
    if "XL" in cls.__name__:
        return {"add_watermarker": False}
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
