"""VSD (arXiv:2305.16213) on a generator, as SwiftBrush (arXiv:2312.05239): teacher and critic under the same
guidance."""

from __future__ import annotations

from torch import Tensor

from ...core.schedule import NoiseSchedule
from ..engine.levels import UniformTime, at, vsd_weight
from ..settings import Settings
from .distribution_matching import DistributionMatching, Scores


def _weight(schedule: NoiseSchedule, scores: Scores, k: float) -> Tensor:
    return at(vsd_weight, schedule, scores.sigma)


def vsd(settings: Settings) -> DistributionMatching:
    """Weight 1 / (e^lambda + e^-lambda), the same k on both sides, the critic taught the null condition one time in
    ten."""
    levels = UniformTime(settings.level_low, settings.level_high)
    return DistributionMatching(
        guidance=settings.matching_guidance,
        critic_guidance=settings.matching_guidance,
        matching=settings.matching_weight,
        levels=levels,
        guidance_levels=levels if settings.separate_levels else None,
        weight=_weight,
        null_rate=0.1 if settings.matching_guidance != 1 else 0.0,
    )
