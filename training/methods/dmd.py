"""DMD (arXiv:2311.18828), as DMD2's data-free form (arXiv:2405.14867): matching without pairs and without a
discriminator."""

from __future__ import annotations

from ..engine.levels import UniformTime
from ..settings import Settings
from .distribution_matching import DistributionMatching, alternating, dmd_weight
from .matching_settings import MatchingSettings, check_matching
from .method import Method


def dmd(settings: Settings) -> DistributionMatching:
    """Teacher at guidance k, critic at 1; the weight 1 / mean |x - D_real^k|; t ~ U[0.02, 0.98]."""
    own = settings.own
    levels = UniformTime(own.level_low, own.level_high)
    return DistributionMatching(
        guidance=own.matching_guidance,
        matching=own.matching_weight,
        levels=levels,
        guidance_levels=levels if own.separate_levels else None,
        weight=dmd_weight,
    )


METHOD = Method(
    name="dmd",
    title="Distribution matching distillation, data-free",
    paper="arXiv:2311.18828, arXiv:2405.14867",
    forwards="6 + 4 a critic update",
    plan=lambda setup: alternating(setup, dmd(setup.settings)),
    settings=MatchingSettings,
    check=check_matching,
)
