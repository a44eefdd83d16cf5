"""Where on the noise scale an objective looks, and how much it weighs there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.denoiser import Denoiser, EpsDenoiser
from ...core.schedule import FlowSchedule, NoiseSchedule, log_snr

LevelSampler = Callable[[NoiseSchedule, Tensor], Tensor]
"""(schedule, u [B] uniform in [0, 1)) -> sigma [B]."""
LevelWeight = Callable[[Tensor], Tensor]
"""lambda [B] -> weight [B]; must be finite at lambda = -inf (pure noise)."""


@dataclass(frozen=True)
class UniformTime:
    """Uniform in the network's own time, as DMD2 (arXiv:2405.14867): t ~ U[0.02, 0.98] T."""

    low: float = 0.02
    high: float = 0.98

    def __call__(self, schedule: NoiseSchedule, u: Tensor) -> Tensor:
        return schedule.sigma_at(self.low + (self.high - self.low) * u)


@dataclass(frozen=True)
class LogitNormalTime:
    """A share s(m + d n) of the network's own time, n ~ N(0, 1), s the logistic function (arXiv:2403.03206, Eq. 19)."""

    mean: float = 0.0
    deviation: float = 1.0

    def __call__(self, schedule: NoiseSchedule, u: Tensor) -> Tensor:
        bounded = u.clamp(1e-9, 1 - 1e-9)
        return schedule.sigma_at(torch.sigmoid(self.mean + self.deviation * torch.special.ndtri(bounded)))


@dataclass(frozen=True)
class NormalLogSNR:
    """lambda ~ N(mean, std^2): EDM's log-normal sigma (arXiv:2206.00364, table 1) is mean 1.2, std 1.2."""

    mean: float = 1.2
    std: float = 1.2

    def __call__(self, schedule: NoiseSchedule, u: Tensor) -> Tensor:
        bounded = u.clamp(1e-9, 1 - 1e-9)
        return schedule.sigma_of_log_snr(self.mean + self.std * torch.special.ndtri(bounded))


def v_weight(lam: Tensor) -> Tensor:
    """1 + e^(2 lambda): the squared error of x0, so weighed, is that of v (arXiv:2202.00512, Eq. 13)."""
    return 1 + torch.exp(2 * lam)


def eps_weight(lam: Tensor) -> Tensor:
    """e^(2 lambda): the squared error of x0, so weighed, is that of the noise eps (arXiv:2202.00512, sec. 4): DMD2's
    critic, and FastGen's of a network that predicts noise. 0 at pure noise, where x0 tells nothing of eps."""
    return torch.exp(2 * lam)


def flow_weight(lam: Tensor) -> Tensor:
    """(1 + e^lambda)^2 = 1 / sigma^2 where alpha = 1 - sigma: the squared error of a flow model's v = noise - x0."""
    return (1 + torch.exp(lam)) ** 2


def x0_weight(lam: Tensor) -> Tensor:
    """1: the squared error of x0 itself."""
    return torch.ones_like(lam)


def min_snr_weight(lam: Tensor) -> Tensor:
    """min(SNR, 5) in x0, SNR = e^(2 lambda) (arXiv:2303.09556, Eq. 5; TDM's critic)."""
    return torch.exp(2 * lam).clamp_max(5)


WEIGHTS: dict[str, LevelWeight] = {
    "v": v_weight,
    "eps": eps_weight,
    "flow": flow_weight,
    "x0": x0_weight,
    "min-snr": min_snr_weight,
}
"""Of a squared error in x0, by name."""


def natural(denoise: Denoiser) -> str:
    """The weight by which the error in x0 is that of what the network predicts."""
    if isinstance(denoise.schedule, FlowSchedule):
        return "flow"
    return "eps" if isinstance(denoise, EpsDenoiser) else "v"


def usual_levels(denoise: Denoiser) -> LevelSampler:
    """Where models of its kind are trained: uniform in time, or of a flow model logit-normal."""
    return LogitNormalTime() if isinstance(denoise.schedule, FlowSchedule) else UniformTime(0.0, 1.0)


def vsd_weight(lam: Tensor) -> Tensor:
    """1 / (e^lambda + e^-lambda): VSD's alpha sigma eps-difference (arXiv:2305.16213, Eq. 9) in x0, whatever the
    schedule."""
    return 1 / (torch.exp(lam) + torch.exp(-lam))


def at(weight: LevelWeight, schedule: NoiseSchedule, sigma: Tensor) -> Tensor:
    """``weight`` [B] at levels ``sigma`` [B]."""
    return weight(log_snr(schedule, sigma))
