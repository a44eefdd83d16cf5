"""Annealing reflow (SlimFlow, arXiv:2407.12718): a picture is coupled at first with any noise, as the base was trained,
and more and more with the one that the teacher drew it from. The paper's smaller student is a network that a base does
not have: here the student is the base with its LoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..engine.batch import Batch
from ..engine.setup import Setup
from ..engine.turns import Plan
from ..settings import setting
from .couplings import Reflow, ReflowSettings, in_two_stages
from .method import Method
from .rectified import straight_of
from .trajectory import square


@dataclass(frozen=True)
class SlimflowSettings(ReflowSettings):
    """And the annealing."""

    annealing: float = setting(
        0.5, "Share of the first stage over which pictures come to be coupled with the teacher's own noise.", 0, 1
    )


@dataclass(frozen=True)
class Annealed:
    """z' = sqrt(1 - b^2) z + b n, b from 1 to 0 over ``share`` of the stage (Eq. 5)."""

    share: float

    def __call__(self, batch: Batch, z: Tensor, along: float) -> Tensor:
        b = max(0.0, 1 - along / self.share) if self.share else 0.0
        return math.sqrt(1 - b * b) * z + b * batch.normal("annealed noise") if b else z


def plan(setup: Setup) -> Plan:
    """|v_student - (z' - x_T)|^2."""
    noise = Annealed(setup.settings.own.annealing)
    return in_two_stages(setup, Reflow(setup, straight_of(setup, square), noise))


METHOD = Method(
    name="slimflow",
    title="Reflow that begins as the base was trained",
    paper="arXiv:2407.12718",
    forwards="2.6 + the pair",
    plan=plan,
    settings=SlimflowSettings,
)
