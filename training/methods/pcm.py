"""Phased consistency (arXiv:2405.18407): a phase for each of the student's steps, whose every time leads to the phase's
end. With one phase it is lcm without its skip scalings."""

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
from .trajectory import PhaseEnd, TeacherSteps, TwoTimes

NULL_RATE = 0.1
"""Of a student that is drawn with guidance: the share of samples on which it learns the null condition."""


@dataclass(frozen=True)
class PcmSettings(ConsistencySettings):
    """And whether guidance is learnt or left to the drawing."""

    guided_solver: bool = setting(
        True,
        "Whether the solver's steps are guided. Off: the student learns the plain trajectories and the null condition, "
        "and is drawn with the run's guidance, two forwards a step: negative prompts go on working.",
    )


def solver(setup: Setup) -> TeacherSteps:
    return solver_of(setup) if setup.settings.own.guided_solver else TeacherSteps(1.0, 1.0)


def plan(setup: Setup) -> Plan:
    """d(J(x_t, t -> s), sg J(x_r, r -> s)), s the end of the phase (Eq. 4 and 7)."""
    pictures, solve, own = pictures_of(setup), solver(setup), setup.settings.own
    times = replace(grid_of(setup), end=PhaseEnd(setup.recipe.steps))
    objective = TwoTimes(times, solve, distance_of(setup.settings))
    nulls = 0.0 if own.guided_solver else NULL_RATE
    return consistency(setup, lambda along: objective, 1 + solve.cost(1), pictures, pictures.fresh, nulls)


def recipe(host: Host, settings: Settings) -> Recipe:
    found = deterministic(host, settings)
    plain = not settings.own.guided_solver and host.denoiser.guidance == "cfg"
    return replace(found, guidance=settings.guidance) if plain else found


METHOD = Method(
    name="pcm",
    title="Phased consistency: each step's times lead to the step's end",
    paper="arXiv:2405.18407",
    forwards="5.6 + the picture",
    plan=plan,
    settings=PcmSettings,
    recipe=recipe,
    check=check_consistency,
)
