"""A recipe's steps as numbers. All that a sampler computes of x, of the network's answer F and of fresh noise n is
affine, so a step on a given schedule is six constants, and nothing but the network is left to compute:

    x0 = skip x + out F(x, time)        the parameterisation (`core.denoiser`)
    x  = keep x + to x0 + fresh n       the sampler (`core.sampling.advance`)

The constants are read off those very functions, in float64, at unit values of their arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import OneStepError
from .recipe import Recipe
from .sampling import advance, initial_latents, levels_of

ONE, NONE = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)


@dataclass(frozen=True)
class StepNumbers:
    """time: the network's own. The others as in the equations above; after the last step to = 1, keep = fresh = 0."""

    time: float
    skip: float
    out: float
    keep: float
    to: float
    fresh: float


def initial_scale(denoise: Any, recipe: Recipe) -> float:
    """What standard normal noise is multiplied by before the first step."""
    level = recipe.levels(denoise.schedule)[:1]
    return float(initial_latents(denoise.schedule, ONE, level, recipe.initial_noise_scale))


def step_numbers(denoise: Any, recipe: Recipe) -> list[StepNumbers]:
    """The steps of ``recipe`` on the schedule and in the parameterisation of ``denoise``, one of `core.denoiser`'s.

    Raises OneStepError for a recipe with guidance: it takes two answers of the network a step.
    """
    if recipe.guidance != 1:
        raise OneStepError(
            f"this recipe draws with classifier-free guidance {recipe.guidance:g}, two forwards a step: give one whose "
            "guidance is 1"
        )
    schedule, levels = denoise.schedule, levels_of(denoise.schedule, recipe, 1)

    def x0(step: int, x: Tensor, answer: Tensor) -> float:
        return float(denoise.x0(x, levels[step], answer))

    def after(step: int, x: Tensor, x0: Tensor, noise: Tensor) -> float:
        return float(advance(schedule, recipe, step, levels, x, x0, lambda _: noise))

    return [
        StepNumbers(
            float(denoise.network_time(levels[step])),
            x0(step, ONE, NONE),
            x0(step, NONE, ONE),
            after(step, ONE, NONE, NONE),
            after(step, NONE, ONE, NONE),
            after(step, NONE, NONE, ONE),
        )
        for step in range(recipe.steps)
    ]
