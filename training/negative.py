"""Method sun as its settings make it: the student as it draws, the negative adapter, the segments and the loss."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import OneStepError
from ..core.negative_adapter import NegativeAttention, heads_of, new_adapter
from ..core.recipe import Recipe
from ..core.tensor_file import read_header
from .host import Host
from .inputs import recipe_of
from .objectives.multi_step_consistency import MultiStepConsistency
from .prompts import Prompts
from .segments import segments
from .settings import Settings
from .student import STUDENT


def check_negatives(host: Host, settings: Settings) -> None:
    """Raises OneStepError where this checkpoint has no guidance or no cross-attention to learn by, and for a student
    that is guided."""
    if host.denoiser.guidance != "cfg":
        raise OneStepError(
            f"{host.name} has no trained null condition, so sun's teacher cannot be guided: choose a base that is "
            "drawn with guidance"
        )
    student_recipe(host, settings)
    roles = host.denoiser.roles
    new_adapter(roles.targets, host.family, heads_of(host.blocks, roles.targets), settings.seed)


def negative_adapter(host: Host, settings: Settings) -> NegativeAttention:
    """A new adapter for the host's network, whose keys and values are those of the student as it begins."""
    roles = host.denoiser.roles
    heads = heads_of(host.blocks, roles.targets)
    return new_adapter(roles.targets, host.family, heads, settings.seed, roles.state(STUDENT))


def student_recipe(host: Host, settings: Settings) -> Recipe:
    """How the student draws: as the initial LoRA's file says; without one, as the settings do."""
    if not settings.initial_lora:
        return recipe_of(host, settings)
    text = read_header(settings.initial_lora).metadata.get("onestep.recipe")
    if text is None:
        raise OneStepError("the initial LoRA does not say how it is sampled: give one that onestep distill has made")
    recipe = Recipe.from_json(text)
    if recipe.guidance != 1 or recipe.lora_scale != 1:
        raise OneStepError(
            f"the initial LoRA draws at guidance {recipe.guidance:g} and LoRA scale {recipe.lora_scale:g}: sun needs a "
            "student without guidance and at scale 1"
        )
    return recipe


def sun(host: Host, settings: Settings, prompts: Prompts, folder: Path) -> MultiStepConsistency:
    """The loss, and its segments in ``folder``/segments."""
    return MultiStepConsistency(segments(host, settings, prompts, folder, student_recipe(host, settings)).draw)
