"""VSD (arXiv:2305.16213) on a generator, as SwiftBrush (arXiv:2312.05239): teacher and critic under the same
guidance."""

from __future__ import annotations

from torch import Tensor

from ...core.schedule import NoiseSchedule
from ..engine.levels import at, vsd_weight
from ..settings import Settings
from .alternating import alternating
from .distribution_matching import DistributionMatching, Scores
from .matching_settings import MatchingSettings, check_matching, guidance_at, levels_at
from .method import Method


def _weight(schedule: NoiseSchedule, scores: Scores) -> Tensor:
    return at(vsd_weight, schedule, scores.sigma)


def vsd(settings: Settings, along: float = 0.0) -> DistributionMatching:
    """Weight 1 / (e^lambda + e^-lambda), the same k on both sides, the critic taught the null condition one time in
    ten. along: how far the matching has come, 0 to 1."""
    own = settings.own
    levels, k = levels_at(own, along), guidance_at(own, along)
    return DistributionMatching(
        guidance=k,
        critic_guidance=k,
        matching=own.matching_weight,
        levels=levels,
        guidance_levels=levels if own.separate_levels else None,
        weight=_weight,
        # with it also before and after the moment that a falling k is 1
        null_rate=0.1 if k != 1 or own.guidance_schedule == "falling" else 0.0,
        rescale=own.guidance_rescale,
    )


METHOD = Method(
    name="vsd",
    title="Variational score distillation of a generator",
    paper="arXiv:2305.16213, arXiv:2312.05239",
    forwards="9.3 + 3.6 a critic update",
    plan=lambda setup: alternating(setup, vsd),
    settings=MatchingSettings,
    check=check_matching,
)
