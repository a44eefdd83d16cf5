"""SCott (arXiv:2403.01505): consistency to a stochastic teacher, which takes several steps with fresh noise from one
time to the other. Its discriminator, which needs real pictures, is not part of it here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..engine.setup import Setup
from ..engine.turns import Plan
from ..settings import setting
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


@dataclass(frozen=True)
class ScottSettings(ConsistencySettings):
    """And the teacher's steps."""

    stride: int = setting(3, "Steps that the teacher takes from one time to the other.", 1, 20)
    solver_noise: float = setting(
        0.2, "Share of each of its steps' noise that is new (eta of DDIM): 0 = a deterministic teacher.", 0, 1
    )


def plan(setup: Setup) -> Plan:
    """d(D(x_t), sg D(x_r)), x_r after several of the teacher's stochastic steps (Eq. 7)."""
    own = setup.settings.own
    pictures, solve = pictures_of(setup), solver_of(setup, own.solver_noise)
    times = replace(grid_of(setup), stride=own.stride)
    objective = TwoTimes(times, solve, distance_of(setup.settings))
    return consistency(setup, lambda along: objective, 1 + solve.cost(own.stride), pictures, pictures.fresh)


METHOD = Method(
    name="scott",
    title="Consistency to a stochastic teacher of several steps",
    paper="arXiv:2403.01505",
    forwards="9.6 + the picture",
    plan=plan,
    settings=ScottSettings,
    check=of_whole_range(check_consistency),
)
