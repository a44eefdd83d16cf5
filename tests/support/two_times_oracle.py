"""What a student of two times answers in the Gaussian world, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from oracles import Array, World
from trajectory_oracle import ratios

from onestep.core.schedule import FlowSchedule


def answer(world: World, role: str, y: Array, tau: Array, r: Array, cond: Any) -> Array:
    """(y - D) / tau, the network told t - r / 2: in the Gaussian world a told level is another posterior's. Where r is
    negative it is told -(t - |r| / 2)."""
    sigma, lower, sign = levels(world, tau), levels(world, np.abs(r)), np.where(r < 0, -1.0, 1.0)
    alpha = ratios(world, sigma)
    x = (alpha + sigma) * y
    told = torch.from_numpy(sign * (times(world, sigma) - times(world, lower) / 2)).flatten()
    at = world.schedule.sigma_of_time(told).numpy()[:, None]
    # what the network predicts at the told level, read as a prediction at the true one
    d = world.x0(role, x, cond, ratios(world, at), at)
    return (y - reread(world, x, d, (ratios(world, at), at), (alpha, sigma))) / tau


def levels(world: World, tau: Array) -> Array:
    if isinstance(world.schedule, FlowSchedule):
        return tau
    return tau / np.hypot(tau, 1 - tau)


def times(world: World, sigma: Array) -> Array:
    """The network's time at a level, between two indices too; 0 at the picture."""
    schedule = world.schedule
    if isinstance(schedule, FlowSchedule):
        return sigma * schedule.multiplier
    table = schedule.sigma_of_time(torch.arange(1000, dtype=torch.float64)).numpy()
    angles = np.arctan2(table, np.sqrt(np.maximum(1 - table**2, 0)))
    return np.interp(np.arctan2(sigma, np.sqrt(np.maximum(1 - sigma**2, 0))), angles, np.arange(1000.0))


def reread(world: World, x: Array, d: Array, told: tuple[Array, Array], at: tuple[Array, Array]) -> Array:
    """x0 from the prediction that a network makes of x with the answer ``d`` at the told (alpha, sigma)."""
    (alpha, sigma), kind = told, world.case.answers
    noise = (x - alpha * d) / sigma
    if kind == "eps":
        return (x - at[1] * noise) / at[0]
    if kind == "v":
        # v = alpha n - sigma x0; x0 = alpha x - sigma v
        return at[0] * x - at[1] * (alpha * noise - sigma * d)
    return x - at[1] * (noise - d)
