"""Guided trajectories of the teacher: a few states of each, and what classifier-free guidance answers there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import randomness
from ..core.denoiser import both
from ..core.roles import TEACHER
from ..core.sampling import walk
from ..core.schedule import expand
from .batch import Batch
from .pairs import Blocks


@dataclass(frozen=True)
class States:
    """B states of guided trajectories.

    x: [B, C, h, w] noisy latents. sigma: [B] their levels, float64. w: [B] each trajectory's guidance, float64.
    target: [B, C, h, w] D_u + w (D_c - D_u) there. apart: [B] |D_c - D_u| there.
    """

    x: Tensor
    sigma: Tensor
    w: Tensor
    target: Tensor
    apart: Tensor


@dataclass
class Trajectories(Blocks):
    """Trajectories of ``settings.teacher_steps`` steps from unit noise, each under a guidance of its own from the range
    ``settings.scales``; ``settings.states`` of its states are kept.

    Where guidance is large, |D_c - D_u|, a step is kept more often: the losses divide by that once, and what counts in
    the end is the square error of x0, which lies in the noisiest steps.
    """

    stream = "trajectory"

    def draw(self, batch: Batch, update: int) -> tuple[Batch, States]:
        """Like ``batch``, of trajectories, at one kept state of each."""
        drawn, (x, target, sigma, apart, w) = self._take(batch, update)
        kept = randomness.integers(x.shape[1], batch.seed, "trajectory state", batch.step, batch.samples)
        at = torch.arange(len(x)), kept
        return drawn, States(x[at], sigma.cpu()[at], w.cpu(), target[at], apart[at])

    def _make(self, block: int, micro: int) -> dict[str, Tensor]:
        noise, w = self._noise(block), self._scales(block)
        parts = [
            self._walk(block, rows, batch, noise[rows].to(batch.device), w[rows])
            for rows, batch in self._slices(block, micro)
        ]
        joined = (torch.cat(sides) for sides in zip(*parts, strict=True))
        return dict(zip(("x", "target", "sigma", "apart"), joined, strict=True))

    def _sides(self, block: int, kept: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return kept["x"], kept["target"], kept["sigma"], kept["apart"], self._scales(block)

    @torch.no_grad()
    def _walk(self, block: int, rows: list[int], batch: Batch, noise: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        """(x, target, sigma, apart), [B, states, ...] each, on the CPU."""
        denoise, null = self.host.denoiser, batch.nulls()
        assert null is not None  # the method's check has seen to that
        large: list[Tensor] = []

        def answer(x: Tensor, sigma: Tensor) -> Tensor:
            d_c, d_u = both(denoise, x, sigma, batch.cond, null)
            large.append((d_c - d_u).flatten(1).norm(dim=1).cpu())
            return d_u + expand(w, x) * (d_c - d_u)

        with denoise.roles.use(TEACHER):
            way = walk(denoise.schedule, answer, noise, self.settings.teacher_steps)
            steps = [[side.cpu() for side in step] for step in way]
        x, sigma, target = (torch.stack(sides, 1) for sides in zip(*steps, strict=True))
        apart = torch.stack(large, 1)
        kept = torch.stack([self._steps(block, row, apart[at]) for at, row in enumerate(rows)])
        at = torch.arange(len(rows))[:, None], kept
        return x[at], target[at], sigma[at], apart[at]

    def _steps(self, block: int, row: int, apart: Tensor) -> Tensor:
        """[states] of a trajectory's steps, each at most once, by chances in proportion to ``apart`` [steps] among
        those left; steps at which the teacher's answer is no number come last."""
        draw = randomness.generator(self.settings.seed, "trajectory steps", block, row)
        large = apart.double().nan_to_num(0, 0, 0)
        chances = large + 1e-6 * large.max() + torch.finfo(torch.float32).tiny
        return torch.multinomial(chances, self.settings.states, generator=draw)

    def _scales(self, block: int) -> Tensor:
        """[batch] scales, uniform in the range, float64."""
        low, high = self.settings.scales
        share = randomness.uniform(self.settings.seed, "trajectory scale", block, range(self.settings.batch))
        return low + (high - low) * share
