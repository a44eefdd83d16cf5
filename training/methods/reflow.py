"""Rectified flow from the teacher's own couplings, then its distillation (InstaFlow, arXiv:2309.06380): the first makes
the way from noise to picture straight, the second asks for its end in the student's own steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data.pairs import Pairs
from ..engine.batch import Batch
from ..engine.setup import Setup
from ..engine.student import STUDENT
from ..engine.turns import Loss, Phase, Plan, Turn, learning, on_data
from ..settings import NoSettings, setting
from .method import Method
from .rectified import Chord, Straight, straight_of
from .regression import Regression
from .trajectory import square


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

    def reflow(batch: Batch, share: float, update: int) -> Mapping[str, Any]:
        drawn, pair = pairs.draw(batch, update)
        value = first(drawn, pair, update / max(1, straighten))
        (share * value).backward()
        return {"reflow": value.detach() / torch.Size(drawn.shape).numel()}

    regress: Loss = on_data(pairs.draw, partial(Regression(setup.recipe), setup.denoise), "regression")
    stages = [(settings.method, straighten, reflow), ("distil", last, regress)]
    made = learning(settings), pairs.blocks, pairs.solve_cost
    rate = settings.learning_rate
    return Plan([STUDENT], [Phase(name, count, [Turn(STUDENT, loss, rate)], *made) for name, count, loss in stages])


METHOD = Method(
    name="reflow",
    title="Straight trajectories from the teacher's pairs, then their ends",
    paper="arXiv:2309.06380, arXiv:2209.03003",
    forwards="2.6 + the pair",
    plan=lambda setup: in_two_stages(setup, Reflow(setup, straight_of(setup, square))),
    settings=ReflowSettings,
)
