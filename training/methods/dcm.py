"""Discrete consistency without a tangent, as rCM has it beside its continuous form (arXiv:2510.08431): the teacher's
Euler steps, the plain square."""

from __future__ import annotations

from ..engine.setup import Setup
from ..engine.turns import Plan
from .consistency import (
    SquareSettings,
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


def plan(setup: Setup) -> Plan:
    """|D(x_t) - sg D(x_r)|^2."""
    pictures, solve = pictures_of(setup), solver_of(setup)
    objective = TwoTimes(grid_of(setup), solve, distance_of(setup.settings))
    return consistency(setup, lambda along: objective, 1 + solve.cost(1), pictures, pictures.fresh)


METHOD = Method(
    name="dcm",
    title="Discrete consistency by the plain square",
    paper="arXiv:2510.08431",
    forwards="5.6 + the picture",
    plan=plan,
    settings=SquareSettings,
    check=of_whole_range(check_consistency),
)
