"""States of the teacher's own guided trajectories, at levels of a solver: what a student meets as it draws, which
pictures with fresh noise are not."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ...core import randomness
from ...core.denoiser import guided
from ...core.roles import TEACHER
from ...core.sampling import initial_latents, jump
from ..engine.batch import Batch
from .pairs import Blocks, Sides


@dataclass
class Rollouts(Blocks):
    """Of each sample ``states`` states of one trajectory of the teacher. levels: [n + 1] sigma, noisiest first, of its
    steps. guidance: of all of them. scale: of the noise that they begin with."""

    levels: Tensor
    states: int
    guidance: float
    scale: float = 1.0
    stream = "rollout"

    def draw(self, batch: Batch, update: int) -> tuple[Batch, tuple[Tensor, Tensor]]:
        """Like ``batch``, of samples: (x [B, C, h, w], the index [B] of its level)."""
        share = randomness.uniform(batch.seed, "rollout state", batch.step, batch.samples)

        def one_of_each(sides: Sides) -> Sides:
            at = torch.arange(len(share)), (share * sides[1].shape[1]).floor().long()
            return tuple(side[at] for side in sides)

        drawn, (x, index) = self._take(batch, update, one_of_each)
        return drawn, (x, index)

    @property
    def solve_cost(self) -> float:
        return (len(self.levels) - 1) * (2.0 if self.guidance != 1 else 1.0)

    def _make(self, block: int, micro: int) -> dict[str, Tensor]:
        x, index = (torch.cat(side) for side in zip(*self._each(block, micro, self._walk(block)), strict=True))
        return {"x": x, "index": index}

    def _sides(self, block: int, kept: dict[str, Tensor]) -> Sides:
        return kept["x"], kept["index"]

    def _walk(self, block: int) -> _Walk:
        return _Walk(self, block, self._noise(block))


@dataclass(frozen=True)
class _Walk:
    """(rows, their batch) -> their states [B, states, C, h, w] and indices [B, states], on the CPU."""

    of: Rollouts
    block: int
    noise: Tensor

    @torch.no_grad()
    def __call__(self, rows: list[int], batch: Batch) -> tuple[Tensor, Tensor]:
        denoise, levels = self.of.host.denoiser, self.of.levels
        noise, first = self.noise[rows].to(batch.device), levels[:1].expand(len(rows))
        x = initial_latents(denoise.schedule, noise, first, self.of.scale)
        seen = []
        with denoise.roles.use(TEACHER):
            for sigma, lower in pairwise(levels):
                seen.append(x.cpu())
                here = sigma.expand(len(rows))
                x0 = guided(denoise, x, here, batch.cond, batch.nulls(), self.of.guidance)
                x = jump(denoise.schedule, x, x0, here, lower.expand(len(rows)))
        kept = torch.stack([self._kept(row, len(seen)) for row in rows])
        every = torch.stack(seen, 1)
        return every[torch.arange(len(rows))[:, None], kept], kept

    def _kept(self, row: int, steps: int) -> Tensor:
        """The states that a row keeps, by equal chances."""
        draw = randomness.generator(self.of.settings.seed, "rollout states", self.block, row)
        return torch.randperm(steps, generator=draw)[: self.of.states].sort().values
