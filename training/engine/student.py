"""The student as a generator: from unit noise to x0, in the recipe's steps, with a graph through one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...core.denoiser import Denoiser
from ...core.recipe import Recipe
from ...core.roles import State
from ...core.sampling import advance, initial_latents, levels_of
from ..host import Host
from ..settings import Settings
from .batch import Batch

STUDENT = "student"
LARGE = 16 * 2**30
"""Bytes of a card from which on the running mean lies on it."""
NewAdapter = Callable[[Host, Settings], Any]
"""Makes a new adapter module (core.adapter_module) for a host."""


def generate(denoise: Denoiser, recipe: Recipe, batch: Batch, *, role: str = STUDENT, train: bool = True) -> Tensor:
    """x0 [B, ...] of one of the recipe's steps, drawn uniformly for the whole batch (backward simulation,
    arXiv:2405.14867).

    The steps before it run without a graph. A student of one step is always at its only step.
    """
    step, levels = batch.choice(recipe.steps, "student step"), levels_of(denoise.schedule, recipe, len(batch))
    with torch.no_grad(), denoise.roles.use(role):
        x = initial_latents(denoise.schedule, batch.normal("latent"), levels[0], recipe.initial_noise_scale)
        for earlier in range(step):
            x0 = denoise(x, levels[earlier], batch.cond)
            x = advance(denoise.schedule, recipe, earlier, levels, x, x0, lambda at: batch.normal(f"renoise {at}"))
    with denoise.roles.use(role, train=train):
        return denoise(x, levels[step], batch.cond)


def level(denoise: Denoiser, recipe: Recipe, step: int, batch: Batch) -> Tensor:
    """sigma [B] of the recipe's ``step``."""
    return recipe.levels(denoise.schedule)[step].expand(len(batch))


def add_student(host: Host, settings: Settings, initial: State | None, adapter: NewAdapter | None = None) -> None:
    """The student's role, as a run begins. initial: the initial LoRA's factors. adapter: makes the module that learns
    in their place; the initial LoRA then stays under it as it is."""
    roles = host.denoiser.roles
    if adapter is None:
        roles.add(STUDENT, settings.rank, settings.seed, host.device)
    if adapter is not None or initial is not None:
        roles.load(STUDENT, initial or {}, host.device, lineage=settings.seed)
    if adapter is not None:
        for factor in roles.parameters(STUDENT):
            factor.requires_grad_(False)
        roles.add_module(STUDENT, adapter(host, settings).to(host.device))


def mean_device(device: torch.device) -> torch.device:
    """Where the student's running mean lies: on a card with less than 16 GiB it would take the room of activations, for
    what is read once an update; there it is in the host's memory."""
    small = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < LARGE
    return torch.device("cpu") if small else device
