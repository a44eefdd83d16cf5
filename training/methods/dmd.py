"""DMD (arXiv:2311.18828), as DMD2's data-free form (arXiv:2405.14867): matching without pairs and without a
discriminator."""

from __future__ import annotations

from ..settings import Settings
from .alternating import alternating
from .distribution_matching import DistributionMatching, DmdWeight
from .matching_settings import MatchingSettings, check_matching, guidance_at, levels_at
from .method import Method


def dmd(settings: Settings, along: float = 0.0) -> DistributionMatching:
    """Teacher at guidance k, critic at 1; the weight 1 / mean |x - D_real^k|; t ~ U[0.02, 0.98]. along: how far the
    matching has come, 0 to 1."""
    own = settings.own
    levels = levels_at(own, along)
    return DistributionMatching(
        guidance=guidance_at(own, along),
        matching=own.matching_weight,
        levels=levels,
        guidance_levels=levels if own.separate_levels else None,
        weight=DmdWeight(own.normaliser_floor),
        rescale=own.guidance_rescale,
    )


METHOD = Method(
    name="dmd",
    title="Distribution matching distillation, data-free",
    paper="arXiv:2311.18828, arXiv:2405.14867",
    forwards="8.2 + 3.6 a critic update",
    plan=lambda setup: alternating(setup, dmd),
    settings=MatchingSettings,
    check=check_matching,
)
