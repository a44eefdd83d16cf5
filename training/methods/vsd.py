"""VSD (arXiv:2305.16213) on a generator, as SwiftBrush (arXiv:2312.05239): teacher and critic under the same
guidance."""

from __future__ import annotations

from torch import Tensor

from ...core.schedule import NoiseSchedule
from ..engine.levels import UniformTime, at, vsd_weight
from ..settings import Settings
from .distribution_matching import DistributionMatching, Scores, alternating
from .matching_settings import MatchingSettings, check_matching
from .method import Method


def _weight(schedule: NoiseSchedule, scores: Scores, k: float) -> Tensor:
    return at(vsd_weight, schedule, scores.sigma)


def vsd(settings: Settings) -> DistributionMatching:
    """Weight 1 / (e^lambda + e^-lambda), the same k on both sides, the critic taught the null condition one time in
    ten."""
    own = settings.own
    levels = UniformTime(own.level_low, own.level_high)
    return DistributionMatching(
        guidance=own.matching_guidance,
        critic_guidance=own.matching_guidance,
        matching=own.matching_weight,
        levels=levels,
        guidance_levels=levels if own.separate_levels else None,
        weight=_weight,
        null_rate=0.1 if own.matching_guidance != 1 else 0.0,
    )


METHOD = Method(
    name="vsd",
    title="Variational score distillation of a generator",
    paper="arXiv:2305.16213, arXiv:2312.05239",
    forwards="7 + 4 a critic update",
    plan=lambda setup: alternating(setup, vsd(setup.settings)),
    settings=MatchingSettings,
    check=check_matching,
)
