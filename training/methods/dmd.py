"""DMD (arXiv:2311.18828), as DMD2's data-free form (arXiv:2405.14867): matching without pairs and without a
discriminator."""

from __future__ import annotations

from ..engine.levels import UniformTime
from ..settings import Settings
from .distribution_matching import DistributionMatching, dmd_weight


def dmd(settings: Settings) -> DistributionMatching:
    """Teacher at guidance k, critic at 1; the weight 1 / mean |x - D_real^k|; t ~ U[0.02, 0.98]."""
    levels = UniformTime(settings.level_low, settings.level_high)
    return DistributionMatching(
        guidance=settings.matching_guidance,
        matching=settings.matching_weight,
        levels=levels,
        guidance_levels=levels if settings.separate_levels else None,
        weight=dmd_weight,
    )
