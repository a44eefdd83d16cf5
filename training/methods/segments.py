"""Phases of a trajectory that become fewer over the run, as tscd and mlcm share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from ...core.errors import OneStepError
from ..engine.inputs import recipe_of
from ..host import Host
from ..settings import Settings
from .consistency import Check, Objective
from .trajectory import Distance, Grid, PhaseEnd, Solver, TwoTimes

MOST = 64


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
