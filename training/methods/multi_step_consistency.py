"""Multi-step consistency with a negative prompt (SpeedUpNet, arXiv:2312.08887): the student, told a negative, makes in
one step the move that its guided teacher makes in several.

A segment leads from sigma to sigma'; J(x, D) is DDIM's or Euler's jump along it, G the student without a negative:

    |J(x, D(x, sigma, c; n)) - y|^2,   y = J(x, G) + (E_n - E_0)

E_n and E_0 are where the teacher's steps end from the same start within the segment, with the negative and without.
Ours: their difference is asked for, not E_n itself, so that a student that is better or worse than its teacher stays
what it is wherever there is nothing to avoid; and the teacher's steps start from the student's own jump, so that the
pictures they compare are the student's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.cond import Cond
from ...core.denoiser import Denoiser, guided
from ...core.sampling import jump
from ...core.schedule import NoiseSchedule
from ..engine.batch import Batch
from ..engine.student import STUDENT


@dataclass(frozen=True)
class Moves:
    """B segments. x: [B, C, h, w] their starts. sigma, lower: [B] their levels, float64. end: y. negative: of each."""

    x: Tensor
    sigma: Tensor
    lower: Tensor
    end: Tensor
    negative: Cond


Source = Callable[[Batch, int], tuple[Batch, Moves]]
"""(batch, update) -> the segments that this update looks at, and their batch."""


@dataclass(frozen=True)
class MultiStepConsistency:
    """The loss, as a direct method (training.direct)."""

    source: Source

    def draw(self, batch: Batch, update: int) -> tuple[Batch, Moves]:
        return self.source(batch, update)

    def loss(self, denoise: Denoiser, batch: Batch, data: Moves) -> Tensor:
        """A sum over a sample's elements, a mean over samples."""
        with denoise.roles.use(STUDENT, negative=data.negative):
            x0 = denoise(data.x, data.sigma, batch.cond)
        # |J(x, D(x, sigma, c; n)) - y|^2
        error = jump(denoise.schedule, data.x, x0, data.sigma, data.lower) - data.end
        return error.square().flatten(1).sum(1).mean()


def shunned(denoise: Denoiser, x: Tensor, sigma: Tensor, texts: tuple[Cond, Cond, Cond], w: float, v: float) -> Tensor:
    """D_0 + w (D_c - D_0) - v (D_cn - D_c): classifier-free guidance, away from what the negative would add to this
    prompt.

    texts: the prompt c, the null, and prompt and negative as one text cn. As concept sliders do (arXiv:2311.12092,
    Eq. 7), the negative is looked at beside the prompt: D_n alone would take the prompt's own content along. For an
    empty negative, cn = c, this is guidance alone.
    """
    if v == 0:
        return guided(denoise, x, sigma, texts[0], texts[1], w)
    # three prompts in one forward
    answer = denoise(torch.cat([x] * 3), torch.cat([sigma] * 3), Cond.concat(list(texts)))
    d_c, d_0, d_cn = answer.chunk(3)
    return d_0 + w * (d_c - d_0) - v * (d_cn - d_c)


def walked(denoise: Denoiser, x: Tensor, sigmas: Tensor, texts: tuple[Cond, Cond, Cond], w: float, v: float) -> Tensor:
    """The teacher's steps from x at sigmas[0] to sigmas[-1] (0 is a picture), first order, one for each difference."""
    for sigma, lower in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        here, there = (torch.full((len(x),), level, dtype=torch.float64) for level in (sigma, lower))
        x = jump(denoise.schedule, x, shunned(denoise, x, here, texts, w, v), here, there)
    return x


def between(schedule: NoiseSchedule, first: Tensor, last: Tensor, share: float, steps: int) -> Tensor:
    """[steps + 1] levels, equal steps of the network's time: from where ``share`` of the way from ``last`` to ``first``
    (both [], sigma) is left, to ``last``."""
    high, low = (_time(schedule, level) for level in (first, last))
    times = low + share * (high - low) * torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    levels = schedule.sigma_of_time(times)
    levels[-1] = last
    return levels


def _time(schedule: NoiseSchedule, sigma: Tensor) -> float:
    return float(schedule.time_of_sigma(sigma)) if float(sigma) > 0 else 0.0
