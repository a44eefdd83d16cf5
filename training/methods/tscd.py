"""Trajectory segmented consistency (Hyper-SD, arXiv:2404.13686): phased consistency whose segments grow over the run,
8, 4, 2, then 1, so that one LoRA draws in each of these numbers of steps. With one segment it is lcm without skip
scalings, by the square. Hyper-SD's score stage is a run of its own: dmd with this LoRA as initial_lora."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ...core.errors import OneStepError
from ..engine.inputs import recipe_of
from ..engine.setup import Setup
from ..engine.turns import Plan
from ..host import Host
from ..settings import Settings, setting
from .consistency import (
    Check,
    Objective,
    check_consistency,
    consistency,
    deterministic,
    distance_of,
    grid_of,
    pictures_of,
    solver_of,
)
from .dcm import DcmSettings
from .method import Method
from .trajectory import Distance, Grid, PhaseEnd, Solver, TwoTimes

MOST = 64


@dataclass(frozen=True)
class TscdSettings(DcmSettings):
    """And the segments."""

    segments: str = setting("8,4,2,1", "Segments of the trajectory in each stage of the run, fewer and fewer.")

    def check(self, run: Settings) -> None:
        super().check(run)
        stages(self.segments)


def stages(told: str) -> list[int]:
    """Segments of each stage. Raises OneStepError for a text that is none, or whose numbers do not divide."""
    try:
        found = [int(part) for part in told.split(",")]
    except ValueError:
        found = []
    in_range = bool(found) and all(1 <= count <= MOST for count in found)
    if not in_range or any(earlier % later for earlier, later in pairwise(found)):
        raise OneStepError(
            f"segments is {told[:60]!r}: it must be whole numbers up to {MOST}, each a divisor of the one before, like "
            "8,4,2,1"
        )
    return found


def check_stages(check: Check) -> Check:
    """``check``, and that each of the student's steps ends in the phase in which it begins."""

    def checked(host: Host, settings: Settings) -> None:
        told, steps = settings.own.segments, recipe_of(host, settings).steps
        last = stages(told)[-1] if told else steps
        if steps % last:
            raise OneStepError(
                f"segments {told} ends with {last}, which a student of {steps} "
                f"step{'s' * (steps > 1)} does not keep to: set student_steps to a multiple of {last}, or let segments "
                f"end with a divisor of {steps}"
            )
        check(host, settings)

    return checked


def in_stages(counts: Sequence[int], grid: Grid, solve: Solver, distance: Distance) -> Objective:
    """Phases as many as ``counts`` says, in stages of as many updates."""
    each = [TwoTimes(replace(grid, end=PhaseEnd(count)), solve, distance) for count in counts]
    return lambda along: each[min(int(along * len(each)), len(each) - 1)]


def plan(setup: Setup) -> Plan:
    """|J(x_t, t -> s) - sg J(x_r, r -> s)|^2, s the end of the segment (Eq. 4)."""
    pictures, solve = pictures_of(setup), solver_of(setup)
    counts = stages(setup.settings.own.segments)
    objective = in_stages(counts, grid_of(setup, counts[0]), solve, distance_of(setup.settings))
    return consistency(setup, objective, 1 + solve.cost(1), pictures, pictures.fresh)


METHOD = Method(
    name="tscd",
    title="Segmented consistency: 8, 4, 2, 1 segments, one LoRA for all",
    paper="arXiv:2404.13686",
    forwards="5.6 + the picture",
    plan=plan,
    settings=TscdSettings,
    recipe=deterministic,
    check=check_stages(check_consistency),
)
