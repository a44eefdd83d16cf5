"""Trajectory segmented consistency (Hyper-SD, arXiv:2404.13686): phased consistency whose segments grow over the run,
8, 4, 2, then 1, so that one LoRA draws in each of these numbers of steps. With one segment it is lcm without skip
scalings, by the square. Hyper-SD's score stage is a run of its own: dmd with this LoRA as initial_lora."""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.setup import Setup
from ..engine.turns import Plan
from ..settings import Settings, setting
from .consistency import (
    SquareSettings,
    check_consistency,
    consistency,
    deterministic,
    distance_of,
    grid_of,
    pictures_of,
    solver_of,
)
from .method import Method
from .segments import check_stages, in_stages, stages


@dataclass(frozen=True)
class TscdSettings(SquareSettings):
    """And the segments."""

    segments: str = setting("8,4,2,1", "Segments of the trajectory in each stage of the run, fewer and fewer.")

    def check(self, run: Settings) -> None:
        super().check(run)
        stages(self.segments)


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
