"""A family's own pipeline over its parts, also where it is one of diffusers' modular kind, put together of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import ModularPipeline


def is_modular(cls: type) -> bool:
    return issubclass(cls, ModularPipeline)


def part_names(cls: Any) -> set[str]:
    """What a pipeline of this class is made of."""
    if is_modular(cls):
        return {spec.name for spec in getattr(diffusers, cls.default_blocks_name)().expected_components}
    return set(cls._get_signature_keys(cls)[0])


def loaded_names(cls: Any) -> set[str]:
    """What of a modular pipeline a folder must hold: the others it makes by itself."""
    specs = getattr(diffusers, cls.default_blocks_name)().expected_components
    return {spec.name for spec in specs if spec.default_creation_method == "from_pretrained"}


def made_of(cls: Any, parts: Mapping[str, Any]) -> Any:
    """A pipeline of this class over ``parts``; a modular one makes what is none of a model's by itself."""
    if not is_modular(cls):
        return cls(**parts)
    pipe = cls()
    pipe.update_components(**{name: part for name, part in parts.items() if part is not None})
    return pipe


def name_of(pipe: Any) -> str:
    """Where a pipeline was loaded from; "" where nobody knows."""
    told = getattr(pipe, "_pretrained_model_name_or_path", None) if is_modular(type(pipe)) else None
    return str(told or pipe.config.get("_name_or_path") or "")
