r"""Straight lines between two states: the one training step of rectified flows.

    y = x / (alpha + sigma),   tau = sigma / (alpha + sigma):   y = (1 - tau) x0 + tau n  on every schedule
    y_tau on the line from y_1 at tau_1 down to y_0 at tau_0,   v = (y_1 - y_0) / (tau_1 - tau_0)
    L = w d( v_student(y_tau) - v ),   v_student = (y_tau - D) / tau

In y any model is a flow whose path is straight (arXiv:2209.03003), so that a noise-predicting network is rectified as
it stands, without another parameterisation; J is a straight step in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.denoiser import Denoiser
from ...core.schedule import NoiseSchedule, expand, range_end
from ..engine.batch import Batch
from ..engine.setup import Setup
from ..engine.student import STUDENT
from .trajectory import Distance

LEAST = 1e-3
"""tau, the least that is looked at: at 0 there is no velocity to answer."""


def noise_share(schedule: NoiseSchedule, sigma: Tensor) -> Tensor:
    """tau = sigma / (alpha + sigma)."""
    return sigma / (schedule.alpha(sigma) + sigma)


def level_of(schedule: NoiseSchedule, tau: Tensor) -> Tensor:
    """sigma at ``tau`` = sigma / (alpha + sigma) in [0, 1]."""
    inside = tau.clamp(1e-9, 1 - 1e-12)
    # lambda = ln((1 - tau) / tau)
    sigma = schedule.sigma_of_log_snr(torch.log1p(-inside) - torch.log(inside))
    return torch.where(tau > 0, sigma, torch.zeros_like(sigma))


def trained_level_of(schedule: NoiseSchedule, tau: Tensor) -> Tensor:
    """The same, at the nearest time that the network was trained at."""
    return schedule.sigma_of_time(schedule.time_of_sigma(level_of(schedule, tau)))


def straightened(schedule: NoiseSchedule, x: Tensor, sigma: Tensor) -> Tensor:
    """y = x / (alpha + sigma)."""
    return x / expand(schedule.alpha(sigma) + sigma, x)


@dataclass(frozen=True)
class Chord:
    """A line for each of B samples, in y. high, low: its ends [B, C, h, w]; tau_high, tau_low: [B], where they are."""

    high: Tensor
    low: Tensor
    tau_high: Tensor
    tau_low: Tensor

    @property
    def velocity(self) -> Tensor:
        """v [B, C, h, w]."""
        return (self.high - self.low) / expand(self.tau_high - self.tau_low, self.high)

    def at(self, tau: Tensor) -> Tensor:
        """y at ``tau`` [B]."""
        return self.low + expand(tau - self.tau_low, self.low) * self.velocity


Share = Callable[[Tensor], Tensor]
"""u [B] uniform in [0, 1) -> the share of the way from the chord's low end to its high one."""


def uniformly(u: Tensor) -> Tensor:
    return u


@dataclass(frozen=True)
class Straight:
    """distance: between velocities. highest: the greatest tau that is looked at, the student's first. share: where on a
    chord it looks."""

    distance: Distance
    highest: float
    share: Share = uniformly

    def __call__(self, denoise: Denoiser, batch: Batch, chord: Chord) -> Tensor:
        """d(v_student, v), a mean over samples."""
        schedule = denoise.schedule
        # of a flow model tau is sigma
        least = max(LEAST, range_end(schedule))
        low, high = chord.tau_low.clamp_min(least), chord.tau_high.clamp_max(self.highest)
        sigma = trained_level_of(schedule, torch.lerp(low, high, self.share(batch.uniform("chord"))))
        tau = noise_share(schedule, sigma)
        y = chord.at(tau)
        with denoise.roles.use(STUDENT):
            x0 = denoise(expand(schedule.alpha(sigma) + sigma, y) * y, sigma, batch.cond)
        velocity = (y - x0) / expand(tau, y)
        return self.distance(velocity, chord.velocity).mean()


def straight_of(setup: Setup, distance: Distance, share: Share = uniformly) -> Straight:
    """Up to the student's first level."""
    schedule = setup.denoise.schedule
    return Straight(distance, float(noise_share(schedule, setup.recipe.levels(schedule)[0])), share)
