"""How the public few-step models are sampled, by name."""

from __future__ import annotations

from typing import Any

from .errors import OneStepError
from .recipe import Recipe


def _preset(*times: float, source: str, **more: Any) -> Recipe:
    return Recipe(tuple(map(float, times)), source=source, **more)


# How the public few-step models are sampled, each after its own model card or its authors' code.
PRESETS: dict[str, Recipe] = {
    "sd-turbo-1": _preset(999, source="stabilityai/sd-turbo, model card: 1 step, trailing, guidance 0"),
    "sdxl-turbo-1": _preset(999, source="stabilityai/sdxl-turbo, model card: 1 step, trailing, guidance 0"),
    "lcm-4": _preset(999, 759, 499, 259, renoise=True, source="arXiv:2310.04378; LCMScheduler, 4 of 50 steps"),
    "tcd-4": _preset(999, 759, 499, 259, eta=0.3, source="arXiv:2402.19159; TCDScheduler, 4 of 50 steps, eta 0.3"),
    "sdxl-lightning-1": _preset(
        999, prediction="sample", source="ByteDance/SDXL-Lightning, model card: 1 step predicts x0"
    ),
    "sdxl-lightning-2": _preset(999, 499, source="ByteDance/SDXL-Lightning, model card: Euler, trailing"),
    "sdxl-lightning-4": _preset(999, 749, 499, 249, source="ByteDance/SDXL-Lightning, model card: Euler, trailing"),
    "hyper-sd-1": _preset(800, source="ByteDance/Hyper-SD, model card: 1-step UNet starts at time 800"),
    "dmd2-1": _preset(399, source="tianweiy/DMD2, README: 1 step, conditioning time 399, unit noise"),
    "dmd2-4": _preset(
        999, 749, 499, 249, renoise=True, source="tianweiy/DMD2, README: LCMScheduler, times 999 749 499 249"
    ),
    "flux-schnell-4": _preset(
        1000,
        750,
        500,
        250,
        family="flux",
        shift=1.0,
        source="black-forest-labs/FLUX.1-schnell, model card: 4 steps, shift 1",
    ),
    "sd3.5-turbo-4": _preset(
        1000,
        900,
        750,
        500,
        family="sd3",
        shift=3.0,
        source="stabilityai/stable-diffusion-3.5-large-turbo, model card: 4 steps, shift 3",
    ),
}


def recipe_of(recipe: Recipe | str | None) -> Recipe:
    """A Recipe, a preset's name or a recipe's JSON as a Recipe."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe is None or (recipe not in PRESETS and not recipe.lstrip().startswith("{")):
        raise OneStepError(f"no recipe {recipe!r:.80}: load a One-Step LoRA, or name a preset: {', '.join(PRESETS)}")
    return PRESETS[recipe] if recipe in PRESETS else Recipe.from_json(recipe)
