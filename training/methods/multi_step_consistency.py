"""Multi-step consistency with a negative prompt (SpeedUpNet, arXiv:2312.08887): the student, given a negative, makes in
one step the move that its guided teacher makes in several.

A segment leads from sigma to sigma'; J(x, D) is DDIM's or Euler's jump along it, G the student without a negative:

    |J(x, D(x, sigma, c; n)) - y|^2,   y = J(x, G) + (E_n - E_0)

E_n and E_0 are where the teacher's steps end from the same start within the segment, with the negative and without.
Ours: their difference is asked for, not E_n itself, so that a student that is better or worse than its teacher stays
what it is wherever there is nothing to avoid; and the teacher's steps start from the student's own jump, so that the
pictures they compare are the student's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.cond import Cond
from ...core.denoiser import Denoiser, as_host, guided
from ...core.recipe import Recipe
from ...core.roles import TEACHER
from ...core.sampling import initial_latents, jump
from ...core.schedule import NoiseSchedule, add_noise
from ..data.segments import Moves
from ..engine.batch import Batch
from ..engine.student import STUDENT, level
from ..settings import Settings


@dataclass(frozen=True)
class MultiStepConsistency:
    """The loss."""

    def __call__(self, denoise: Denoiser, batch: Batch, data: Moves) -> Tensor:
        """A sum over a sample's elements, a mean over samples."""
        with denoise.roles.use(STUDENT, negative=data.negative):
            x0 = denoise(data.x, data.sigma, batch.cond)
        # |J(x, D(x, sigma, c; n)) - y|^2
        error = jump(denoise.schedule, data.x, x0, data.sigma, data.lower) - data.end
        return error.square().flatten(1).sum(1).mean()


def negative_guided(
    denoise: Denoiser, x: Tensor, sigma: Tensor, texts: tuple[Cond, Cond, Cond], w: float, v: float
) -> Tensor:
    """D_0 + w (D_c - D_0) - v (D_cn - D_c): classifier-free guidance, away from what the negative would add to this
    prompt.

    texts: the prompt c, the null, and prompt and negative as one text cn. As concept sliders do (arXiv:2311.12092,
    Eq. 7), the negative stands beside the prompt: D_n alone would take the prompt's own content along. For an
    empty negative, cn = c, this is guidance alone.
    """
    if v == 0:
        return guided(denoise, x, sigma, texts[0], texts[1], w)
    # three prompts in one forward
    answer = denoise(torch.cat([x] * 3), torch.cat([sigma] * 3), Cond.concat(list(texts)))
    d_c, d_0, d_cn = answer.chunk(3)
    return as_host(denoise.token_norm, x, d_c, d_0 + w * (d_c - d_0) - v * (d_cn - d_c))


def solve(denoise: Denoiser, x: Tensor, sigmas: Tensor, texts: tuple[Cond, Cond, Cond], w: float, v: float) -> Tensor:
    """The teacher's steps from x at sigmas[0] to sigmas[-1] (0 is a picture), first order, one for each difference."""
    for sigma, lower in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        here, there = (torch.full((len(x),), level, dtype=torch.float64) for level in (sigma, lower))
        x = jump(denoise.schedule, x, negative_guided(denoise, x, here, texts, w, v), here, there)
    return x


def levels_between(schedule: NoiseSchedule, first: Tensor, last: Tensor, share: float, steps: int) -> Tensor:
    """[steps + 1] levels, equal steps of the network's time: from where ``share`` of the way from ``last`` to ``first``
    (both [], sigma) is left, to ``last``."""
    high, low = (_time(schedule, level) for level in (first, last))
    times = low + share * (high - low) * torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    levels = schedule.sigma_of_time(times)
    levels[-1] = last
    return levels


def _time(schedule: NoiseSchedule, sigma: Tensor) -> float:
    return float(schedule.time_of_sigma(sigma)) if float(sigma) > 0 else 0.0


SHARE = 0.75
"""Of a segment's time that the teacher's steps take; the first part is the student's own jump."""


@dataclass(frozen=True)
class Rollout:
    """The student's steps by its ``recipe`` without a negative, and what a negative would change on each of them."""

    denoise: Denoiser
    settings: Settings
    recipe: Recipe

    @property
    def levels(self) -> Tensor:
        """[steps + 1]: sigma of each step, and 0."""
        return torch.cat([self.recipe.levels(self.denoise.schedule), torch.zeros(1, dtype=torch.float64)])

    def start(self, batch: Batch, noise: Tensor, segment: int) -> tuple[Tensor, Tensor]:
        """(x, G) where the student begins its ``segment``."""
        denoise = self.denoise
        sigma = level(denoise, self.recipe, 0, batch)
        x = initial_latents(denoise.schedule, noise, sigma, self.recipe.initial_noise_scale)
        with denoise.roles.use(STUDENT):
            x0 = denoise(x, sigma, batch.cond)
            for step in range(1, segment + 1):
                sigma = level(denoise, self.recipe, step, batch)
                x = add_noise(denoise.schedule, x0, batch.normal(f"segment renoise {step}"), sigma)
                x0 = denoise(x, sigma, batch.cond)
        return x, x0

    def change(self, batch: Batch, both: Cond, x: Tensor, x0: Tensor, segment: int) -> Tensor:
        """E_n - E_0 of a ``segment`` that the student begins at x with the answer x0. both: prompt and negative."""
        denoise, settings, null = self.denoise, self.settings, batch.nulls()
        assert null is not None
        first, last = self.levels[segment : segment + 2]
        sigmas = levels_between(denoise.schedule, first, last, SHARE, settings.own.segment_steps)
        # from the student's own jump
        start = jump(denoise.schedule, x, x0, first.expand(len(x)), sigmas[0].expand(len(x)))
        with denoise.roles.use(TEACHER):
            e_n = solve(denoise, start, sigmas, (batch.cond, null, both), settings.guidance, settings.own.push)
            e_0 = solve(denoise, start, sigmas, (batch.cond, null, batch.cond), settings.guidance, 0.0)
        return e_n - e_0

    def move(self, batch: Batch, both: Cond, noise: Tensor, segment: int) -> tuple[Tensor, Tensor]:
        """(x, y): where a ``segment`` begins and should end."""
        x, x0 = self.start(batch, noise, segment)
        sigma, lower = (value.expand(len(x)) for value in self.levels[segment : segment + 2])
        # y = J(x, G) + (E_n - E_0)
        return x, jump(self.denoise.schedule, x, x0, sigma, lower) + self.change(batch, both, x, x0, segment)
