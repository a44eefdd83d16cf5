"""Method nct as its settings make it: the frozen generator, the adapter, the triples and the loss."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...core.control import ControlAdapter, new_adapter, places_of
from ...core.control_copy import ControlCopy, new_copy
from ...core.controls import control_of
from ...core.errors import OneStepError
from ...core.families import unet_parts
from ...core.recipe import Recipe
from ...core.tensor_file import read_header
from ..data.controlled_pictures import TriplePool
from ..engine.batch import Batch
from ..engine.inputs import recipe_of
from ..engine.prompts import Prompts
from ..engine.student import STUDENT
from ..host import Host
from ..settings import COPY, Settings
from ..watch.measures import Kept, Reference
from .nct import NoiseConsistency, controlled


def check_control(host: Host, settings: Settings) -> None:
    """Raises OneStepError for a control that is not known, layers that are not adapted, or a generator of many
    steps."""
    control_of(settings.control)
    if settings.control_form == COPY and host.family != "unet":
        raise OneStepError(f"control_form copy is a ControlNet for U-Nets, {host.name} has none: set it to light")
    places_of(host.family, host.denoiser.roles.targets)
    generator_recipe(host, settings)


def control_adapter(host: Host, settings: Settings) -> ControlAdapter | ControlCopy:
    """A new adapter of ``settings.control`` for the host's network, that sees the noise as well. A copy is one of the
    generator, the initial LoRA included."""
    size, roles, control = settings.size_list[0], host.denoiser.roles, control_of(settings.control)
    wanted = settings.control, control.channels
    if settings.control_form == COPY:
        cell, factors = size[1] // host.latent_shape(size)[1], roles.state(STUDENT)
        return new_copy(roles.targets, unet_parts(host.network), wanted, cell, factors, seed=settings.seed)
    return new_adapter(
        host.family,
        roles.targets,
        wanted,
        size,
        host.latent_shape(size),
        width=settings.control_width,
        seed=settings.seed,
    )


def generator_recipe(host: Host, settings: Settings) -> Recipe:
    """How the generator draws: as the initial LoRA's file says; without one the base itself is the generator. Raises
    OneStepError for one of several steps."""
    if not settings.initial_lora:
        return one_step(recipe_of(host, settings), "the base")
    text = read_header(settings.initial_lora).metadata.get("onestep.recipe")
    if text is None:
        raise OneStepError("the initial LoRA does not say how it is sampled: give one that onestep distill has made")
    return one_step(Recipe.from_json(text), "the initial LoRA")


def one_step(recipe: Recipe, what: str) -> Recipe:
    if recipe.steps != 1 or recipe.guidance != 1 or recipe.lora_scale != 1:
        raise OneStepError(
            f"{what} draws in {recipe.steps} steps at guidance {recipe.guidance:g}, LoRA scale {recipe.lora_scale:g}: "
            "nct needs a generator of one step, without guidance and at scale 1"
        )
    return recipe


@torch.no_grad()
def asked(host: Host, settings: Settings, batch: Batch, noise: Tensor) -> Kept:
    """What the watch holds a controlled student against: the generator's pictures from other noises than the student's,
    with their controls, and what it draws from the student's own ``noise`` without a control."""
    generate = partial(controlled, host.denoiser, generator_recipe(host, settings), batch)
    x = generate(batch.normal("watch control"))
    control = control_of(settings.control)(host.decode(x).cpu(), batch.samples)
    return {"x": x, "control": control, "plain": generate(noise)}


def by_controls(host: Host, settings: Settings, prompts: Prompts, folder: Path) -> Reference:
    """The watch's reference: what is ``asked`` for."""
    return Reference(asked)


def nct(host: Host, settings: Settings, prompts: Prompts, folder: Path) -> NoiseConsistency:
    """The loss, and its triples in ``folder``/triples."""
    recipe = generator_recipe(host, settings)
    generate = partial(controlled, host.denoiser, recipe)
    pool = TriplePool(host, prompts, settings, folder / "triples", control_of(settings.control), generate)
    return NoiseConsistency(recipe, pool.draw, settings.boundary)
