"""What a file that tells no recipe is taken for, and by what: its name, a title in its header, its folder's name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import OneStepError
from .by_name import LORA, MODEL, normal, presets_by_name
from .definition import Recipe
from .presets import PRESETS

TITLES = ("modelspec.title", "ss_output_name", "title", "name")
"""Entries of a header that trainers and converters write a file's first name into; not those that name its base."""
NAMELESS = re.compile(
    r"(?:pytorch_lora_weights|adapter_model|diffusion_pytorch_model|model|lora|unet|transformer|weights"
    r"|[0-9a-f]{32,64})(?:[.-](?:fp16|bf16|fp32|fp8))?",
    re.IGNORECASE,
)
"""Names that diffusers, peft and caches give to every file: the folder's says more."""
FOLDERS = 4
SECOND_ORDER = re.compile(r"(?<![a-z])chroma(?![a-z]).*(?<![a-z])(flash|heun)(?![a-z])")


@dataclass(frozen=True)
class Recognised:
    """preset: what the file is taken for. evidence: by what."""

    preset: str
    evidence: str

    @property
    def recipe(self) -> Recipe:
        return PRESETS[self.preset]

    def __str__(self) -> str:
        return f"taken for {self.preset}, by {self.evidence}"


def recognised(
    path: Path, metadata: Mapping[str, str], family: str, how: str, *, what: str = LORA
) -> Recognised | None:
    """The one preset of ``family`` that the file's names stand for; None where they stand for none.

    how: what a person is to do to say it himself. what: a LoRA's file or a whole model's. Raises OneStepError where
    the names stand for several.
    """
    found: dict[str, str] = {}
    for evidence, text in names_of(path, metadata):
        for preset in presets_by_name(text, what):
            if preset in PRESETS and PRESETS[preset].family == family:
                found.setdefault(preset, evidence)
    if len(found) > 1:
        listed = ", ".join(list(found)[:6])
        by = " and ".join(dict.fromkeys(found.values()))
        raise OneStepError(f"{path.name[:80]} may be one of {listed}, by {by}: {how}")
    return next((Recognised(preset, evidence) for preset, evidence in found.items()), None)


def of_second_order(path: Path, metadata: Mapping[str, str]) -> str:
    """What is said of a file whose authors draw it by steps of the second order, which no recipe has; "" of others."""
    if not any(SECOND_ORDER.search(normal(text)) for _, text in names_of(path, metadata)):
        return ""
    return (
        f"{path.name[:80]} is of Chroma1-Flash, drawn by heun, two forwards a step, which no recipe has: draw it with "
        "core's KSampler, sampler_name heun, 8 to 16 steps, cfg 1"
    )


def without_recipe(few_step: Path | None, family: str) -> str:
    """What is said of a LoRA that was extracted without a recipe; with the one that its few-step model's names stand
    for."""
    presets = {
        preset: evidence
        for evidence, text in (names_of(few_step, {}) if few_step else ())
        for preset in presets_by_name(text, MODEL)
        if preset in PRESETS and PRESETS[preset].family == family
    }
    if len(presets) != 1:
        return "it does not say how it is sampled: name its recipe where you load it, or extract it with one"
    ((preset, evidence),) = presets.items()
    return (
        f"it does not say how it is sampled: its model is {Recognised(preset, evidence)}, extract it with that recipe"
    )


def names_of(path: Path, metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(what it is, the text) of every name that a file has: its own, in its header, and its folders' where every file
    is called so."""
    if not NAMELESS.fullmatch(path.name if path.is_dir() else path.stem):
        yield "its name", path.name
    else:
        for folder in list(path.parents)[:FOLDERS]:
            if folder.name and not NAMELESS.fullmatch(folder.name):
                yield f"its folder's name {folder.name[:60]!r}", folder.name
    for key in TITLES:
        if text := metadata.get(key, "").strip():
            yield f"{text[:60]!r} in its header", text[:200]
