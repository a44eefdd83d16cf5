"""Times between those that a network was trained at: what a derivative with respect to time needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoiser
from .schedule import VPSchedule


@dataclass(frozen=True)
class ContinuousVP(VPSchedule):
    """A discrete schedule whose network is told the very time of a level, the inverse of ``sigma_of_time``, and not
    the nearest index."""

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        angles: Tensor = self._angles.to(sigma.device)  # type: ignore[attr-defined]
        angle = torch.atan2(sigma.double(), self.alpha(sigma))
        high = torch.searchsorted(angles, angle.detach().contiguous()).clamp(1, self.times - 1)
        low = high - 1
        return low + ((angle - angles[low]) / (angles[high] - angles[low])).clamp(0, 1)


def continuous(denoise: Denoiser) -> Denoiser:
    """``denoise`` at any time. A flow model's is its level, which is that already."""
    schedule: Any = denoise.schedule
    if not isinstance(schedule, VPSchedule):
        return denoise
    made: Any = denoise
    return replace(made, schedule=ContinuousVP(schedule.alphas_cumprod))


def leading(denoise: Denoiser, lower: Tensor) -> Denoiser:
    """``denoise`` told that its answers lead to the levels ``lower`` [B]: a flow map's second time; negative ones are a
    twin trajectory's."""
    made: Any = denoise
    return replace(made, toward=lower)
