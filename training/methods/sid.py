"""SiD (arXiv:2404.04057) for one step, and for several by backward simulation (arXiv:2505.12674): the distance of the
teacher's scores and the student's, with the gradient through both networks. Its paper trains for 10 million samples and
more, full weights; here it is a LoRA, and long runs are what it is for."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import Settings, setting
from .alternating import alternating
from .distribution_matching import DistributionMatching, DmdWeight
from .guidance_strategy import ScoreIdentitySettings, check_strategy, note_strategy
from .method import Method
from .score_identity import score_identity


@dataclass(frozen=True)
class SidSettings(ScoreIdentitySettings):
    """With the loss's alpha."""

    alpha: float = setting(
        1.0,
        "How much of the scores' own distance is taken from the loss: 1 for text to image; 1.2 was the paper's best on "
        "small pictures without guidance.",
        -0.25,
        1.5,
    )


def sid(settings: Settings, along: float = 0.0) -> DistributionMatching:
    """w = 1 / mean |x - R|. along: how far the matching has come, 0 to 1."""
    own = settings.own
    return score_identity(settings, along, own.alpha, DmdWeight(own.normaliser_floor))


METHOD = Method(
    name="sid",
    title="Score identity distillation, data-free; for long runs",
    paper="arXiv:2404.04057, arXiv:2505.12674",
    forwards="16.2 + 3.6 a critic update",
    plan=lambda setup: alternating(setup, sid),
    settings=SidSettings,
    check=check_strategy,
    note=note_strategy,
)
