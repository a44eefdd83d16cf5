r"""TrigFlow over any denoiser (arXiv:2410.11081): x = cos(t) x0 + sin(t) n, t = atan2(sigma, alpha) in (0, pi / 2).

    F(x, t) = dx / dt = (cos(t) x - D) / sin(t),      D = cos(t) x - sin(t) F

Whatever a network answers and whatever its schedule, D is the same picture and F follows from it; levels of latents of
unit deviation, as rCM has it. Its numbers are float64: differences of answers are taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.cond import Cond
from ...core.continuous import continuous
from ...core.denoiser import Denoiser, guided
from ...core.schedule import expand
from .tangents import wide


@dataclass(frozen=True)
class TrigFlow:
    """``denoise`` in these coordinates. like: latents of the dtype that it is given."""

    denoise: Denoiser
    like: Tensor

    @classmethod
    def of(cls, denoise: Denoiser, like: Tensor) -> TrigFlow:
        """At any time, of a discrete schedule too."""
        return cls(continuous(denoise), like)

    def angle(self, sigma: Tensor) -> Tensor:
        """t [B] of levels ``sigma`` [B]."""
        return torch.atan2(sigma.double(), self.denoise.schedule.alpha(sigma))

    def x0(self, x: Tensor, t: Tensor, cond: Cond, null: Cond | None = None, w: float = 1.0) -> Tensor:
        """D [B, ...] under guidance ``w``, float64."""
        schedule = self.denoise.schedule
        sigma = schedule.sigma_of_log_snr(-torch.log(torch.tan(t)))
        scale = torch.sqrt(schedule.alpha(sigma) ** 2 + sigma**2)
        return wide(guided(self.denoise, (expand(scale, x) * x).to(self.like.dtype), sigma, cond, null, w))

    def velocity(self, x: Tensor, t: Tensor, cond: Cond, null: Cond | None = None, w: float = 1.0) -> Tensor:
        """F [B, ...]."""
        return (expand(torch.cos(t), x) * x - self.x0(x, t, cond, null, w)) / expand(torch.sin(t), x)


def rotated(x: Tensor, dx: Tensor, angle: Tensor) -> Tensor:
    """cos(h) x + sin(h) dx / dt: where the trajectory of one x0 and one n is, h on."""
    return expand(torch.cos(angle), x) * x + expand(torch.sin(angle), x) * dx
