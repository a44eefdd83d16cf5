"""Regression of the student on the teacher's own pictures: a method, the warm start of others, and DMD's anchor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...core.denoiser import Denoiser
from ...core.recipe import Recipe
from ...core.sampling import initial_latents
from ...core.schedule import add_noise
from ..data.pairs import Pairs
from ..engine.batch import Batch
from ..engine.setup import Setup
from ..engine.student import STUDENT, level
from ..engine.turns import Loss, Plan, on_data, one_phase
from .method import Method

Anchored = Callable[[Setup, Pairs], tuple[Loss, float]]
"""(setup, pairs) -> what another method has beside its own terms: a loss of the student on the pairs, and forwards of a
sample in it."""


@dataclass(frozen=True)
class Regression:
    """d(G(z), x_T): the student's step from z, against the end x_T of the teacher's ODE from the same z
    (arXiv:2311.18828, Eq. 9).

    At a later step of several, the student starts from x_T with fresh noise of that level. c: width of the pseudo-Huber
    distance's round bottom, in units of the latents; above it errors count linearly. only: the step that learns, where
    not each may be drawn.
    """

    recipe: Recipe
    c: float = 0.03
    only: int | None = None

    def __call__(self, denoise: Denoiser, batch: Batch, pairs: tuple[Tensor, Tensor]) -> Tensor:
        """The loss, a sum over a sample's elements and a mean over samples; ``pairs`` is (z, x_T), each [B, ...]."""
        x0 = self.answer(denoise, batch, pairs)
        return pseudo_huber(x0, pairs[1], self.c).flatten(1).sum(1).mean()

    def answer(self, denoise: Denoiser, batch: Batch, pairs: tuple[Tensor, Tensor]) -> Tensor:
        """G(z) [B, ...], at the step that is drawn."""
        noise, target = pairs
        step = batch.choice(self.recipe.steps, "student step") if self.only is None else self.only
        sigma = level(denoise, self.recipe, step, batch)
        with denoise.roles.use(STUDENT):
            return denoise(self._start(denoise, batch, (noise, target), sigma, step), sigma, batch.cond)

    def _start(self, denoise: Denoiser, batch: Batch, pairs: tuple[Tensor, Tensor], sigma: Tensor, step: int) -> Tensor:
        noise, target = pairs
        if step == 0:
            return initial_latents(denoise.schedule, noise, sigma, self.recipe.initial_noise_scale)
        return add_noise(denoise.schedule, target, batch.normal(f"renoise {step - 1}"), sigma)


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """sqrt((a - b)^2 + c^2) - c, for each element (LCM, arXiv:2310.04378, app. C)."""
    return torch.sqrt((a - b) ** 2 + c**2) - c


def plan(setup: Setup) -> Plan:
    """The student's regression on the teacher's pairs, and nothing else."""
    pairs = Pairs(setup.host, setup.prompts, setup.settings, setup.folder / "pairs")
    loss = on_data(pairs.draw, partial(Regression(setup.recipe), setup.denoise), "regression")
    return one_phase(STUDENT, loss, setup.settings, pairs.blocks, pairs.solve_cost)


METHOD = Method(
    name="regression",
    title="Regression on the teacher's ODE pairs",
    paper="arXiv:2311.18828, Eq. 9",
    forwards="2.6 + the pair",
    plan=plan,
)
