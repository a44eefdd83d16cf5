r"""Phased DMD (arXiv:2510.27684) for students of several steps, a LoRA for each: the noise range falls into phases that
end at s_1 > s_2 > ... > s_K = 0, and phase k, learnt to its end before the next, leads from x_{s_{k-1}} to x_{s_k}.

    x_t = (a_t / a_s) x_s + b_{t|s} n,   b_{t|s}^2 = b_t^2 - (a_t b_s / a_s)^2,   t in [s, 1]
    critic:   E b_{t|s}^2 |score_F(x_t) + n / b_{t|s}|^2,   score = (a_t D - x_t) / b_t^2

From x_s to x_t it is known what was added, so that the critic's target is exact whatever the student's x_s is, which
is more than can be said of its x0. In the last phase s = 0, and it is dmd with a critic that learns the noise. The
critic goes on from one phase to the next.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ...core.errors import OneStepError
from ...core.recipe import Recipe
from ...core.schedule import NoiseSchedule, expand
from ..engine.inputs import recipe_of
from ..engine.levels import WEIGHTS
from ..engine.setup import Setup
from ..engine.student import STUDENT, Drawn
from ..engine.turns import Plan
from ..host import Host
from ..settings import Settings, setting
from .alternating import Extras, alternating
from .distribution_matching import DistributionMatching
from .dmd import dmd
from .matching_settings import (
    ApartSettings,
    CourseSettings,
    CriticSettings,
    Fitting,
    GuidanceSettings,
    LevelSettings,
    PairSettings,
    PictureSettings,
    WeightSettings,
    check_matching,
)
from .method import Method
from .sub_interval import FromStepEnd, SubInterval


@dataclass(frozen=True)
class Conditional:
    """How far the critic's answer is from the exact target, at the scale of an error in x0 at s = 0.

    kernel: from x_s to x_t.
    """

    kernel: FromStepEnd

    def __call__(self, schedule: NoiseSchedule, answer: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """(b_{t|s} (D - x_s / a_s) + (a_t b_s^2 / a_s^2) n) / b_t, for D, n [B, ...] and b_t = ``sigma`` [B]: b_t / a_t
        times the root of the loss above, finite also at a_t = 0 and at t = s."""
        lower, a_s, a_t = self.kernel.lower, schedule.alpha(self.kernel.lower), schedule.alpha(sigma)
        spread = (sigma.double() ** 2 - (a_t * lower / a_s) ** 2).clamp_min(0).sqrt()
        off = answer - self.kernel.x_mid / expand(a_s, answer)
        return expand(spread / sigma, off) * off + expand(a_t * lower**2 / (a_s**2 * sigma), off) * noise


@dataclass(frozen=True)
class InPhase:
    """The levels of a step's phase, all from its end up, and there the exact target."""

    def __call__(self, objective: DistributionMatching, schedule: NoiseSchedule, drawn: Drawn) -> DistributionMatching:
        made = SubInterval(whole=True)(objective, schedule, drawn)
        if not isinstance(made.renoise, FromStepEnd):
            return made
        return replace(made, importance=None, residual=Conditional(made.renoise))


@dataclass(frozen=True)
class PhasedSettings(
    Fitting,
    PictureSettings,
    CourseSettings,
    LevelSettings,
    ApartSettings,
    CriticSettings,
    PairSettings,
    WeightSettings,
    GuidanceSettings,
):
    """dmd's, without what would tie one phase to another. A LoRA for each step is its way."""

    step_loras: ClassVar[bool] = True
    follow: ClassVar[float] = 0.0
    follow_after: ClassVar[str] = STUDENT
    diversity_anchor: ClassVar[float] = 0.0

    critic_weight: str = setting(
        "eps",
        "How the critic's error weighs over noise levels: as an error of the noise (eps), which is the paper's, of v, "
        "of a flow model's velocity, of the picture (x0), or by min(SNR, 5).",
        choices=tuple(WEIGHTS),
    )


def check(host: Host, settings: Settings) -> None:
    """Raises OneStepError as dmd's, for a student of one step, and for fewer updates than there are phases."""
    steps = recipe_of(host, settings).steps
    if steps == 1:
        raise OneStepError(
            "phased-dmd has a phase for each of several steps, and the student has one: set student_steps to 2 to 8, "
            "or choose dmd"
        )
    check_matching(host, settings)
    if settings.steps < steps:
        raise OneStepError(
            f"steps is {settings.steps}, and the student has {steps} phases: give each an update at least"
        )


def plan(setup: Setup) -> Plan:
    return alternating(setup, dmd, Extras(at_step=InPhase(), phased=True))


def recipe(host: Host, settings: Settings) -> Recipe:
    """Deterministic: each phase goes on from where the one before it has ended."""
    return replace(recipe_of(host, settings), renoise=False, eta=0.0)


METHOD = Method(
    name="phased-dmd",
    title="Distribution matching in phases, a LoRA for each step",
    paper="arXiv:2510.27684",
    forwards="8.2 + 3.6 a critic update + the steps before",
    plan=plan,
    settings=PhasedSettings,
    check=check,
    recipe=recipe,
)
