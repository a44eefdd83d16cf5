"""A side as small as one can be, and a method that trains it: what a run does with them, not what they are good for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from onestep.core.adapter_module import Call
from onestep.core.denoiser import Denoiser
from onestep.core.roles import TEACHER
from onestep.training.engine.batch import Batch
from onestep.training.engine.setup import Setup
from onestep.training.engine.student import STUDENT
from onestep.training.engine.turns import Plan, on_data, one_phase
from onestep.training.methods.method import Method

AT = "conv_in"


@dataclass(frozen=True)
class Width:
    width: int = 8


class Shift(nn.Module):
    """Adds a learnt vector, scaled by a buffer, to what the first convolution gives."""

    kind = "shift"

    def __init__(self, config: Width) -> None:
        super().__init__()
        self.config = config
        self.before, self.after = frozenset[str](), frozenset({AT})
        self.by = nn.Parameter(torch.zeros(config.width))
        self.register_buffer("scale", torch.linspace(1, 2, config.width))

    @classmethod
    def from_config(cls, **config: Any) -> Shift:
        return cls(Width(**config))

    def on_input(self, name: str, x: Tensor, call: Call) -> Tensor:
        return x

    def on_output(self, name: str, x: Tensor, output: Tensor, call: Call) -> Tensor:
        return output + (self.by * self.scale)[:, None, None].to(output)


def louder_loss(denoise: Denoiser, batch: Batch, data: Tensor) -> Tensor:
    """The student is to answer 1.5 times what its teacher does, on noise of its own."""
    sigma = denoise.schedule.sigma_at(torch.full((len(batch),), 0.5, dtype=torch.float64))
    with torch.no_grad(), denoise.roles.use(TEACHER):
        target = 1.5 * denoise(data, sigma, batch.cond)
    with denoise.roles.use(STUDENT):
        return (denoise(data, sigma, batch.cond) - target).square().flatten(1).sum(1).mean()


def louder_draw(batch: Batch, update: int) -> tuple[Batch, Tensor]:
    return batch, batch.normal(f"louder {update}")


def louder(setup: Setup) -> Plan:
    return one_phase(STUDENT, on_data(louder_draw, partial(louder_loss, setup.denoise)), setup.settings)


BY_FACTORS = Method("regression", "Louder", "", "4", louder)
BY_ADAPTER = Method("regression", "Louder", "", "4", louder, adapter=lambda host, settings: Shift(Width()))
