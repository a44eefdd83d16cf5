"""Diversity: the base draws a picture's first part, a distilled model the rest (arXiv:2503.10637).

A distilled model decides what a picture will be in its first step, and much alike for every seed; its base does not.
Two models meet at one log-SNR lambda = log(alpha / sigma), and a state crosses as x / sqrt(alpha^2 + sigma^2), which is
the same for variance-preserving, variance-exploding and flow schedules of one lambda.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .cond import Cond
from .denoiser import Denoiser, guided
from .errors import OneStepError
from .recipe import Recipe
from .sampling import initial_latents, jump
from .schedule import NoiseSchedule, expand, log_snr


def remaining(recipe: Recipe, schedule: NoiseSchedule, hand_over: float = 0.0) -> Recipe:
    """What is left of ``recipe`` on ``schedule`` where the base has drawn the first part: its first time is the
    hand-over's.

    hand_over: where the distilled model takes over, as a share of its time in 0 to 1 (exclusive); the recipe's later
    steps follow. 0 is automatic: the recipe's second step, as in the paper. Raises OneStepError for a recipe of one
    step without a hand_over: the level that one step is told (time 625, say) was learnt with noise alone, and from a
    base's state of that level it draws too much.
    """
    if not 0 <= hand_over < 1:
        raise OneStepError(f"hand_over is {hand_over!r:.20}: give a share of the time in 0 (automatic) to below 1")
    if hand_over == 0 and recipe.steps == 1:
        raise OneStepError(
            "a recipe of one step leaves nothing to the base: use a model of two or more steps (student_steps), or set "
            "hand_over to the share of the time, like 0.75, of a lower level that this model was trained at"
        )
    share = torch.tensor(hand_over, dtype=torch.float64)
    first = float(schedule.time_of_sigma(schedule.sigma_at(share))) if hand_over else recipe.timesteps[1]
    times = (first, *(time for time in recipe.timesteps if time < first))
    return recipe.retimed(times, 1.0)


def base_part(levels: Tensor, until: Tensor) -> Tensor:
    """Log-SNRs [k + 1] of the base's part: k of its own ``levels`` [N], noisiest first, then ``until`` itself.

    k is the paper's: the base's own run ends at its level nearest to the hand-over. The last step goes to the hand-over
    exactly, instead of that level. Levels are near by their angle atan(sigma / alpha), which is finite at both ends.
    """
    if not bool(levels[0] < until):
        raise OneStepError(
            f"the hand-over (log-SNR {float(until):.3g}) is no cleaner than where the base begins "
            f"({float(levels[0]):.3g}): set hand_over lower"
        )
    nearest = (torch.atan(torch.exp(-levels)) - torch.atan(torch.exp(-until))).abs().argmin()
    kept = levels[: max(1, int(nearest))]
    return torch.cat([kept, until.reshape(1).to(kept)])


def base_levels(base: NoiseSchedule, steps: int, distilled: NoiseSchedule, rest: Recipe) -> Tensor:
    """sigma [k + 1] of the base's part of its ``steps`` equal steps, down to where ``rest`` (see `remaining`) begins on
    ``distilled``."""
    own = base.sigma_of_time(base.trailing(steps))
    until = log_snr(distilled, rest.levels(distilled)[0])
    kept = base_part(log_snr(base, own), until)
    return torch.cat([own[: len(kept) - 1], base.sigma_of_log_snr(until).reshape(1)])


def descend(denoise: Denoiser, levels: Tensor, cond: Cond, null: Cond | None, noise: Tensor, guidance: float) -> Tensor:
    """The base's state [B, ...] at the last of ``levels`` sigma [k + 1], from unit ``noise`` [B, ...], by first-order
    steps of its ODE; in units of sqrt(alpha^2 + sigma^2), as `sampling.sample` takes its noise at an initial noise
    scale of 1."""
    schedule = denoise.schedule
    sigmas = [sigma.expand(len(noise)) for sigma in levels]
    x = initial_latents(schedule, noise, sigmas[0], 1.0)
    for sigma, lower in pairwise(sigmas):
        x = jump(schedule, x, guided(denoise, x, sigma, cond, null, guidance), sigma, lower)
    last = sigmas[-1]
    return x / expand((schedule.alpha(last) ** 2 + last**2).sqrt(), x)
