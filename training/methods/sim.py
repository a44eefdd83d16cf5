"""SIM, score implicit matching (arXiv:2410.16794): score identity at alpha 1, weighed by the pseudo-Huber distance of
the two answers instead of the student's distance from the teacher's. Its paper trains full weights for days."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ...core.schedule import NoiseSchedule
from ..settings import Settings, setting
from .alternating import alternating
from .distribution_matching import DistributionMatching, Scores
from .guidance_strategy import ScoreIdentitySettings, check_strategy, note_strategy
from .method import Method
from .score_identity import score_identity


@dataclass(frozen=True)
class SimSettings(ScoreIdentitySettings):
    """With the loss's constant."""

    huber: float = setting(
        5.4e-4,
        "The loss's constant c, in units of a picture's root of elements: differences below it weigh as their square.",
        1e-6,
        10,
    )


@dataclass(frozen=True)
class PseudoHuber:
    """1 / sqrt(|R - K|^2 + c^2) [B], c = share sqrt(n) for n elements. A constant of the gradient."""

    share: float

    def __call__(self, schedule: NoiseSchedule, scores: Scores) -> Tensor:
        real, fake = scores.sides
        apart = (real - fake).flatten(1)
        # d'(y) = y / sqrt(|y|^2 + c^2) of d(y) = sqrt(|y|^2 + c^2) - c
        return (apart.square().sum(1) + self.share**2 * apart.shape[1]).rsqrt()


def sim(settings: Settings, along: float = 0.0) -> DistributionMatching:
    """along: how far the matching has come, 0 to 1."""
    return score_identity(settings, along, 1.0, PseudoHuber(settings.own.huber))


METHOD = Method(
    name="sim",
    title="Score implicit matching, data-free; for long runs",
    paper="arXiv:2410.16794",
    forwards="16.2 + 3.6 a critic update",
    plan=partial(alternating, objective=sim),
    settings=SimSettings,
    check=check_strategy,
    note=note_strategy,
)
