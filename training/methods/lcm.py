"""Latent consistency distillation as a LoRA (arXiv:2310.04378, arXiv:2311.05556): from any time of a trajectory the
student answers with its end."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.schedule import NoiseSchedule, expand
from ..engine.setup import Setup
from ..engine.turns import Plan
from .consistency import (
    ConsistencySettings,
    check_consistency,
    consistency,
    distance_of,
    grid_of,
    of_whole_range,
    pictures_of,
    solver_of,
)
from .method import Method
from .trajectory import TwoTimes

DATA, TIMES = 0.5, 10.0
"""sigma_data of the skip scalings, and by what a time 0 to 999 is multiplied in them: diffusers' and the authors'."""


def with_skip(schedule: NoiseSchedule, x: Tensor, x0: Tensor, sigma: Tensor, s: Tensor) -> Tensor:
    """f = c_skip x + c_out D,  c_skip = d^2 / (t^2 + d^2),  c_out = t / sqrt(t^2 + d^2) (arXiv:2310.04378, Eq. 8, with
    the picture's boundary at time 0)."""
    t = TIMES * 999 * schedule.share_of(sigma)
    c_skip, c_out = DATA**2 / (t**2 + DATA**2), t / torch.sqrt(t**2 + DATA**2)
    return expand(c_skip, x) * x + expand(c_out, x) * x0


def plan(setup: Setup) -> Plan:
    """d(f(x_t), sg f(x_r)), r the solver's next level below t."""
    pictures, solve = pictures_of(setup), solver_of(setup)
    objective = TwoTimes(grid_of(setup), solve, distance_of(setup.settings), answer=with_skip)
    return consistency(setup, lambda along: objective, 1 + solve.cost(1), pictures, pictures.fresh)


METHOD = Method(
    name="lcm",
    title="Latent consistency: any time of a trajectory leads to its picture",
    paper="arXiv:2310.04378, arXiv:2311.05556",
    forwards="5.6 + the picture",
    plan=plan,
    settings=ConsistencySettings,
    check=of_whole_range(check_consistency),
)
