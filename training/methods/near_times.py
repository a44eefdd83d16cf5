r"""Times of consistency training: t from a log-normal, r a little below it, both in sigma / alpha as EDM counts them
(arXiv:2206.00364), for which x = x0 + t n; s = 0, the picture."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.denoiser import Denoiser
from ...core.recipe import Recipe
from ...core.schedule import NoiseSchedule, log_snr
from ..engine.batch import Batch
from ..settings import setting
from .consistency import SourceSettings
from .trajectory import Span

MEAN, DEVIATION = -1.1, 2.0
"""Of ln t (arXiv:2310.14189, Eq. 10)."""
RHO = 7.0
LEAST, HIGHEST = 0.002, 80.0
"""Of iCT's levels, which are EDM's."""


def vanishing(schedule: NoiseSchedule, ratio: Tensor) -> Tensor:
    """The level at which sigma / alpha is ``ratio``; 0 at 0."""
    safe = ratio.clamp_min(1e-12)
    return torch.where(ratio > 0, schedule.sigma_of_log_snr(-safe.log()), torch.zeros_like(ratio))


def noise_ratio(schedule: NoiseSchedule, sigma: Tensor) -> Tensor:
    """sigma / alpha; inf where alpha = 0."""
    return torch.exp(-log_snr(schedule, sigma))


@dataclass(frozen=True)
class TrainingSettings(SourceSettings):
    """Of consistency training."""

    distance_width: float = setting(
        0.00054,
        "Root mean square difference of two answers, in units of the latents, below which the distance is a square.",
        1e-6,
        10,
    )


@dataclass(frozen=True)
class NearTimes:
    """t log-normal from ``lowest`` to ``highest`` (sigma / alpha), r = t max(0, 1 - q^-(stage + 1) (1 + 8 / (1 + e^t)))
    (ECT, arXiv:2406.14548, Eq. 14 with k = 8, b = 1)."""

    lowest: float
    highest: float
    stage: int
    q: float = 2.0

    def __call__(self, schedule: NoiseSchedule, batch: Batch, u: Tensor) -> Span:
        t = log_normal(u, self.lowest, self.highest)
        r = t * (1 - (1 + 8 * torch.sigmoid(-t)) / self.q ** (self.stage + 1)).clamp_min(0)
        sigmas = vanishing(schedule, torch.stack([t, r]))
        return Span(sigmas, torch.zeros_like(t))


@dataclass(frozen=True)
class KarrasTimes:
    """t and r neighbours among ``count`` levels spaced by rho = 7 (arXiv:2206.00364, Eq. 5) from ``lowest`` to
    ``highest``; each pair as likely as ln t ~ N(-1.1, 2^2) is between them (iCT, arXiv:2310.14189, Eq. 10)."""

    lowest: float
    highest: float
    count: int

    @property
    def levels(self) -> Tensor:
        """[count], rising."""
        low, high = self.lowest ** (1 / RHO), self.highest ** (1 / RHO)
        share = torch.linspace(0, 1, self.count, dtype=torch.float64)
        # (low^(1/rho) + i / (N - 1) (high^(1/rho) - low^(1/rho)))^rho
        return (low + share * (high - low)) ** RHO

    def __call__(self, schedule: NoiseSchedule, batch: Batch, u: Tensor) -> Span:
        levels = self.levels
        bounds = torch.special.ndtr((levels.log() - MEAN) / DEVIATION)
        weight = bounds[1:] - bounds[:-1]
        at = torch.searchsorted(weight.cumsum(0) / weight.sum(), u, right=True).clamp_max(self.count - 2)
        sigmas = vanishing(schedule, torch.stack([levels[at + 1], levels[at]]))
        return Span(sigmas, torch.zeros_like(u))


def log_normal(u: Tensor, lowest: float, highest: float) -> Tensor:
    """[B] of ln t ~ N(-1.1, 2^2), cut off at both ends."""
    ends = torch.tensor([math.log(lowest), math.log(highest)], dtype=torch.float64)
    low, high = torch.special.ndtr((ends - MEAN) / DEVIATION)
    return torch.exp(MEAN + DEVIATION * torch.special.ndtri((low + u * (high - low)).clamp(1e-9, 1 - 1e-9)))


def inverse_gap(schedule: NoiseSchedule, span: Span) -> Tensor:
    """1 / (t - r), in sigma / alpha (arXiv:2310.14189, Eq. 11)."""
    return 1 / (noise_ratio(schedule, span.t) - noise_ratio(schedule, span.r))


def reach(denoise: Denoiser, recipe: Recipe) -> tuple[float, float]:
    """sigma / alpha at the lowest level that the network was trained at, or EDM's, and at the recipe's first, at most
    80 (iCT's highest)."""
    schedule = denoise.schedule
    ends = torch.tensor([schedule.sigma_min, float(recipe.levels(schedule)[0])], dtype=torch.float64)
    low, high = noise_ratio(schedule, ends).tolist()
    return max(low, LEAST), min(high, HIGHEST)
