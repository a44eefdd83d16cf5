"""Noise schedules: x = alpha(sigma) x0 + sigma noise, and the network's own time at each level.

Levels are float64 tensors: at the noisy end of a variance-preserving schedule alpha = sqrt(1 - sigma^2), and float32
would lose a factor of a thousand in its relative error there. Latents keep their own dtype. They may
stay on the CPU (some accelerators have no float64): :func:`expand` brings them to a latent's dtype and device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .sending import sent
from .shifts import SizeShift as SizeShift
from .shifts import StepsShift as StepsShift


def expand(level: Tensor, like: Tensor) -> Tensor:
    """``level`` [B], as [B, 1, ..., 1] in the dtype and on the device of ``like`` [B, ...]."""
    return cast_as(level, like).reshape(-1, *[1] * (like.ndim - 1))


def cast_as(value: Tensor, like: Tensor) -> Tensor:
    """``value`` in the dtype and on the device of ``like``."""
    return sent(value, like.device, like.dtype)


class NoiseSchedule(Protocol):
    """What a family of models knows of noise. Every level is a float64 tensor of any shape."""

    @property
    def sigma_min(self) -> float: ...

    @property
    def sigma_max(self) -> float: ...

    def alpha(self, sigma: Tensor) -> Tensor:
        """The signal's factor at ``sigma``; 0 is legal (pure noise)."""
        ...

    def sigma_of_time(self, time: Tensor) -> Tensor:
        """The level at the network's own ``time``."""
        ...

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        """The time that a network is told at ``sigma``."""
        ...

    def sigma_at(self, share: Tensor) -> Tensor:
        """The level at ``share`` in [0, 1] of the way from clean to pure noise, as the network's time counts it."""
        ...

    def share_of(self, sigma: Tensor) -> Tensor:
        """The inverse of ``sigma_at``."""
        ...

    def sigma_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The inverse of :func:`log_snr`."""
        ...

    def trailing(self, steps: int) -> Tensor:
        """The times of ``steps`` equal steps that start at pure noise ("trailing" spacing), noisiest first."""
        ...


def log_snr(schedule: NoiseSchedule, sigma: Tensor) -> Tensor:
    """lambda = log(alpha / sigma), by which levels of different models are compared; -inf where alpha = 0."""
    return torch.log(schedule.alpha(sigma)) - torch.log(sigma)


def k_sigma(schedule: NoiseSchedule, sigma: Tensor) -> Tensor:
    """``sigma`` as k-diffusion's samplers count it, ComfyUI's SIGMAS too: sigma / alpha, and a flow model's own."""
    return sigma.double() if isinstance(schedule, FlowSchedule) else sigma.double() / schedule.alpha(sigma)


def initial_noise_scale(schedule: NoiseSchedule, sigma: Tensor) -> float:
    """What k-diffusion's samplers, ComfyUI's too, begin with at the level ``sigma``: the standard deviation of its
    noise, in units of sqrt(alpha^2 + sigma^2).

    They begin with x = sigma noise, and at the schedule's noisiest level (ComfyUI's "max denoise") with unit noise.
    """
    noisiest = k_sigma(schedule, torch.tensor(schedule.sigma_max, dtype=torch.float64))
    # an expert's noisiest level is one of the whole schedule's
    if not isinstance(schedule, FlowSchedule) and float(k_sigma(schedule, sigma)) >= float(noisiest) * (1 - 1e-5):
        return 1.0
    return float(sigma / (schedule.alpha(sigma) ** 2 + sigma**2).sqrt())


