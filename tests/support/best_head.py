"""The Gaussian world's best discriminator: the log ratio of what the teacher draws and what another role draws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from oracles import CASES, TAU, Array, World
from torch import Tensor, nn

from onestep.core.cond import Cond
from onestep.core.features import Features
from onestep.core.targets import Target

THREE = [CASES[0], CASES[2], CASES[4]]
"""eps, v and flow."""


class BestHead(nn.Module):
    """H* = log N(x_s; a m_r, V) - log N(x_s; a m_f, V) of the world's answers, real the teacher's pictures, fake those
    of ``fake``: x_s is found in the answer, which is linear in it. scale: H = scale H*."""

    def __init__(self, world: World, fake: str = "student", scale: float = 1.0) -> None:
        super().__init__()
        case, self.scale = world.case, nn.Parameter(torch.tensor(scale, dtype=torch.float64))
        self.alpha, self.sigma, self.answers = case.alpha, case.sigma, case.answers
        self.variance = case.alpha**2 * TAU**2 + case.sigma**2
        self.real, self.fake = (torch.from_numpy(world.mean(role, world.cond)) for role in ("teacher", fake))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        (answer,) = features
        repeat = len(answer) // len(self.real)
        real, fake = self.real.repeat(repeat, 1), self.fake.repeat(repeat, 1)
        a, s, v = self.alpha, self.sigma, self.variance
        # the answer of each parameterisation is p (x_s - a m) + q m
        p, q = {
            "eps": (s / v, 0.0),
            "v": (a * s / v - s * a * TAU**2 / v, -s),
            "flow": (s / v - a * TAU**2 / v, -1.0),
        }[self.answers]
        x_s = (answer.flatten(1) - q * real) / p + a * real
        apart = (x_s - a * fake).square().sum(1) - (x_s - a * real).square().sum(1)
        return [self.scale * apart[:, None] / (2 * v)]


def looking_at(world: World) -> Features:
    """The whole network as the one block that is looked at: what it gives is its answer."""
    return Features({"mid_block.resnets.0.mean": Target("mean", world.network.mean)}, [world.network], 1)


def best(world: World, x_s: Array, cond: Cond | None = None, fake: str = "student") -> Array:
    """H* [B] in NumPy."""
    cond = world.cond if cond is None else cond
    a, v = world.case.alpha, world.case.alpha**2 * TAU**2 + world.case.sigma**2
    real, other = (a * world.mean(role, cond) for role in ("teacher", fake))
    return (np.square(x_s - other).sum(1) - np.square(x_s - real).sum(1)) / (2 * v)
