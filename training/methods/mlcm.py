"""Multistep latent consistency (MLCM, arXiv:2406.05768): phased consistency on the states of the teacher's own
trajectories, without pictures, whose phases become fewer over the run. On pictures with fresh noise it is pcm, or with
several stages tscd."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ...core.schedule import NoiseSchedule
from ..data.rollouts import Rollouts
from ..engine.batch import Batch
from ..engine.setup import Setup
from ..engine.turns import Plan
from ..settings import Settings, setting
from .consistency import SolverSettings, check_solver, consistency, deterministic, distance_of, grid_of, solver_of
from .method import Method
from .segments import check_stages, in_stages, stages
from .trajectory import Grid, Start


@dataclass(frozen=True)
class MlcmSettings(SolverSettings):
    """And the phases."""

    segments: str = setting(
        "",
        "Phases of the trajectory in each stage of the run, fewer and fewer, like 8,4; empty = twice the student's "
        "steps, then as many.",
    )
    states: int = setting(4, "States of each of the teacher's trajectories that are kept.", 1, 256)

    def check(self, run: Settings) -> None:
        super().check(run)
        if self.segments:
            stages(self.segments)


@dataclass(frozen=True)
class Seen:
    """States x [B, ...] of trajectories, at the times that ``u`` [B] stands for."""

    x: Tensor
    u: Tensor

    def at(self, schedule: NoiseSchedule, sigma: Tensor) -> Tensor:
        return self.x


@dataclass(frozen=True)
class OnTrajectories:
    """rollouts: on every ``every``-th level of a grid of ``count`` steps."""

    rollouts: Rollouts
    every: int
    count: int

    def __call__(self, batch: Batch, update: int) -> tuple[Batch, Start]:
        drawn, (x, index) = self.rollouts.draw(batch, update)
        # the middle of what u stands for this level
        return replace(drawn, sliced=batch.sliced), Seen(x, (self.every * index.double() + 0.5) / self.count)


def on_trajectories(setup: Setup, grid: Grid, guidance: float) -> OnTrajectories:
    """In about the run's teacher_steps, each of as many of the grid's."""
    settings, levels = setup.settings, grid.levels(setup.denoise.schedule)
    count = len(levels) - 1
    longest = max(1, count // settings.teacher_steps)
    every = max(size for size in range(1, longest + 1) if count % size == 0)
    told = levels[::every], settings.own.states, guidance, setup.recipe.initial_noise_scale
    return OnTrajectories(Rollouts(setup.host, setup.prompts, settings, setup.folder / "rollouts", *told), every, count)


def plan(setup: Setup) -> Plan:
    """d(J(x_t, t -> s), sg J(x_r, r -> s)), s the end of the phase, x_t where the teacher comes by."""
    solve, own = solver_of(setup), setup.settings.own
    steps = setup.recipe.steps
    counts = stages(own.segments) if own.segments else [2 * steps, steps]
    grid = grid_of(setup, counts[0])
    source = on_trajectories(setup, grid, setup.settings.guidance if setup.denoise.guidance == "cfg" else 1.0)
    objective = in_stages(counts, grid, solve, distance_of(setup.settings))
    made = source.rollouts.blocks, source.rollouts.solve_cost
    return consistency(setup, objective, 1 + solve.cost(1), source, made)


METHOD = Method(
    name="mlcm",
    title="Phased consistency on the teacher's own trajectories",
    paper="arXiv:2406.05768",
    forwards="5.6 + the trajectories",
    plan=plan,
    settings=MlcmSettings,
    recipe=deterministic,
    check=check_stages(check_solver),
)
