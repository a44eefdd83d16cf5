"""DisBack (arXiv:2408.15991): dmd whose teacher comes back to the base step by step, from what the untrained student
draws, so that it is never far from the student. Its authors record 24,000 updates of a critic of full weights; here a
snapshot is its LoRA."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...core.errors import OneStepError
from ..engine.setup import Setup
from ..engine.turns import Plan
from ..settings import Settings, setting
from .alternating import alternating
from .degradation import Degradation, teacher_at
from .distribution_matching import DistributionMatching
from .dmd import dmd
from .matching_settings import MatchingSettings, check_matching
from .method import Method


@dataclass(frozen=True)
class DisbackSettings(MatchingSettings):
    """dmd's, with the way back."""

    critic_warm_up: int = setting(
        200, "Updates of the critic alone, in which its snapshots are taken, before the student learns.", 0, 1_000_000
    )
    snapshots: int = setting(
        5, "Snapshots of the critic on its way to the untrained student, kept in the run's folder.", 1, 64
    )
    backtrack: float = setting(
        0.5, "Share of the matching's updates in which the teacher goes back through them to the base; 0 = dmd.", 0, 1
    )

    def check(self, run: Settings) -> None:
        MatchingSettings.check(self, run)
        if self.backtrack and 0 < self.critic_warm_up < self.snapshots:
            raise OneStepError(
                f"{self.snapshots} snapshots of the critic cannot be taken in critic_warm_up {self.critic_warm_up}: "
                "set it to as many updates at least (some hundred are usual), or snapshots lower"
            )
        if self.backtrack and self.critic_start == "donor":
            raise OneStepError(
                "disback goes back from the untrained student to the base, and critic_start donor begins elsewhere: "
                "set critic_start to base, or choose method dmd"
            )


def share_back(settings: Settings) -> float:
    """Of the matching's updates, those in which the teacher is a snapshot: none where none was taken."""
    own = settings.own
    return float(own.backtrack) if own.critic_warm_up and settings.steps else 0.0


def disback(settings: Settings, along: float = 0.0) -> DistributionMatching:
    """dmd with the teacher of the time. along: how far the matching has come, 0 to 1."""
    return replace(dmd(settings, along), teacher=teacher_at(along, share_back(settings)))


def plan(setup: Setup) -> Plan:
    """dmd's, and the way back."""
    made, own, share = alternating(setup, disback), setup.settings.own, share_back(setup.settings)
    if not share:
        return made
    roles, folder, steps = setup.denoise.roles, setup.folder / "degradation", setup.settings.steps
    way = Degradation(roles, folder, own.snapshots, own.warm_start, own.critic_warm_up, steps, share, made.turns)
    return way.along(made)


def note(settings: Settings) -> str:
    if share_back(settings):
        return ""
    return "no snapshots of the critic are taken or used (critic_warm_up or backtrack is 0): disback is dmd"


METHOD = Method(
    name="disback",
    title="Distribution matching by a teacher that comes back from the untrained student",
    paper="arXiv:2408.15991",
    forwards="8.4 + 3.6 a critic update",
    plan=plan,
    settings=DisbackSettings,
    check=check_matching,
    note=note,
)
