"""The random continuous schedule of CDM (arXiv:2605.06376, sec. 3.2): while it learns, a student of several steps draws
in another schedule each time, so that it answers rightly at every level, not at its own few alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.recipe import Recipe
from ...core.schedule import NoiseSchedule
from ..engine.batch import Batch


@dataclass(frozen=True)
class RandomSchedule:
    """N ~ U{low .. high} steps; the first begins where the recipe's does, the others at levels uniform in the network's
    time below it, noisiest first.

    least, most: shares of that time that the later levels lie within.
    """

    low: int
    high: int
    least: float = 0.02
    most: float = 0.98

    def __call__(self, schedule: NoiseSchedule, recipe: Recipe, batch: Batch) -> list[Tensor]:
        first = recipe.levels(schedule)[:1]
        count = self.low + batch.choice(self.high - self.low + 1, "schedule steps")
        # t_1 = 1 > t_2 > ... > t_N, t_i ~ U(0, 1), all as shares of the first time
        u = batch.shared_uniform(count, "schedule times")[1:].sort(descending=True).values
        later = schedule.sigma_at(schedule.share_of(first) * (self.least + (self.most - self.least) * u))
        return [level.expand(len(batch)) for level in torch.cat([first, later])]

    def mean(self, recipe: Recipe) -> float:
        return (self.low + self.high) / 2
