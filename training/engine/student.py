"""The student as a generator: from unit noise to x0, in the recipe's steps, with a graph through one of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from ...core.denoiser import Denoiser
from ...core.recipe import Recipe
from ...core.roles import State
from ...core.sampling import advance, initial_latents, levels_of
from ...core.schedule import NoiseSchedule
from ..host import Host
from ..settings import Settings
from .batch import Batch

STUDENT = "student"
EARLIER = "student's earlier steps"
"""What a profile of a run calls the steps before the drawn one, with the share that as many as in the mean are of
them."""
LARGE = 16 * 2**30
"""Bytes of a card from which on the running mean lies on it."""
NewAdapter = Callable[[Host, Settings], Any]
"""Makes a new adapter module (core.adapter_module) for a host."""


@dataclass(frozen=True)
class Drawn:
    """One of the student's steps: from x [B, ...] at the level sigma [B] to its answer x0 [B, ...]. step: which; lower:
    the level [B] that it leads to, 0 after the last."""

    x0: Tensor
    x: Tensor
    sigma: Tensor
    lower: Tensor
    step: int


class Steps(Protocol):
    """The levels of the student's steps, while it learns."""

    def __call__(self, schedule: NoiseSchedule, recipe: Recipe, batch: Batch) -> list[Tensor]:
        """sigma [B] of each, noisiest first: the same for the whole batch."""
        ...

    def mean(self, recipe: Recipe) -> float:
        """How many they are, in the mean."""
        ...


@dataclass(frozen=True)
class RecipeSteps:
    """The recipe's own, which the student draws in."""

    def __call__(self, schedule: NoiseSchedule, recipe: Recipe, batch: Batch) -> list[Tensor]:
        return levels_of(schedule, recipe, len(batch))

    def mean(self, recipe: Recipe) -> float:
        return recipe.steps


@dataclass(frozen=True)
class BackwardSimulation:
    """The student as a generator: one of its steps, drawn uniformly for the whole batch; those before it run without a
    graph (DMD2, arXiv:2405.14867). A student of one step is always at its only step.

    steps: its levels. first: the first step that may be drawn. only: the one that is.
    """

    denoise: Denoiser
    recipe: Recipe
    steps: Steps = RecipeSteps()
    first: int = 0
    only: int | None = None

    @property
    def cost(self) -> float:
        """Forwards of a picture, in the mean: of its step, and of those before."""
        if self.only is not None:
            return 1 + self.only
        return 1 + (self.first + self.steps.mean(self.recipe) - 1) / 2

    def __call__(self, batch: Batch, *, role: str = STUDENT, train: bool = True) -> Drawn:
        denoise, recipe, schedule = self.denoise, self.recipe, self.denoise.schedule
        levels = self.steps(schedule, recipe, batch)
        step = self._step(batch, len(levels))
        with torch.no_grad(), denoise.roles.use(role):
            x = initial_latents(schedule, batch.normal("latent"), levels[0], recipe.initial_noise_scale)
            with record_function(EARLIER, repr((self.cost - 1) / step)) if step else nullcontext():
                for earlier in range(step):
                    x0 = denoise(x, levels[earlier], batch.cond)
                    x = advance(schedule, recipe, earlier, levels, x, x0, lambda at: batch.normal(f"renoise {at}"))
        with denoise.roles.use(role, train=train):
            x0 = denoise(x, levels[step], batch.cond)
        lower = levels[step + 1] if step + 1 < len(levels) else torch.zeros_like(levels[step])
        return Drawn(x0, x, levels[step], lower, step)

    def again(self, batch: Batch, drawn: Drawn) -> Drawn:
        """The same step of the student with a graph, for one that was drawn without."""
        with self.denoise.roles.use(STUDENT):
            return replace(drawn, x0=self.denoise(drawn.x, drawn.sigma, batch.cond))

    def _step(self, batch: Batch, steps: int) -> int:
        return self.first + batch.choice(steps - self.first, "student step") if self.only is None else self.only


def generate(denoise: Denoiser, recipe: Recipe, batch: Batch, *, role: str = STUDENT, train: bool = True) -> Tensor:
    """x0 [B, ...] of one of the recipe's steps."""
    return BackwardSimulation(denoise, recipe)(batch, role=role, train=train).x0


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
