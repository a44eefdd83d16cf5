"""Samplers over the contract: a recipe's one or few steps, and the teacher's many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .cond import Cond
from .denoiser import Denoiser, guided
from .recipe import Recipe
from .schedule import NoiseSchedule, add_noise, expand, log_snr, of_size

Draw = Callable[[int], Tensor]


def initial_latents(schedule: NoiseSchedule, noise: Tensor, sigma: Tensor, scale: float) -> Tensor:
    """Pure noise as a sampler starts from it: ``scale`` sqrt(alpha^2 + sigma^2) noise, for noise [B, ...] and sigma
    [B]."""
    return expand(scale * (schedule.alpha(sigma) ** 2 + sigma**2).sqrt(), noise) * noise


def jump(schedule: NoiseSchedule, x: Tensor, x0: Tensor, sigma: Tensor, lower: Tensor) -> Tensor:
    """J(x, t -> r) = alpha_r D + sigma_r (x - alpha_t D) / sigma_t: DDIM (arXiv:2010.02502, Eq. 12) and Euler at
    once."""
    noise = (x - expand(schedule.alpha(sigma), x) * x0) / expand(sigma, x)
    return add_noise(schedule, x0, noise, lower)


def sample(
    denoise: Denoiser, recipe: Recipe, cond: Cond, noise: Tensor, draw: Draw, null: Cond | None = None
) -> Tensor:
    """x0 [B, ...] by ``recipe`` from standard normal ``noise`` [B, ...]; x at its end where that is another's to go on
    from.

    ``draw(i)`` gives fresh standard normal noise for step i of a recipe that renoises (eta > 0); it is not called
    otherwise.
    """
    levels = levels_of(denoise.schedule, recipe, len(noise))
    x = initial_latents(denoise.schedule, noise, levels[0], recipe.initial_noise_scale)
    for step, sigma in enumerate(levels):
        x0 = guided(denoise, x, sigma, cond, null, recipe.guidance)
        x = advance(denoise.schedule, recipe, step, levels, x, x0, draw)
    return x


def levels_of(schedule: NoiseSchedule, recipe: Recipe, batch: int) -> list[Tensor]:
    """sigma [B] of each of the recipe's steps, noisiest first."""
    return [sigma.expand(batch) for sigma in recipe.levels(schedule)]


def advance(
    schedule: NoiseSchedule, recipe: Recipe, step: int, levels: list[Tensor], x: Tensor, x0: Tensor, draw: Draw
) -> Tensor:
    """What a step ends in, from its x and the x0 found there: x at the next level; after the last, x0 itself, or x at
    the recipe's end."""
    last = step + 1 == len(levels)
    if last and not recipe.end:
        return x0
    sigma, lower = levels[step], recipe.end_level(schedule).expand(len(x0)) if last else levels[step + 1]
    if recipe.renoise:
        return add_noise(schedule, x0, draw(step), lower)
    if recipe.eta == 0:
        return jump(schedule, x, x0, sigma, lower)
    # TCD (arXiv:2402.19159), Algorithm 2: down to s = (1 - eta) t_next, then diffuse from s up to t_next
    below = schedule.sigma_of_time(((1 - recipe.eta) * schedule.time_of_sigma(lower)).floor())
    return diffuse(schedule, jump(schedule, x, x0, sigma, below), draw(step), below, lower)


def diffuse(schedule: NoiseSchedule, x: Tensor, noise: Tensor, sigma: Tensor, higher: Tensor) -> Tensor:
    """The forward kernel from ``sigma`` up to ``higher``: (a'/a) x + sqrt(s'^2 - (a' s / a)^2) noise."""
    ratio = schedule.alpha(higher) / schedule.alpha(sigma)
    spread = (higher.double() ** 2 - (ratio * sigma) ** 2).clamp_min(0).sqrt()
    return expand(ratio, x) * x + expand(spread, x) * noise


def teacher_sample(
    denoise: Denoiser,
    cond: Cond,
    null: Cond | None,
    noise: Tensor,
    steps: int,
    guidance: float | Tensor,
    *,
    second_order: bool = False,
) -> Tensor:
    """x0 [B, ...] of the teacher's probability-flow ODE in ``steps`` equal first-order steps from unit ``noise`` [B,
    ...], or in `fewer` of second order. guidance: one scale, or [B] scales."""
    for _, _, x0 in trajectory(denoise, cond, null, noise, steps, guidance, second_order=second_order):
        found = x0
    return found


def trajectory(
    denoise: Denoiser,
    cond: Cond,
    null: Cond | None,
    noise: Tensor,
    steps: int,
    guidance: float | Tensor,
    *,
    second_order: bool = False,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(x, sigma [B], guided x0) at each of `teacher_sample`'s steps, noisiest first."""
    schedule = of_size(denoise.schedule, noise.shape)
    sigmas = second_order_levels(schedule, steps) if second_order else schedule.sigma_of_time(schedule.trailing(steps))
    x = before = initial_latents(schedule, noise, sigmas[:1].expand(len(noise)), 1.0)
    for step, sigma in enumerate(sigmas):
        level = sigma.expand(len(noise))
        x0 = guided(denoise, x, level, cond, null, guidance)
        yield x, level, x0
        if step + 1 < len(sigmas):
            along = x0 + slope(schedule, sigmas, step) * (x0 - before) if second_order and step else x0
            x, before = jump(schedule, x, along, level, sigmas[step + 1].expand(len(noise))), x0


def fewer(steps: int) -> int:
    """Second-order steps that are as near to the ODE as ``steps`` of first order, on both bundled models
    (benchmarks/results/solver.md): half as many are not."""
    return max(2, -(-3 * steps // 5))


def second_order_levels(schedule: NoiseSchedule, steps: int) -> Tensor:
    """[`fewer`] levels, equal steps of the network's time from the first to the last of ``steps`` trailing ones: where
    a trajectory ends, x0 is what the network answers there, so that a higher last level would be a softer picture."""
    times = schedule.trailing(steps)
    share = torch.linspace(0, 1, fewer(steps), dtype=torch.float64)
    # at times that the network was trained at
    return schedule.sigma_of_time(schedule.time_of_sigma(schedule.sigma_of_time(times[0].lerp(times[-1], share))))


def slope(schedule: NoiseSchedule, sigmas: Tensor, step: int) -> float:
    """1 / (2 r) of DPM-Solver++(2M) (arXiv:2211.01095, Algorithm 2): D_i + (D_i - D_(i-1)) / (2 r) stands for D along
    the step from level i, r = (lambda_i - lambda_(i-1)) / (lambda_(i+1) - lambda_i). 0 behind a step from pure noise,
    where lambda is -inf."""
    before, here, after = log_snr(schedule, sigmas[step - 1 : step + 2]).tolist()
    return 0.0 if math.isinf(before) else (after - here) / (2 * (here - before))
