"""The settings of the methods with a critic, and what they need of a base."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.errors import OneStepError
from ..host import Host
from ..settings import Settings, setting


@dataclass(frozen=True)
class MatchingSettings:
    """Of the methods with a critic."""

    matching_guidance: float = setting(1.75, "Teacher's guidance in the guidance term; 1 = none.", 0, 30)
    matching_weight: float = setting(
        1.0, "Weight of the matching term; the guidance term has weight guidance - 1.", 0, 100
    )
    warm_start: int = setting(
        300, "Updates of regression on the teacher's pairs before the matching; 0 = none.", 0, 1_000_000
    )
    warm_start_rate: float = setting(5e-4, "Student's step size in the warm start.", 0, 1)
    anchor: float = setting(
        0.25, "Weight of regression on the teacher's pairs beside the matching; keeps composition.", 0, 100
    )
    critic_start: str = setting(
        "base", "What the critic begins as: the base, or the donor, the initial LoRA.", choices=("base", "donor")
    )
    critic_rank: int = setting(0, "Rank of the critic's adapters; 0 = the student's.", 0, 512)
    critic_learning_rate: float = setting(4e-4, "Critic's step size; 2 to 4 times the student's.", 0, 1)
    critic_warm_up: int = setting(50, "Updates of the critic alone, before the student follows it.", 0, 1_000_000)
    critic_updates: int = setting(3, "Updates of the critic for each of the student's.", 1, 100)
    follow: float = setting(0.0, "After each update the critic moves this share towards the student (IDA).", 0, 1)
    separate_levels: bool = setting(False, "Draw the guidance term's noise level apart from the matching term's.")
    level_low: float = setting(0.02, "Least noise level, as a share of the model's time.", 0, 1)
    level_high: float = setting(0.98, "Greatest noise level, as a share of the model's time.", 0, 1)

    def check(self, run: Settings) -> None:
        if self.level_low >= self.level_high:
            raise OneStepError(f"level_low {self.level_low} must be below level_high {self.level_high}")
        if self.follow and self.critic_rank not in (0, run.rank):
            raise OneStepError(
                f"follow {self.follow} needs a critic of the student's rank {run.rank}, not {self.critic_rank}: "
                "set critic_rank to 0"
            )
        if run.steps + self.warm_start == 0:
            raise OneStepError("steps and warm_start are both 0: nothing would be trained; give steps at least 1")


def check_matching(host: Host, settings: Settings) -> None:
    """Raises OneStepError where the base has no null condition for the guidance that is asked for, and where the critic
    has no donor to begin as."""
    if host.denoiser.guidance != "cfg" and settings.own.matching_guidance != 1:
        raise OneStepError(
            f"{host.name} has no trained null condition, so matching_guidance {settings.own.matching_guidance:g} "
            "cannot be had: set it to 1"
        )
    if settings.own.critic_start == "donor" and not settings.initial_lora:
        raise OneStepError(
            "the critic is to begin as the donor (as preset Adapt has it), and there is none: set initial_lora to a "
            "few-step LoRA, or choose another preset"
        )
    if settings.own.critic_start == "donor" and settings.own.critic_rank not in (0, settings.rank):
        raise OneStepError(
            f"a critic that begins as the donor has the run's rank {settings.rank}: set critic_rank to 0"
        )
