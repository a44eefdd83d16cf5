"""How the model that a run begins with is drawn: a few-step model as its names say, any other in many steps."""

from __future__ import annotations

from dataclasses import replace

from ...core.errors import OneStepError
from ...core.families import FAMILIES
from ...core.licences import BASE
from ...core.recipe import PRESETS, Recipe
from ...core.recipe.by_name import MODEL
from ...core.recipe.recognised import recognised
from ...core.schedule import of_size
from ..host import Host
from ..settings import MOST_STEPS, Settings, nearest
from .inputs import few_step_kind_of, recipe_of, recipe_of_student

AUTO, FEW, MANY = "auto", "few", "many"


def recipe_as_drawn(host: Host, settings: Settings, told: str = AUTO) -> Recipe:
    """The recipe of the initial LoRA, or of the base where there is none.

    told: few = in the run's ``student_steps``; many = in ``teacher_steps`` of first order with guidance; the name of a
    preset; auto = as the initial LoRA says, or the base's names; where these say nothing, few of a base that gives away
    that it is distilled, else many. Raises OneStepError for another name, a preset of another family, and an initial
    LoRA of which nothing says how it is drawn.
    """
    if told not in (AUTO, FEW, MANY, *PRESETS):
        raise OneStepError(f"drawn is {told!r:.60}{nearest(told, (AUTO, FEW, MANY, *PRESETS))}")
    if told == FEW:
        return recipe_of(host, settings)
    if told == AUTO and settings.initial_lora:
        return recipe_of_student(host, settings)
    if told == AUTO:
        told = _by_name(host) or (FEW if few_step_kind_of(host) else MANY)
        return recipe_as_drawn(host, settings, told)
    return _in_many(host, settings) if told == MANY else _preset(host, settings, told)


def _by_name(host: Host) -> str:
    """The preset that the base's names stand for; "" where they stand for none."""
    path = next((path for part, _, path in host.made_of if part == BASE), None)
    how = "name its preset in drawn, or set drawn=few for the run's student_steps"
    found = None if path is None else recognised(path, {}, host.family, how, what=MODEL)
    return "" if found is None else found.preset


def _preset(host: Host, settings: Settings, name: str) -> Recipe:
    recipe = PRESETS[name]
    if recipe.family != host.family:
        raise OneStepError(
            f"drawn is {name}, a preset of {FAMILIES[recipe.family].title}, and {host.name} is "
            f"{FAMILIES[host.family].title}: name one of its own, or set drawn=few or drawn=many"
        )
    if recipe.of_base != recipe:
        raise OneStepError(
            f"{name} is drawn by a network that answers or is given times otherwise than {host.name} does: tuning does "
            "not serve it. Tune its base, and put the few-step LoRA on it where you draw"
        )
    return replace(recipe, sizes=settings.size_list, lora_scale=1.0, source="")


def _in_many(host: Host, settings: Settings) -> Recipe:
    schedule = of_size(host.denoiser.schedule, host.latent_shape(settings.size_list[0]))
    times = schedule.trailing(min(settings.teacher_steps, MOST_STEPS))
    guidance = settings.guidance if host.denoiser.guidance == "cfg" else 1.0
    return Recipe.at(schedule, times, guidance=guidance, family=host.family, sizes=settings.size_list)
