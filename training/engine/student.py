"""The student as a generator: from unit noise to x0, in the recipe's steps, with a graph through one of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.denoiser import Denoiser
from ...core.recipe import Recipe
from ...core.sampling import initial_latents
from ...core.schedule import add_noise
from .batch import Batch

STUDENT = "student"


def generate(denoise: Denoiser, recipe: Recipe, batch: Batch, *, role: str = STUDENT, train: bool = True) -> Tensor:
    """x0 [B, ...] of one of the recipe's steps, drawn uniformly for the whole batch (backward simulation,
    arXiv:2405.14867).

    The steps before it run without a graph. A student of one step is always at its only step.
    """
    step = batch.choice(recipe.steps, "student step")
    with torch.no_grad(), denoise.roles.use(role):
        x, sigma = _start(denoise, recipe, batch)
        for earlier in range(step):
            x0 = denoise(x, sigma, batch.cond)
            sigma = level(denoise, recipe, earlier + 1, batch)
            x = add_noise(denoise.schedule, x0, batch.normal(f"renoise {earlier}"), sigma)
    with denoise.roles.use(role, train=train):
        return denoise(x, sigma, batch.cond)


def level(denoise: Denoiser, recipe: Recipe, step: int, batch: Batch) -> Tensor:
    """sigma [B] of the recipe's ``step``."""
    return recipe.levels(denoise.schedule)[step].expand(len(batch))


def _start(denoise: Denoiser, recipe: Recipe, batch: Batch) -> tuple[Tensor, Tensor]:
    sigma = level(denoise, recipe, 0, batch)
    return initial_latents(denoise.schedule, batch.normal("latent"), sigma, recipe.initial_noise_scale), sigma
