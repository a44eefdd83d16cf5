"""Where the teacher's guided trajectory is after a part of its steps, from the student's own start: what the first of
the student's steps is held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.denoiser import guided
from ...core.recipe import Recipe
from ...core.roles import TEACHER
from ...core.sampling import initial_latents, jump
from ...core.schedule import NoiseSchedule
from ..engine.batch import Batch
from .pairs import Blocks, Sides

PART = 0.5
"""Of the network's time that the teacher's steps lead through."""


def anchor_levels(schedule: NoiseSchedule, recipe: Recipe, steps: int) -> Tensor:
    """[steps + 1] levels, equal steps of the network's time: from where the student begins, through `PART` of it."""
    first = recipe.levels(schedule)[:1]
    shares = schedule.share_of(first) * torch.linspace(1, 1 - PART, steps + 1, dtype=torch.float64)
    return torch.cat([first, schedule.sigma_at(shares)[1:]])


@dataclass
class Anchors(Blocks):
    """(z, x_k): unit noise, and the guided teacher's x after ``steps`` steps from the student's start with it."""

    recipe: Recipe
    steps: int
    stream = "anchor"

    @property
    def solve_cost(self) -> float:
        return self.steps * (1.0 if self._scale == 1 else 2.0)

    @property
    def _scale(self) -> float:
        return self.settings.guidance if self.host.denoiser.guidance == "cfg" else 1.0

    def draw(self, batch: Batch, update: int) -> tuple[Batch, tuple[Tensor, Tensor]]:
        """Like ``batch``, of these, [B, C, h, w] each."""
        batch, (noise, x) = self._take(batch, update)
        return batch, (noise, x)

    def _make(self, block: int, micro: int) -> dict[str, Tensor]:
        noise = self._noise(block)

        def end(rows: list[int], batch: Batch) -> Tensor:
            return self._walk(batch, noise[rows].to(batch.device)).cpu()

        return {"x": torch.cat(self._each(block, micro, end))}

    def _sides(self, block: int, kept: dict[str, Tensor]) -> Sides:
        return self._noise(block), kept["x"]

    @torch.no_grad()
    def _walk(self, batch: Batch, noise: Tensor) -> Tensor:
        denoise = self.host.denoiser
        levels = [level.expand(len(noise)) for level in anchor_levels(denoise.schedule, self.recipe, self.steps)]
        x = initial_latents(denoise.schedule, noise, levels[0], self.recipe.initial_noise_scale)
        with denoise.roles.use(TEACHER):
            for sigma, lower in zip(levels[:-1], levels[1:], strict=True):
                x0 = guided(denoise, x, sigma, batch.of_teacher, batch.nulls(), self._scale)
                x = jump(denoise.schedule, x, x0, sigma, lower)
        return x
