"""How the public few-step models are sampled, by name."""

from __future__ import annotations

import difflib

from ..errors import OneStepError
from .definition import Recipe
from .presets_flow import FLOW
from .presets_unet import UNET

PRESETS: dict[str, Recipe] = {**UNET, **FLOW}
LONGEST_LIST = 200


def recipe_of(recipe: Recipe | str | None) -> Recipe:
    """A Recipe, a preset's name or a recipe's JSON as a Recipe."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe is None or (recipe not in PRESETS and not recipe.lstrip().startswith("{")):
        close = difflib.get_close_matches(str(recipe)[:80], PRESETS, 1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise OneStepError(
            f"no recipe {recipe!r:.80}{meant}: load a One-Step LoRA, or name a preset, one of {preset_names()}"
        )
    return PRESETS[recipe] if recipe in PRESETS else Recipe.from_json(recipe)


def preset_names(family: str | None = None) -> str:
    """The presets of ``family``, or all, as a list for a person, cut where it grows long."""
    names = ", ".join(name for name, recipe in PRESETS.items() if family in (None, recipe.family))
    if len(names) <= LONGEST_LIST:
        return names
    return f"{names[:LONGEST_LIST].rsplit(', ', 1)[0]} and more (docs/public-few-step-models.md)"
