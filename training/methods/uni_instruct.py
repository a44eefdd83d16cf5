"""Uni-Instruct (arXiv:2505.20755): score identity by another f-divergence than the reverse KL, with the ratio of the
densities from a discriminator, as f-distill has it. Its paper trains full weights on 100 million samples and more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from ..data.pairs import Pairs
from ..engine.setup import Setup
from ..engine.student import BackwardSimulation
from ..settings import Settings, setting
from .alternating import Extras, alternating
from .distribution_matching import DistributionMatching, DmdWeight
from .dmd2 import check
from .expanded_divergence import DIVERGENCES, WEIGHTS, expanded
from .head_settings import OneTermHeadSettings, RatioSettings
from .head_turns import HeadTurns, head_turns, ratios_of
from .matching_settings import guidance_at, levels_at
from .method import Method
from .score_identity import ScoreIdentity


@dataclass(frozen=True)
class UniInstructSettings(RatioSettings, OneTermHeadSettings):
    """sid's, the head's, and the divergence."""

    critic_updates: int = setting(1, "Updates of the critic for each of the student's.", 1, 100)
    divergence: str = setting(
        "kl",
        "Which divergence is brought down: kl covers all of the teacher's modes; reverse-kl is sid at alpha 1/2; "
        "jeffreys is both. jensen-shannon and chi-square have a term that grows with the cube of the distance: for a "
        "student that is near already.",
        choices=tuple(DIVERGENCES),
    )


def uni_instruct(settings: Settings, along: float = 0.0) -> DistributionMatching:
    """Without the ratios it is the reverse KL. along: how far the matching has come, 0 to 1."""
    own = settings.own
    return DistributionMatching(
        guidance=guidance_at(own, along),
        levels=levels_at(own, along),
        weight=DmdWeight(own.normaliser_floor),
        rescale=own.guidance_rescale,
        jacobian=ScoreIdentity(0.5),
    )


@dataclass(frozen=True)
class ExpandingHeadTurns(HeadTurns):
    """The ratios weigh each term of the gradient."""

    def weighed(self, objective: DistributionMatching) -> DistributionMatching:
        assert self.ratios is not None
        name = self.setup.settings.own.divergence
        made = super().weighed(objective)
        return replace(made, jacobian=expanded(name, self.ratios, self.setup.denoise))


def expanding(setup: Setup, pairs: Pairs, simulate: BackwardSimulation) -> HeadTurns:
    return ExpandingHeadTurns(**vars(head_turns(setup, pairs, simulate, ratios_of(setup.settings, WEIGHTS))))


METHOD = Method(
    name="uni-instruct",
    title="Score identity by another f-divergence, with a discriminator; for long runs",
    paper="arXiv:2505.20755",
    forwards="17.6 + 3.6 a critic update + 3.1 a head update",
    plan=partial(alternating, objective=uni_instruct, extras=Extras(head=expanding)),
    settings=UniInstructSettings,
    check=check,
)
