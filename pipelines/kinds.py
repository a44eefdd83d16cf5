"""Which of the families' own pipelines some parts make up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers

from ..core.errors import OneStepError
from ..core.families import FAMILIES, detect
from .modular import is_modular, name_of, part_names

PIPELINES = tuple(name for family in FAMILIES.values() for name in family.pipelines)
SD, SDXL = FAMILIES["unet"].pipelines
(SD3,) = FAMILIES["sd3"].pipelines
(FLUX,) = FAMILIES["flux"].pipelines
(Z_IMAGE,) = FAMILIES["z_image"].pipelines
KLEIN, FLUX2 = FAMILIES["flux2"].pipelines
(QWEN_IMAGE,) = FAMILIES["qwen_image"].pipelines
(ANIMA,) = FAMILIES["anima"].pipelines
(KREA2,) = FAMILIES["krea2"].pipelines
(WAN,) = FAMILIES["wan"].pipelines
(CHROMA,) = FAMILIES["chroma"].pipelines
(LUMINA2,) = FAMILIES["lumina2"].pipelines
(PIXART,) = FAMILIES["pixart"].pipelines

LANGUAGE_MODELS = {
    "Qwen3ForCausalLM": KLEIN,
    "Mistral3ForConditionalGeneration": FLUX2,
    "Qwen2_5_VLForConditionalGeneration": QWEN_IMAGE,
    **dict.fromkeys(("Qwen3VLModel", "Qwen3VLForConditionalGeneration"), KREA2),
    "UMT5EncoderModel": WAN,
    "T5EncoderModel": CHROMA,
    **dict.fromkeys(("Gemma2Model", "Gemma2ForCausalLM"), LUMINA2),
}
"""Whose text encoders they are; Z-Image's is no head of its own."""


def pipeline_for(network: Any) -> str:
    """The class of the own pipeline of a network's family: of two that whose texts it reads."""
    known = FAMILIES[detect(network)]
    return known.pipelines[1 if known.second(network.config) else 0]


def pipeline_of(parts: Mapping[str, Any]) -> str:
    """The class of the family's own pipeline for loaded ``parts``: by the network, or else by the text encoders."""
    for network in (parts.get("unet"), parts.get("transformer")):
        if network is not None:
            return pipeline_for(network)
    names = [type(parts.get(part)).__name__ for part in ("text_encoder", "text_encoder_2", "text_encoder_3")]
    if names[0].startswith(("Qwen", "Mistral3", "T5", "UMT5", "Gemma2")):
        return LANGUAGE_MODELS.get(names[0], Z_IMAGE if parts.get("text_conditioner") is None else ANIMA)
    if "T5" in names[1]:
        return FLUX
    # SD3 reads the projected text of both of its CLIPs, SDXL that of the second
    if names[0] == "CLIPTextModelWithProjection" or names[2] != "NoneType":
        return SD3
    if names[1] != "NoneType":
        return SDXL
    if names[0] != "NoneType":
        return SD
    raise OneStepError("this pipeline has neither a network nor a text encoder: give it the parts of a whole model")


def own_parts(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``parts`` that the family's own pipeline has; OneStepError for others that are there."""
    kind = pipeline_of(parts)
    wanted = part_names(getattr(diffusers, kind))
    strange = [name for name, part in parts.items() if part is not None and name not in wanted]
    if strange:
        raise OneStepError(
            f"the parts are a {kind}'s, which has no {strange[0]}: leave it out, or give the right model"
        )
    if parts.get("safety_checker") is not None and parts.get("feature_extractor") is None:
        raise OneStepError("a safety_checker looks through a feature_extractor: give both, or safety_checker=None")
    return {name: part for name, part in parts.items() if name in wanted}


def passed_on(cls: Any, pipeline: Any) -> dict[str, Any]:
    """What a pipeline of class ``cls`` is made of from the parts and settings of ``pipeline``."""
    wanted, settings = part_names(cls), () if is_modular(cls) else cls._get_signature_keys(cls)[1]
    parts = {name: part for name, part in pipeline.components.items() if name in wanted}
    found = {name.removeprefix("_"): value for name, value in pipeline.config.items()}
    return parts | {name: found[name] for name in settings if found.get(name) is not None}


def kept_settings(pipeline: Any, source: Any) -> dict[str, Any]:
    """Settings of ``source`` that ``pipeline`` does not have, as diffusers keeps them for a pipeline made of this."""
    if is_modular(type(source)):
        return {"_name_or_path": name_of(source)}
    skipped = {*type(pipeline)._get_signature_keys(type(pipeline))[1], "class_name", "diffusers_version"}
    found = {name.removeprefix("_"): value for name, value in source.config.items() if name not in source.components}
    return {f"_{name}": value for name, value in found.items() if name not in skipped}
