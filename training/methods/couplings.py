"""Rectified flows on the teacher's own couplings, as reflow, rfpp and slimflow share them: straight lines from a noise
to what the teacher made of it, then regression on their ends in the student's own steps (InstaFlow,
arXiv:2309.06380)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..data.pairs import Pairs
from ..engine.batch import Batch
from ..engine.setup import Setup
from ..engine.student import STUDENT
from ..engine.turns import Phase, Plan, Turn, learning, on_data, on_data_at
from ..settings import NoSettings, setting
from .rectified import Chord, Straight
from .regression import Regression


@dataclass(frozen=True)
class ReflowSettings(NoSettings):
    """How its two stages share the run."""

    distil_share: float = setting(
        0.5,
        "Share of the updates, the last, in which the straightened student learns the ends of the teacher's "
        "trajectories at its own steps; 0 = none.",
        0,
        1,
    )


Noise = Callable[[Batch, Tensor, float], Tensor]
"""(batch, z [B, ...], how far the stage has come, 0 to 1) -> the noise that the picture is coupled with."""


def coupled(batch: Batch, z: Tensor, along: float) -> Tensor:
    """The one that the teacher drew it from."""
    return z


@dataclass(frozen=True)
class Reflow:
    """The first stage. noise: what a picture is coupled with."""

    setup: Setup
    straight: Straight
    noise: Noise = coupled

    def __call__(self, batch: Batch, pair: tuple[Tensor, Tensor], along: float) -> Tensor:
        """d(v_student(y_tau), z - x_T), y_tau = (1 - tau) x_T + tau z (Eq. 3)."""
        z, x = pair
        zero, one = torch.zeros(2, len(batch), dtype=torch.float64) + torch.tensor([[0.0], [1.0]])
        chord = Chord(self.noise(batch, z, along), x, one, zero)
        return self.straight(self.setup.denoise, batch, chord)


def in_two_stages(setup: Setup, first: Reflow) -> Plan:
    """Updates of ``first``, then of regression on the same pairs."""
    settings = setup.settings
    pairs = Pairs(setup.host, setup.prompts, settings, setup.folder / "pairs")
    last = round(settings.own.distil_share * settings.steps)
    straighten = settings.steps - last

    def value(batch: Batch, pair: tuple[Tensor, Tensor], update: int) -> Tensor:
        return first(batch, pair, update / max(1, straighten))

    reflow = on_data_at(pairs.draw, value, "reflow")
    regress = on_data(pairs.draw, partial(Regression(setup.recipe), setup.denoise), "regression")
    stages = [(settings.method, straighten, reflow), ("distil", last, regress)]
    made = learning(settings), pairs.blocks, pairs.solve_cost
    rate = settings.learning_rate
    return Plan([STUDENT], [Phase(name, count, [Turn(STUDENT, loss, rate)], *made) for name, count, loss in stages])
