"""Piecewise rectified flow (PeRFlow, arXiv:2405.07510): a window of time for each of the student's steps, and within it
the straight line from a noisy picture to where the teacher leads it by the window's end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.batch import Batch
from ..engine.setup import Setup
from ..engine.student import STUDENT
from ..engine.turns import Plan, on_data, one_phase, with_nulls
from ..settings import setting
from .consistency import (
    ConsistencySettings,
    GuidedSettings,
    as_guided,
    check_consistency,
    distance_of,
    null_rate,
    pictures_of,
    solver_of,
)
from .method import Method
from .rectified import Chord, noise_share, straight_of, straightened
from .trajectory import Grid, Noised, Span, TeacherSteps


@dataclass(frozen=True)
class PerflowSettings(GuidedSettings, ConsistencySettings):
    """The windows are the student's steps."""

    solver_steps: int = setting(8, "Steps of the teacher's solver through one window, each update anew.", 1, 100)
    distance: str = setting(
        "l2",
        "How two velocities are compared: huber = about by the sum of their differences, l2 = by the square.",
        choices=("huber", "l2"),
    )


@dataclass(frozen=True)
class Windows:
    """grid: whose levels are each window's, in as many ``parts``. solve: the teacher."""

    setup: Setup
    grid: Grid
    solve: TeacherSteps

    def __call__(self, batch: Batch, x0: Tensor) -> Chord:
        """From x0 [B, C, h, w], noised to a window's beginning, to where the teacher's steps end in it."""
        denoise, levels = self.setup.denoise, self.grid.levels(self.setup.denoise.schedule)
        window = (batch.uniform("window") * self.setup.recipe.steps).floor().long()
        path = torch.stack([levels[window * self.grid.parts + step] for step in range(self.grid.parts + 1)])
        start = Noised(x0, batch.normal("window noise"), batch.uniform("window"))
        span = Span(path, path[-1])
        with torch.no_grad():
            end = self.solve(denoise, batch, start, span)
        schedule = denoise.schedule
        high = straightened(schedule, start.at(schedule, span.t), span.t)
        low = straightened(schedule, end, span.r)
        return Chord(high, low, noise_share(schedule, span.t), noise_share(schedule, span.r))


def plan(setup: Setup) -> Plan:
    """d(v_student(y_tau), (y_1 - y_0) / (tau_1 - tau_0)) (Eq. 6)."""
    settings, solve, pictures = setup.settings, solver_of(setup), pictures_of(setup)
    parts = settings.own.solver_steps
    windows = Windows(setup, Grid(setup.recipe, parts), solve)
    straight = straight_of(setup, distance_of(settings))

    def value(batch: Batch, x0: Tensor) -> Tensor:
        return straight(setup.denoise, batch, windows(batch, x0))

    loss = on_data(with_nulls(pictures.draw, null_rate(settings), "window null"), value, "straight")
    return one_phase(STUDENT, loss, settings, *pictures.fresh, beside=solve.cost(parts))


METHOD = Method(
    name="perflow",
    title="Straight lines in a window for each step",
    paper="arXiv:2405.07510",
    forwards="18.6 + the picture",
    plan=plan,
    settings=PerflowSettings,
    recipe=as_guided,
    check=check_consistency,
)
