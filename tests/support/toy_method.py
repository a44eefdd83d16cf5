"""A method as a stranger adds one: this file, copied into the methods package's path, and nothing else.

The student is to answer what the teacher does, scaled: D(x, sigma, c) = s D_teacher(x, sigma, c), on noise of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from onestep.core.denoiser import Denoiser
from onestep.core.roles import TEACHER
from onestep.training.engine.batch import Batch
from onestep.training.engine.setup import Setup
from onestep.training.engine.student import STUDENT
from onestep.training.engine.turns import Plan, on_data, one_phase
from onestep.training.methods.method import Method
from onestep.training.settings import Settings, need_steps, setting


@dataclass(frozen=True)
class ToySettings:
    """Its one setting."""

    loudness: float = setting(1.5, "What the student's answer is, in units of its teacher's.", 0, 10)

    def check(self, run: Settings) -> None:
        need_steps(run)


def draw(batch: Batch, update: int) -> tuple[Batch, Tensor]:
    return batch, batch.normal("toy noise")


def loss(denoise: Denoiser, loudness: float, batch: Batch, x: Tensor) -> Tensor:
    """|D(x, sigma, c) - s D_teacher(x, sigma, c)|^2."""
    sigma = denoise.schedule.sigma_at(batch.uniform("toy level").clamp(0.1, 0.9))
    with torch.no_grad(), denoise.roles.use(TEACHER):
        target = loudness * denoise(x, sigma, batch.cond)
    with denoise.roles.use(STUDENT):
        return (denoise(x, sigma, batch.cond) - target).square().flatten(1).sum(1).mean()


def plan(setup: Setup) -> Plan:
    toy = partial(loss, setup.denoise, setup.settings.own.loudness)
    return one_phase(STUDENT, on_data(draw, toy), setup.settings)


METHOD = Method("toy", "A louder teacher", "none", "4", plan, ToySettings)
