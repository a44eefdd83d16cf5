"""Trajectory consistency distillation (arXiv:2402.19159): from any time of a trajectory the student leads to any later
one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...core.recipe import Recipe
from ..engine.setup import Setup
from ..engine.turns import Plan
from ..host import Host
from ..settings import Settings, setting
from .consistency import (
    ConsistencySettings,
    check_consistency,
    consistency,
    deterministic,
    distance_of,
    grid_of,
    pictures_of,
    solver_of,
)
from .method import Method
from .trajectory import TwoTimes, anywhere_below


@dataclass(frozen=True)
class TcdSettings(ConsistencySettings):
    """And how it is drawn."""

    eta: float = setting(
        0.3,
        "Share of each step's way that is noised anew as the student draws (gamma in the paper): 0 = none, which is "
        "DDIM; more suits more steps.",
        0,
        1,
    )


def plan(setup: Setup) -> Plan:
    """d(J(x_t, t -> s), sg J(x_r, r -> s)), s anywhere from r down (Eq. 14)."""
    pictures, solve = pictures_of(setup), solver_of(setup)
    times = replace(grid_of(setup), end=anywhere_below)
    objective = TwoTimes(times, solve, distance_of(setup.settings))
    return consistency(setup, lambda along: objective, 1 + solve.cost(1), pictures, pictures.fresh)


def recipe(host: Host, settings: Settings) -> Recipe:
    """Strategic stochastic sampling (Algorithm 2)."""
    found = deterministic(host, settings)
    return replace(found, eta=settings.own.eta) if found.steps > 1 else found


METHOD = Method(
    name="tcd",
    title="Trajectory consistency: any time of a trajectory leads to any later one",
    paper="arXiv:2402.19159",
    forwards="5.6 + the picture",
    plan=plan,
    settings=TcdSettings,
    recipe=recipe,
    check=check_consistency,
)