def add_noise(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x = alpha(sigma) x0 + sigma noise, for x0 and noise [B, ...] and sigma [B]."""
    return expand(schedule.alpha(sigma), x0) * x0 + expand(sigma, x0) * noise


def range_end(schedule: NoiseSchedule) -> float:
    """The level that a network's answers lead to: 0, the picture, or the least level of one of several experts."""
    return schedule.sigma_min if isinstance(schedule, FlowSchedule) else 0.0


def of_size(schedule: NoiseSchedule, shape: Sequence[int]) -> NoiseSchedule:
    """``schedule`` for latents of ``shape`` [..., h, w]; the same where the size of a picture does not matter."""
    if not isinstance(schedule, FlowSchedule) or schedule.by_steps is None:
        return schedule
    return replace(schedule, by_steps=schedule.by_steps.of(shape[-2] * shape[-1]))


def unstretched(schedule: NoiseSchedule) -> NoiseSchedule:
    """``schedule`` whose equal steps end where they lead: a few-step student has no step to spare near the end."""
    return replace(schedule, terminal=0.0) if isinstance(schedule, FlowSchedule) else schedule


@dataclass(frozen=True)
class VPSchedule:
    """Variance-preserving, with T discrete training times: alpha^2 + sigma^2 = 1 (DDPM, arXiv:2006.11239, Eq. 4).

    ``alphas_cumprod`` [T], float64, falling; a last entry of 0 is zero-terminal SNR (arXiv:2305.08891).
    The network's own time is an index 0 .. T - 1; between two indices the angle atan2(sigma, alpha) is interpolated,
    which stays finite at zero-terminal SNR.
    """

    alphas_cumprod: Tensor
    sigma_min: float = field(init=False)
    sigma_max: float = field(init=False)

    def __post_init__(self) -> None:
        abar = self.alphas_cumprod.detach().cpu().double()
        object.__setattr__(self, "alphas_cumprod", abar)
        object.__setattr__(self, "_sigmas", (1 - abar).sqrt())
        object.__setattr__(self, "_angles", torch.atan2((1 - abar).sqrt(), abar.sqrt()))
        object.__setattr__(self, "sigma_min", float((1 - abar[0]).sqrt()))
        object.__setattr__(self, "sigma_max", float((1 - abar[-1]).sqrt()))

    @classmethod
    def from_betas(cls, betas: Tensor, *, zero_terminal: bool = False) -> VPSchedule:
        """From any betas [T] in (0, 1). ``zero_terminal`` rescales them as arXiv:2305.08891, Algorithm 1."""
        abar = torch.cumprod(1 - betas.double(), 0)
        if zero_terminal:
            root = abar.sqrt()
            abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return cls(abar)

    @classmethod
    def scaled_linear(
        cls, start: float = 0.00085, end: float = 0.012, times: int = 1000, *, zero_terminal: bool = False
    ) -> VPSchedule:
        """Stable Diffusion's: square roots of beta linear from sqrt(start) to sqrt(end)."""
        betas = torch.linspace(math.sqrt(start), math.sqrt(end), times, dtype=torch.float64) ** 2
        return cls.from_betas(betas, zero_terminal=zero_terminal)

    @property
    def times(self) -> int:
        """T, the number of training times."""
        return len(self.alphas_cumprod)

    def alpha(self, sigma: Tensor) -> Tensor:
        return (1 - sigma.double() ** 2).clamp_min(0).sqrt()

    def sigma_of_time(self, time: Tensor) -> Tensor:
        table: Tensor = self._angles.to(time.device)  # type: ignore[attr-defined]
        time = time.double().clamp(0, self.times - 1)
        low = time.floor().long()
        high = (low + 1).clamp_max(self.times - 1)
        return torch.sin(torch.lerp(table[low], table[high], time - low))

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest trained index, by the angle: networks are told the times they were trained at."""
        angles: Tensor = self._angles.to(sigma.device)  # type: ignore[attr-defined]
        angle = torch.atan2(sigma.double(), self.alpha(sigma))
        high = torch.searchsorted(angles, angle.contiguous()).clamp(1, self.times - 1)
        nearer_low = angle - angles[high - 1] <= angles[high] - angle
        return torch.where(nearer_low, high - 1, high).double()

    def sigma_at(self, share: Tensor) -> Tensor:
        """On a trained time: index round(share (T - 1))."""
        return self.sigma_of_time((share.double() * (self.times - 1)).round())

    def share_of(self, sigma: Tensor) -> Tensor:
        return self.time_of_sigma(sigma) / (self.times - 1)

    def sigma_of_log_snr(self, log_snr: Tensor) -> Tensor:
        # sigma^2 = 1 / (1 + e^(2 lambda))
        return torch.sigmoid(-2 * log_snr.double()).sqrt()

    def trailing(self, steps: int) -> Tensor:
        """999, 749, 499, 249 for 4 of 1000 steps (arXiv:2305.08891, table 2)."""
        return torch.arange(steps, 0, -1, dtype=torch.float64).mul(self.times / steps).round() - 1


@dataclass(frozen=True)
class FlowSchedule:
    """Rectified flow: alpha = 1 - sigma, sigma in [0, 1] (arXiv:2209.03003); the network is told ``multiplier`` sigma.

    ``shift`` moves equal steps towards noise: sigma = s u / (1 + (s - 1) u) (SD3, arXiv:2403.03206, Eq. 23).
    by_steps: that of a base whose equal steps are moved by as much as their number says, and the picture's tokens.
    terminal: where the last of its equal steps begins, to which all are stretched; 0 where they are not.
    sigma_min, sigma_max: of one of several experts the levels that it answers for; equal steps and shares of its time
    are then of these.
    """

    shift: float = 1.0
    multiplier: float = 1000.0
    sigma_min: float = 0.0
    sigma_max: float = 1.0
    by_steps: StepsShift | SizeShift | None = None
    terminal: float = 0.0

    def alpha(self, sigma: Tensor) -> Tensor:
        return 1 - sigma.double()

    def sigma_of_time(self, time: Tensor) -> Tensor:
        return time.double() / self.multiplier

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        return sigma.double() * self.multiplier

    def sigma_at(self, share: Tensor) -> Tensor:
        low, high = self._unshifted(self.sigma_min), self._unshifted(self.sigma_max)
        share = low + (high - low) * share.double()
        return self.shift * share / (1 + (self.shift - 1) * share)

    def share_of(self, sigma: Tensor) -> Tensor:
        low, high = self._unshifted(self.sigma_min), self._unshifted(self.sigma_max)
        return (self._unshifted(sigma.double()) - low) / (high - low)

    def _unshifted(self, sigma: Any) -> Any:
        # u = sigma / (s - (s - 1) sigma)
        return sigma / (self.shift - (self.shift - 1) * sigma)

    def sigma_of_log_snr(self, log_snr: Tensor) -> Tensor:
        # (1 - sigma) / sigma = e^lambda
        return torch.sigmoid(-log_snr.double())

    def trailing(self, steps: int) -> Tensor:
        moved = self if self.by_steps is None else replace(self, shift=self.by_steps(steps))
        sigma = moved.sigma_at(torch.arange(steps, 0, -1, dtype=torch.float64) / steps)
        if self.terminal and steps > 1:
            # 1 - (1 - sigma) (1 - terminal) / (1 - last): diffusers' stretch_shift_to_terminal
            sigma = 1 - (1 - sigma) * (1 - self.terminal) / (1 - sigma[-1])
        return self.time_of_sigma(sigma)


@dataclass(frozen=True)
class VESchedule:
    """Variance-exploding: alpha = 1. Equal steps follow Karras et al. (arXiv:2206.00364), Eq. 5; time is log(sigma)
    / 4."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def alpha(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma.double())

    def sigma_of_time(self, time: Tensor) -> Tensor:
        return torch.exp(4 * time.double())

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        return torch.log(sigma.double()) / 4

    def sigma_at(self, share: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + share.double() * (high - low)) ** self.rho

    def share_of(self, sigma: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (sigma.double() ** (1 / self.rho) - low) / (high - low)

    def sigma_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-log_snr.double())

    def trailing(self, steps: int) -> Tensor:
        return self.time_of_sigma(self.sigma_at(torch.arange(steps, 0, -1, dtype=torch.float64) / steps))
