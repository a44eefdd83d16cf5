"""The sub-interval kernel of TDM (arXiv:2503.06674): a step of several is matched from its own end upwards. There the
student's own noise is still in x, and fresh noise is added to it, not to x0."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...core.sampling import diffuse, jump
from ...core.schedule import NoiseSchedule, expand
from ..engine.levels import UniformTime
from ..engine.student import Drawn
from .distribution_matching import DistributionMatching


@dataclass(frozen=True)
class FromStepEnd:
    """A renoising kernel that begins at x_mid [B, ...], where the student's step ended, at the level ``lower`` [B]."""

    x_mid: Tensor
    lower: Tensor

    def __call__(self, schedule: NoiseSchedule, x: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        # x_t = (a_t / a_mid) x_mid + sqrt(s_t^2 - (a_t s_mid / a_mid)^2) n
        return diffuse(schedule, self.x_mid, noise, self.lower, sigma)


def importance(schedule: NoiseSchedule, x: Tensor, x_s: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """[B]: exp(-1/2 mean e^2) / exp(-1/2 mean n^2), e = (x_s - alpha x) / sigma: how likely the noise that x_s holds,
    the student's own and the fresh, is as noise of that level, against the fresh noise n alone."""
    held = (x_s - expand(schedule.alpha(sigma), x) * x) / expand(sigma, x)
    return torch.exp(0.5 * (noise.square() - held.square()).flatten(1).mean(1))


@dataclass(frozen=True)
class SubInterval:
    """The levels that a step answers for: from its end to where it begins, and those of the first step to the top.

    whole: to the top from every step's end.
    """

    whole: bool = False

    def __call__(self, objective: DistributionMatching, schedule: NoiseSchedule, drawn: Drawn) -> DistributionMatching:
        """``objective`` within the sub-interval of a step. A step that ends at 0 has plain noise on x0."""
        low = float(schedule.share_of(drawn.lower[:1])) if float(drawn.lower[0]) else 0.0
        top = self.whole or drawn.step == 0
        high = 1.0 if top else float(schedule.share_of(drawn.sigma[:1]))
        apart = objective.guidance_levels
        changed = replace(
            objective,
            levels=cut(objective.levels, low, high),
            critic_levels=cut(objective.critic_levels, low, high),
            guidance_levels=None if apart is None else cut(apart, low, high),
        )
        if low == 0:
            return changed
        x_mid = jump(schedule, drawn.x.detach(), drawn.x0.detach(), drawn.sigma, drawn.lower)
        return replace(changed, renoise=FromStepEnd(x_mid, drawn.lower), importance=importance)


def cut(levels: Any, low: float, high: float) -> UniformTime:
    """Where ``levels`` and [low, high] do not meet, [low, high] alone."""
    cut = UniformTime(max(levels.low, low), min(levels.high, high))
    return cut if cut.low < cut.high else UniformTime(low, high)
