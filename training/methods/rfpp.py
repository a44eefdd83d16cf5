"""An improved 2-rectified flow (arXiv:2405.20320): reflow that looks most at both ends of the way, by a distance that
lets few large errors be. Without both it is reflow. Its perceptual distance, which is a network of its own, is not part
of it here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.setup import Setup
from ..engine.turns import Plan
from ..settings import setting
from .couplings import Reflow, ReflowSettings, in_two_stages
from .method import Method
from .rectified import straight_of
from .trajectory import WholeHuber, square


@dataclass(frozen=True)
class RfppSettings(ReflowSettings):
    """And where it looks, and how far two velocities are apart."""

    ends: float = setting(
        4.0, "How much more it looks at the ends of the way than at its middle (a in the paper); 0 = alike.", 0, 20
    )
    distance: str = setting(
        "huber",
        "How two velocities are compared: huber = a sample's error counts by its size, l2 = by its square.",
        choices=("huber", "l2"),
    )
    distance_width: float = setting(
        0.03,
        "Root mean square difference of two velocities below which huber counts squares; the paper's at its 3072 "
        "numbers a picture.",
        1e-6,
        10,
    )


@dataclass(frozen=True)
class TwoEnds:
    """t with density e^(a t) + e^(a (1 - t)) on [0, 1] (sec. 4.1: u-shaped)."""

    a: float

    def __call__(self, u: Tensor) -> Tensor:
        if self.a == 0:
            return u
        # the inverse of P(t) = (1 + sinh(a (t - 1/2)) / sinh(a / 2)) / 2
        return 0.5 + torch.asinh((2 * u - 1) * math.sinh(self.a / 2)) / self.a


def plan(setup: Setup) -> Plan:
    """d(v_student, z - x_T)."""
    own = setup.settings.own
    distance = WholeHuber(own.distance_width) if own.distance == "huber" else square
    return in_two_stages(setup, Reflow(setup, straight_of(setup, distance, TwoEnds(own.ends))))


METHOD = Method(
    name="rfpp",
    title="Reflow that looks most at both ends of the way",
    paper="arXiv:2405.20320",
    forwards="2.6 + the pair",
    plan=plan,
    settings=RfppSettings,
)
