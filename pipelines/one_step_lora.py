"""A few-step LoRA's file on a pipeline of diffusers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import OneStepError
from ..core.families import detect
from ..core.lora_file import load_lora
from ..core.presets import PRESETS, recipe_of
from ..core.recipe import Recipe
from .adapt import network_of, target_names
from .quiet import quiet


def load_lora_into(
    pipe: Any, path: Path, recipe: Recipe | str | None, adapter_name: str
) -> tuple[Recipe, float | None]:
    """Load a file into a family's own pipeline; its recipe, and the embedded guidance that it was trained at."""
    network = network_of(pipe)
    names = [name.replace(".base_layer", "") for name in target_names(network)]
    file = load_lora(path, names, detect(network))
    if recipe is None and file.recipe is None:
        raise OneStepError(f"{path.name[:80]} has no recipe in its header: say which, one of {', '.join(PRESETS)}")
    found = recipe_of(recipe if recipe is not None else file.recipe)
    check_family(found, network)
    with quiet():
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=adapter_name)
    for module in network.modules():
        if adapter_name in getattr(module, "lora_A", {}):
            module.set_scale(adapter_name, found.lora_scale)
    return found, _trained_at(file.metadata)


def _trained_at(metadata: Mapping[str, str]) -> float | None:
    """The guidance in the settings of our own file's run; None for others' files."""
    try:
        return float(json.loads(metadata.get("onestep.settings", "{}"))["guidance"])
    except (ValueError, KeyError, TypeError):
        return None


def check_family(recipe: Recipe, network: Any) -> None:
    family = detect(network)
    if recipe.family != family:
        raise OneStepError(f"the recipe is for the family {recipe.family!r}, this model is {family!r}: choose another")
