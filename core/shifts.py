"""By how much a flow model's equal steps move towards noise where that hangs on their number or the picture's size."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class StepsShift:
    """FLUX.2's shift e^mu of ``tokens`` and steps (compute_empirical_mu of its authors' and of both hosts' code)."""

    tokens: int

    def __call__(self, steps: int) -> float:
        # mu lies on a line through its values at 10 and at 200 steps, each linear in the tokens
        many = 0.00016927 * self.tokens + 0.45666666
        few = 8.73809524e-05 * self.tokens + 1.89833333
        return math.exp(many if self.tokens > 4300 else few + (steps - 10) / 190 * (many - few))

    def of(self, latents: int) -> StepsShift:
        return StepsShift(latents)


@dataclass(frozen=True)
class SizeShift:
    """The shift e^mu of ``tokens`` of 2 x 2 latents, for any number of steps: mu lies on a line through ``low`` and
    ``high``, (tokens, mu) each (calculate_shift of diffusers' pipelines). linear: the shift is mu itself."""

    tokens: int
    low: tuple[int, float]
    high: tuple[int, float]
    linear: bool = False

    def __call__(self, steps: int) -> float:
        slope = (self.high[1] - self.low[1]) / (self.high[0] - self.low[0])
        mu = self.low[1] + slope * (self.tokens - self.low[0])
        return mu if self.linear else math.exp(mu)

    def of(self, latents: int) -> SizeShift:
        return replace(self, tokens=latents // 4)
