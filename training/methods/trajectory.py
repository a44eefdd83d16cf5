r"""Two times on one trajectory: the one training step of every consistency method.

    L = w d( J(x_t, t -> s; D),  sg J(x_r, r -> s; D) ),   t > r >= s;   where r = s, x_r itself is the target

x_t and x_r lie on one trajectory: the teacher's steps lead from t to r, or both have the same noise. J is the jump of
DDIM and Euler (`core.sampling.jump`), so that with s = 0 it is the network's x0. LCM asks for the picture (s = 0), TCD
for any later level, PCM for the end of x_t's phase. The target is the student's own answer, without a graph: with
adapters there is no second network to hold (LCM-LoRA, arXiv:2311.05556).
A method is a choice of the plug-ins below; `consistency` makes its run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ...core.continuous import continuous
from ...core.denoiser import Denoiser, guided
from ...core.recipe import Recipe
from ...core.roles import TEACHER
from ...core.sampling import jump
from ...core.schedule import NoiseSchedule, add_noise, cast_as, expand, range_end
from ..engine.batch import Batch
from ..engine.student import STUDENT
from .regression import pseudo_huber


@dataclass(frozen=True)
class Span:
    """B trips along a trajectory. path: [k + 1, B] levels that the solver goes through, from t to r. s: [B], where both
    answers lead. float64 sigmas, falling; 0 is the picture."""

    path: Tensor
    s: Tensor

    @property
    def t(self) -> Tensor:
        return self.path[0]

    @property
    def r(self) -> Tensor:
        return self.path[-1]


class Start(Protocol):
    """Where B trajectories are looked at. u: [B] in [0, 1), by which their time is chosen."""

    @property
    def u(self) -> Tensor: ...

    def at(self, schedule: NoiseSchedule, sigma: Tensor) -> Tensor:
        """x [B, ...] at ``sigma`` [B]."""
        ...


@dataclass(frozen=True)
class Noised:
    """x = alpha x0 + sigma n: pictures x0 with noise n, both [B, ...]."""

    x0: Tensor
    noise: Tensor
    u: Tensor

    def at(self, schedule: NoiseSchedule, sigma: Tensor) -> Tensor:
        return add_noise(schedule, self.x0, self.noise, sigma)


Times = Callable[[NoiseSchedule, Batch, Tensor], Span]
"""(schedule, batch, u [B]) -> its trips."""
Solver = Callable[[Denoiser, Batch, Start, Span], Tensor]
"""x_r [B, ...], without a graph."""
Distance = Callable[[Tensor, Tensor], Tensor]
"""(answer, target), [B, ...] each -> [B], a sum over a sample's elements."""
Weight = Callable[[NoiseSchedule, Span], Tensor]
"""w [B]."""
Answer = Callable[[NoiseSchedule, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(schedule, x, D, sigma, s) -> where a network's D leads from x at sigma, at s."""


def alike(schedule: NoiseSchedule, span: Span) -> Tensor:
    """1: every trip counts alike."""
    return torch.ones_like(span.s)


@dataclass(frozen=True)
class TwoTimes:
    """times: of a batch. solve: from x_t to x_r. answer: J, or what a method has in its place. between: whether the
    network is told the very time of a level, where a discrete one is told the nearest that it was trained at: times
    that lie closer than these would be one."""

    times: Times
    solve: Solver
    distance: Distance
    weight: Weight = alike
    answer: Answer = jump
    between: bool = False

    def __call__(self, denoise: Denoiser, batch: Batch, start: Start) -> Tensor:
        """w d(J_t, sg J_r), a mean over samples."""
        denoise = continuous(denoise) if self.between else denoise
        schedule = denoise.schedule
        span = self.times(schedule, batch, start.u)
        with torch.no_grad():
            x_r = self.solve(denoise, batch, start, span)
            target = x_r
            if bool((span.r > span.s).any()):
                target = self._led(denoise, batch, x_r, span.r, span.s)
            # r = s: nothing is left to jump, and at sigma 0 J has no direction
            target = torch.where(expand(span.r > span.s, x_r) > 0, target, x_r)
        answer = self._led(denoise, batch, start.at(schedule, span.t), span.t, span.s)
        distance = self.distance(answer, target)
        return (cast_as(self.weight(schedule, span), distance) * distance).mean()

    def _led(self, denoise: Denoiser, batch: Batch, x: Tensor, sigma: Tensor, s: Tensor) -> Tensor:
        """J(x, sigma -> s; D) of the student."""
        with denoise.roles.use(STUDENT):
            return self.answer(denoise.schedule, x, denoise(x, sigma, batch.cond), sigma, s)


# -- times ------------------------------------------------------------------------------------------------------------

End = Callable[[Batch, Tensor, Tensor, int], Tensor]
"""(batch, the indices [B] of t and of r, the last index) -> that of s [B], beyond which r does not go."""


def to_the_picture(batch: Batch, at: Tensor, after: Tensor, last: int) -> Tensor:
    """s = 0 (LCM, arXiv:2310.04378, Eq. 9)."""
    return torch.full_like(at, last)


def anywhere_below(batch: Batch, at: Tensor, after: Tensor, last: int) -> Tensor:
    """s uniform among the levels from r down (TCD, arXiv:2402.19159, Eq. 14)."""
    return after + (batch.uniform("trajectory end") * (last + 1 - after)).floor().long()


@dataclass(frozen=True)
class PhaseEnd:
    """The end of the phase in which x_t lies, of ``phases`` of as many levels each (PCM, arXiv:2405.18407, Eq. 4)."""

    phases: int

    def __call__(self, batch: Batch, at: Tensor, after: Tensor, last: int) -> Tensor:
        length = last // self.phases
        return (at // length + 1) * length


@dataclass(frozen=True)
class Grid:
    """Times on a solver's levels: t is any of them, or each ``every``-th, r lies ``stride`` below it, s where ``end``
    says.

    Each step of the ``recipe`` is cut into ``parts``, equal in the network's time and at times that it was trained at:
    so every level that the student is drawn at is one of them.
    """

    recipe: Recipe
    parts: int
    end: End = to_the_picture
    stride: int = 1
    every: int = 1

    def levels(self, schedule: NoiseSchedule) -> Tensor:
        """[steps parts + 1], noisiest first; the last is 0 for the picture, or where an expert's range ends."""
        end = torch.tensor(range_end(schedule), dtype=torch.float64)
        last = float(schedule.time_of_sigma(end)) if end else 0.0
        times = torch.tensor([*self.recipe.timesteps, last], dtype=torch.float64)
        share = torch.arange(self.parts, dtype=torch.float64) / self.parts
        cut = torch.lerp(times[:-1, None], times[1:, None], share).flatten()
        trained = schedule.sigma_of_time(schedule.time_of_sigma(schedule.sigma_of_time(cut)))
        return torch.cat([trained, end[None]])

    def __call__(self, schedule: NoiseSchedule, batch: Batch, u: Tensor) -> Span:
        levels = self.levels(schedule)
        last = len(levels) - 1
        at = self.every * (u * (last // self.every)).floor().long()
        after = (at + self.stride).clamp_max(last)
        end = self.end(batch, at, after, last)
        path = torch.stack([torch.minimum(at + step, torch.minimum(after, end)) for step in range(self.stride + 1)])
        return Span(levels[path], levels[end])


# -- from t to r ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TeacherSteps:
    """The teacher's own steps along the path, each under one guidance w ~ U[low, high] of its sample: the augmented
    trajectory of LCM (arXiv:2310.04378, Eq. 17) with D_w = D_u + w (D_c - D_u). eta: of the noise that each step has
    anew (DDIM, arXiv:2010.02502, Eq. 16); 0 is the probability-flow ODE. role: who takes them."""

    low: float
    high: float
    eta: float = 0.0
    role: str = TEACHER

    def __call__(self, denoise: Denoiser, batch: Batch, start: Start, span: Span) -> Tensor:
        schedule, x = denoise.schedule, start.at(denoise.schedule, span.t)
        w = self.low + (self.high - self.low) * batch.uniform("trajectory guidance") if self.apart else self.low
        with denoise.roles.use(self.role):
            for step, (sigma, lower) in enumerate(pairwise(span.path)):
                x0 = guided(denoise, x, sigma, batch.cond, batch.nulls(), w)
                draw = partial(batch.normal, f"solver {step}")
                moved = noisy_jump(schedule, x, x0, sigma, lower, self.eta, draw)
                # a path that is at its end stays there
                x = torch.where(expand(lower < sigma, x) > 0, moved, x)
        return x

    @property
    def apart(self) -> bool:
        """Whether samples differ in their guidance."""
        return self.low != self.high

    def cost(self, stride: int) -> float:
        """Forwards of a sample."""
        return stride * (2.0 if self.apart or self.low != 1 else 1.0)


def noisy_jump(
    schedule: NoiseSchedule, x: Tensor, x0: Tensor, sigma: Tensor, lower: Tensor, eta: float, draw: Callable[[], Tensor]
) -> Tensor:
    """alpha_r D + sqrt(sigma_r^2 - c^2) n_t + c z, c = eta sigma_r sqrt(1 - (alpha_t sigma_r / (alpha_r sigma_t))^2)
    (arXiv:2010.02502, Eq. 12 and 16); J at eta 0."""
    if eta == 0:
        return jump(schedule, x, x0, sigma, lower)
    ratio = schedule.alpha(sigma) * lower / (schedule.alpha(lower) * sigma)
    c = eta * lower * (1 - ratio**2).clamp_min(0).sqrt()
    noise = (x - expand(schedule.alpha(sigma), x) * x0) / expand(sigma, x)
    kept = (lower.double() ** 2 - c**2).clamp_min(0).sqrt()
    return expand(schedule.alpha(lower), x) * x0 + expand(kept, x) * noise + expand(c, x) * draw()


def same_noise(denoise: Denoiser, batch: Batch, start: Start, span: Span) -> Tensor:
    """x_r of the same picture and noise: consistency training, without a teacher (arXiv:2303.01469, Eq. 10)."""
    return start.at(denoise.schedule, span.r)


# -- distances --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Huber:
    """sum sqrt((a - b)^2 + c^2) - c over a sample's elements (LCM's and PCM's; arXiv:2310.04378, app. C)."""

    c: float

    def __call__(self, answer: Tensor, target: Tensor) -> Tensor:
        return pseudo_huber(answer, target, self.c).flatten(1).sum(1)


def square(answer: Tensor, target: Tensor) -> Tensor:
    """|a - b|^2."""
    return (answer - target).square().flatten(1).sum(1)


@dataclass(frozen=True)
class WholeHuber:
    """sqrt(|a - b|^2 + c^2) - c of the whole sample of d elements, c = ``width`` sqrt(d) (iCT, arXiv:2310.14189,
    Eq. 7, whose width is 0.00054)."""

    width: float

    def __call__(self, answer: Tensor, target: Tensor) -> Tensor:
        c = self.width * answer[0].numel() ** 0.5
        return torch.sqrt(square(answer, target) + c**2) - c
