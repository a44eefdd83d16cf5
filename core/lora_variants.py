"""LoRAs of models whose layers have a served family's names: told by shapes, by a file's header, or by its name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import OneStepError
from .families import FAMILIES, choices
from .families.later import LATER_WORDS
from .lora_keys import KEY, has_ratios

Shapes = Mapping[str, Sequence[int]]

TOLD = ("modelspec.title", "modelspec.architecture", "ss_output_name", "ss_base_model_version", "title", "name")
"""Entries of a header that say what a LoRA is called, or what it was trained on."""


def refuse_variant(path: Path, family: str, shapes: Shapes, metadata: Mapping[str, str]) -> str:
    """Raises OneStepError for a LoRA of a model that is not served, whose layers have ``family``'s names; else what is
    to be said where the file does not tell whose it is, or ""."""
    known, words = FAMILIES[family], LATER_WORDS.get(family)
    if words is None or "onestep.family" in metadata:
        return ""
    entry = [shape[1] for key, shape in shapes.items() if len(shape) > 1 and _is_entry(key, known.entry)]
    if family == "wan" and not has_ratios(((r"attn2[._]to_[kv]", 1.0),), shapes):
        _refuse("HunyuanDiT", "its keys and values are of another width than Wan's")
    said = [path.name, *(metadata[name] for name in TOLD if metadata.get(name))]
    if any(width in words.inputs for width in entry):
        _refuse(words.title, f"its {known.entry} reads {entry[0]} channels")
    if others := [text for text in said if re.search(words.own, text.lower())]:
        _refuse(words.title, f"{others[0][:80]!r}")
    if entry or any(re.search(words.served, text.lower()) for text in said):
        return ""
    return words.doubt


def _is_entry(key: str, entry: str) -> bool:
    """Whether it is of the first factor of the layer by which a picture enters, in any dialect."""
    found = KEY.fullmatch(key)
    return found is not None and bool(found["a"]) and re.search(rf"(^|[._]){entry}$", found["path"]) is not None


def _refuse(whose: str, why: str) -> None:
    raise OneStepError(f"This LoRA is for {whose} ({why}), which is not served: use one for {choices()}.")
