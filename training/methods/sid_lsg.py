"""SiD-LSG (arXiv:2406.01561): score identity under long and short guidance, one k on the teacher, on the critic as it
is asked and on the critic as it learns. Its paper trains full weights on 10 million samples and more."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ..settings import Settings, setting
from .alternating import alternating
from .distribution_matching import DistributionMatching, DmdWeight
from .guidance_strategy import LONG_SHORT, STRATEGIES, ScoreIdentitySettings, check_strategy, note_strategy
from .method import Method
from .score_identity import score_identity


@dataclass(frozen=True)
class SidLsgSettings(ScoreIdentitySettings):
    """sid's at alpha 1, guided on both sides."""

    matching_guidance: float = setting(
        2.0, "Guidance of teacher and critic: 1.5 comes nearest to real pictures, 3 to 4.5 obeys prompts most.", 0, 30
    )
    guidance_strategy: str = setting(
        LONG_SHORT,
        "long-short = matching_guidance on the teacher and on the critic, as it learns and as it is asked (LSG); "
        "teacher = on the teacher alone; zero-cfg = none, and the critic never sees a prompt; anti-cfg = none on the "
        "teacher, anti_guidance on the critic.",
        choices=STRATEGIES,
    )


def sid_lsg(settings: Settings, along: float = 0.0) -> DistributionMatching:
    """w = 1 / mean |x - R|. along: how far the matching has come, 0 to 1."""
    return score_identity(settings, along, 1.0, DmdWeight(settings.own.normaliser_floor))


METHOD = Method(
    name="sid-lsg",
    title="Score identity distillation under long and short guidance, data-free; for long runs",
    paper="arXiv:2406.01561",
    forwards="19.7 + 7.3 a critic update",
    plan=partial(alternating, objective=sid_lsg),
    settings=SidLsgSettings,
    check=check_strategy,
    note=note_strategy,
)
