"""How the public few-step models are sampled, by name."""

from __future__ import annotations

from typing import Any

from ..errors import OneStepError
from .definition import Recipe

DDIM_TRAILING = "ByteDance/Hyper-SD, model card: {} LoRA of SD1.5 or SDXL, DDIM, trailing, guidance 0"
LIGHTNING = "ByteDance/SDXL-Lightning, model card: {} U-Net or LoRA, Euler, trailing, guidance 0"
TURBO = "Stability-AI/generative-models, scripts/demo/turbo.py: {}, 1 step from the noisiest of 1000 times, no guidance"


def _preset(*times: float, source: str, **more: Any) -> Recipe:
    return Recipe(tuple(map(float, times)), source=source, **more)


# Each after its authors' own code or model card, which `source` names with the files that it is for. Where a card says
# guidance 0, diffusers computes the prompt's rows alone: guidance 1 here.
PRESETS: dict[str, Recipe] = {
    "sd-turbo-1": _preset(999, source=TURBO.format("SD-Turbo")),
    "sdxl-turbo-1": _preset(999, source=TURBO.format("SDXL-Turbo")),
    "lcm-4": _preset(
        *(999, 759, 499, 259),
        renoise=True,
        source="latent-consistency/lcm-lora-sdv1-5 and -sdxl (arXiv:2311.05556): LCM-LoRA, diffusers' LCMScheduler, "
        "4 of its 50 times, guidance 0",
    ),
    "tcd-4": _preset(
        *(999, 759, 499, 259),
        eta=0.3,
        source="jabir-zheng/TCD, README (arXiv:2402.19159): TCD-LoRA, TCDScheduler, 4 of its 50 times, eta 0.3, "
        "guidance 0",
    ),
    "sdxl-lightning-1": _preset(
        999,
        prediction="sample",
        source="ByteDance/SDXL-Lightning, model card: 1-step U-Net, which predicts x0, trailing, guidance 0",
    ),
    "sdxl-lightning-2": _preset(999, 499, source=LIGHTNING.format("2-step")),
    "sdxl-lightning-4": _preset(999, 749, 499, 249, source=LIGHTNING.format("4-step")),
    "sdxl-lightning-8": _preset(999, 874, 749, 624, 499, 374, 249, 124, source=LIGHTNING.format("8-step")),
    "hyper-sd-1-lora": _preset(
        999,
        eta=1.0,
        source="ByteDance/Hyper-SD, model card: 1-step LoRA of SD1.5 or SDXL, TCDScheduler, 1 step, eta 1, guidance 0",
    ),
    "hyper-sd-2-lora": _preset(999, 499, source=DDIM_TRAILING.format("2-step")),
    "hyper-sd-4-lora": _preset(999, 749, 499, 249, source=DDIM_TRAILING.format("4-step")),
    "hyper-sd-8-lora": _preset(999, 874, 749, 624, 499, 374, 249, 124, source=DDIM_TRAILING.format("8-step")),
    "hyper-sdxl-1-unet": _preset(
        800,
        source="ByteDance/Hyper-SD, model card: Hyper-SDXL-1step-Unet, LCMScheduler, timesteps [800], guidance 0",
    ),
    "dmd2-1": _preset(
        399, source="tianweiy/DMD2, README: 1-step U-Net of SDXL, LCMScheduler, timesteps [399], guidance 0"
    ),
    "dmd2-4": _preset(
        *(999, 749, 499, 249),
        renoise=True,
        source="tianweiy/DMD2, demo/text_to_image_sdxl.py and model card: 4-step U-Net or LoRA of SDXL, fresh noise, "
        "guidance 0",
    ),
    "flux-schnell-4": _preset(
        *(1000, 750, 500, 250),
        family="flux",
        shift=1.0,
        source="black-forest-labs/flux, cli.py and sampling.py: flux-schnell, 4 steps, times not shifted",
    ),
    # evenly from 1000 to the lowest of 1000 shifted times, and shifted once more; digits of float32, as a host has them
    "sd3.5-turbo-4": _preset(
        *(1000.0, 857.69232, 602.15057, 8.9285717),
        family="sd3",
        shift=3.0,
        source="Stability-AI/sd3.5, sd3_infer.py, and model card: SD3.5-Large-Turbo, Euler, 4 steps, no guidance",
    ),
}


def recipe_of(recipe: Recipe | str | None) -> Recipe:
    """A Recipe, a preset's name or a recipe's JSON as a Recipe."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe is None or (recipe not in PRESETS and not recipe.lstrip().startswith("{")):
        raise OneStepError(f"no recipe {recipe!r:.80}: load a One-Step LoRA, or name a preset: {', '.join(PRESETS)}")
    return PRESETS[recipe] if recipe in PRESETS else Recipe.from_json(recipe)
