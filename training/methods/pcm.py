"""Phased consistency (arXiv:2405.18407): a phase for each of the student's steps, whose every time leads to the phase's
end. With one phase it is lcm without its skip scalings."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..engine.setup import Setup
from ..engine.turns import Plan
from .consistency import (
    ConsistencySettings,
    GuidedSettings,
    as_guided,
    check_consistency,
    consistency,
    distance_of,
    grid_of,
    null_rate,
    pictures_of,
    solver_of,
)
from .method import Method
from .trajectory import PhaseEnd, TwoTimes


@dataclass(frozen=True)
class PcmSettings(GuidedSettings, ConsistencySettings):
    """The phases are the student's steps."""


def plan(setup: Setup) -> Plan:
    """d(J(x_t, t -> s), sg J(x_r, r -> s)), s the end of the phase (Eq. 4 and 7)."""
    pictures, solve = pictures_of(setup), solver_of(setup)
    times = replace(grid_of(setup), end=PhaseEnd(setup.recipe.steps))
    objective = TwoTimes(times, solve, distance_of(setup.settings))
    nulls = null_rate(setup.settings)
    return consistency(setup, lambda along: objective, 1 + solve.cost(1), pictures, pictures.fresh, nulls)


METHOD = Method(
    name="pcm",
    title="Phased consistency: each step's times lead to the step's end",
    paper="arXiv:2405.18407",
    forwards="5.6 + the picture",
    plan=plan,
    settings=PcmSettings,
    recipe=as_guided,
    check=check_consistency,
)
