"""Guided trajectories of the teacher: a few states of each, and what classifier-free guidance answers there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import randomness
from ..core.roles import TEACHER
from ..core.sampling import trajectory
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
    ``settings.scales``; ``settings.states`` of its states are kept, chosen at random."""

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
        denoise, steps, null = self.host.denoiser, self.settings.teacher_steps, batch.nulls()
        assert null is not None  # the method's check has seen to that
        kept = torch.stack([self._steps(block, row) for row in rows])
        seen: list[list[tuple[Tensor, ...]]] = [[] for _ in rows]
        with denoise.roles.use(TEACHER):
            walk = trajectory(denoise, batch.cond, null, noise, steps, w)
            for step, state in enumerate(walk):
                for row in torch.nonzero((kept == step).any(1)).flatten().tolist():
                    seen[row].append(tuple(side[row].cpu() for side in (state[0], state[2], state[1])))
            x, target, sigma = (torch.stack([torch.stack([s[at] for s in row]) for row in seen]) for at in range(3))
            d_u = [denoise(x[:, at].to(noise.device), sigma[:, at], null).cpu() for at in range(x.shape[1])]
        # D_w - D_u = w (D_c - D_u)
        apart = (target - torch.stack(d_u, 1)).flatten(2).norm(dim=2) / w[:, None].to(target)
        return x, target, sigma, apart

    def _steps(self, block: int, row: int) -> Tensor:
        """[states] of the trajectory's steps, each at most once."""
        draw = randomness.generator(self.settings.seed, "trajectory steps", block, row)
        return torch.randperm(self.settings.teacher_steps, generator=draw)[: self.settings.states]

    def _scales(self, block: int) -> Tensor:
        """[batch] scales, uniform in the range, float64."""
        low, high = self.settings.scales
        share = randomness.uniform(self.settings.seed, "trajectory scale", block, range(self.settings.batch))
        return low + (high - low) * share
