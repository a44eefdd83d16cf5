"""How an answer changes along a trajectory: by differences of answers, or exactly by dual numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...core.errors import OneStepError
from ...core.memory import is_out_of_memory
from ...core.schedule import expand
from ..settings import NoSettings, Settings, setting

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x [B, ...], t [B]) -> F [B, ...], `wide`."""
Tangent = Callable[[Velocity, Tensor, Tensor, Tensor], Tensor]
"""(velocity, x [B, ...], t [B], dx / dt) -> dF / dt along it."""
Moved = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [B, ...], dx / dt, h [B]) -> where the trajectory is h on."""


def wide(x: Tensor) -> Tensor:
    """``x`` in the widest type of its device: Apple's have no float64."""
    return x.float() if x.device.type == "mps" else x.double()


@dataclass(frozen=True)
class TangentSettings(NoSettings):
    """How changes along a trajectory are measured."""

    tangent_step: float = setting(
        0.01,
        "Step of the differences by which the student's change is measured, as a share of t; below 0.005 what bfloat16 "
        "rounds is larger than what changes.",
        1e-5,
        0.2,
    )
    tangent: str = setting(
        "differences",
        "How the student's change is measured: by differences, which any network has; or forward, exactly, where every "
        "operation has a forward mode, which attention by flash or xformers has not.",
        choices=("differences", "forward"),
    )


@dataclass(frozen=True)
class Differences:
    """dF / dt along the trajectory by central differences: no graph through the network, so that quantised weights,
    recomputation and any attention serve. step: of t, as a share of it. lowest, highest: of t, beyond which nothing is
    asked: there the difference is one-sided."""

    step: float
    lowest: float
    highest: float
    moved: Moved

    def __call__(self, velocity: Velocity, x: Tensor, t: Tensor, dx: Tensor) -> Tensor:
        """(F(x_+, t_+) - F(x_-, t_-)) / (t_+ - t_-), x_+- where the trajectory is at t_+-."""
        h = self.step * t
        above, below = (t + h).clamp_max(self.highest), (t - h).clamp_min(self.lowest)
        ends = [velocity(self.moved(x, dx, at - t), at) for at in (above, below)]
        return (ends[0] - ends[1]) / expand(above - below, x)


def straight_on(x: Tensor, dx: Tensor, h: Tensor) -> Tensor:
    """x + h dx / dt: of straight lines."""
    return x + expand(h, x) * dx


@dataclass
class Forward:
    """The same exactly, where every operation of a network has a forward mode. control: what the first answer is held
    against, as an operation may drop its derivative without a word; in shorter steps too, as a network whose time is an
    index may turn within one."""

    control: Differences
    _held: bool = False

    def __call__(self, velocity: Velocity, x: Tensor, t: Tensor, dx: Tensor) -> Tensor:
        """dF / dt. Raises OneStepError where an operation has none, or loses it."""
        try:
            found = by_forward_mode(velocity, x, t, dx)
        except (NotImplementedError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise OneStepError(
                f"this network has an operation with no forward mode ({str(error).strip()[:100]}): set tangent to "
                "differences"
            ) from None
        if not self._held and not x.is_meta:
            self._hold(found, velocity, x, t, dx)
            self._held = True
        return found

    def _hold(self, found: Tensor, velocity: Velocity, x: Tensor, t: Tensor, dx: Tensor) -> None:
        least = math.inf
        for share in SHARES:
            near = replace(self.control, step=share * self.control.step)(velocity, x, t, dx)
            least = min(least, float((found - near).norm() / near.norm().clamp_min(1e-12)))
            if least < APART:
                return
        raise OneStepError(
            f"an operation of this network loses the derivative ({least:.0%} from that by differences): set tangent to "
            "differences"
        )


APART = 0.1
"""Of forward mode from differences, relative, the most."""
SHARES = 1.0, 0.1, 0.01
"""Of the differences' step, in which they are tried."""


def by_forward_mode(velocity: Velocity, x: Tensor, t: Tensor, dx: Tensor) -> Tensor:
    """The same exactly, by dual numbers through every operation of the network."""
    # the only attention of torch's that has a forward mode
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        answer = velocity(forward_ad.make_dual(x, dx), forward_ad.make_dual(t, torch.ones_like(t)))
        tangent = forward_ad.unpack_dual(answer).tangent
        return torch.zeros_like(x) if tangent is None else tangent.clone()


def tangent_of(settings: Settings, lowest: float, highest: float, moved: Moved) -> Tangent:
    """As the settings have it."""
    near = Differences(settings.own.tangent_step, lowest, highest, moved)
    return Forward(near) if settings.own.tangent == "forward" else near
