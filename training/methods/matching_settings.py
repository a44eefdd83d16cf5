"""The settings of the methods with a critic, and what they need of a base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...core.errors import OneStepError
from ..engine.inputs import recipe_of
from ..engine.levels import WEIGHTS, UniformTime
from ..engine.student import STUDENT
from ..host import Host
from ..settings import Settings, setting
from .distribution_matching import CRITIC
from .guidance_scale import RandomScale, Scale


@dataclass(frozen=True)
class GuidanceSettings:
    """What the teacher is asked for."""

    matching_guidance: float = setting(1.75, "Teacher's guidance in the guidance term; 1 = none.", 0, 30)


@dataclass(frozen=True)
class WeightSettings:
    """Of a loss whose matching and guidance are two terms."""

    matching_weight: float = setting(
        1.0, "Weight of the matching term; the guidance term has weight guidance - 1.", 0, 100
    )


@dataclass(frozen=True)
class PairSettings:
    """Regression on the teacher's pairs."""

    warm_start: int = setting(
        300, "Updates of regression on the teacher's pairs before the matching; 0 = none.", 0, 1_000_000
    )
    warm_start_rate: float = setting(5e-4, "Student's step size in the warm start.", 0, 1)
    anchor: float = setting(
        0.25, "Weight of regression on the teacher's pairs beside the matching; keeps composition.", 0, 100
    )


@dataclass(frozen=True)
class CriticSettings:
    """The critic as it learns."""

    critic_start: str = setting(
        "base", "What the critic begins as: the base, or the donor, the initial LoRA.", choices=("base", "donor")
    )
    critic_rank: int = setting(0, "Rank of the critic's adapters; 0 = the student's.", 0, 512)
    critic_learning_rate: float = setting(4e-4, "Critic's step size; 2 to 4 times the student's.", 0, 1)
    critic_warm_up: int = setting(50, "Updates of the critic alone, before the student follows it.", 0, 1_000_000)
    critic_updates: int = setting(3, "Updates of the critic for each of the student's.", 1, 100)


@dataclass(frozen=True)
class FollowSettings:
    """How near the critic keeps to the student."""

    follow: float = setting(0.0, "After each update the critic moves this share towards the student (IDA).", 0, 1)


@dataclass(frozen=True)
class ApartSettings:
    """Of a loss whose matching and guidance are two terms."""

    separate_levels: bool = setting(False, "Draw the guidance term's noise level apart from the matching term's.")


@dataclass(frozen=True)
class LevelSettings:
    """Where on the noise scale the terms look, and how errors weigh there."""

    level_low: float = setting(0.02, "Least noise level, as a share of the model's time.", 0, 1)
    level_high: float = setting(0.98, "Greatest noise level, as a share of the model's time.", 0, 1)
    critic_weight: str = setting(
        "v",
        "How the critic's error weighs over noise levels: as an error of v, of the noise (eps: DMD2), of a flow "
        "model's velocity, of the picture (x0), or by min(SNR, 5) (TDM).",
        choices=tuple(WEIGHTS),
    )
    matching_scale: str = setting(
        "sum",
        "What max_grad_norm meets: the student's loss as a sum over a picture's elements, larger the larger the "
        "picture, or as their mean, of one size for all (DMD2, FastGen).",
        choices=("sum", "mean"),
    )


@dataclass(frozen=True)
class CourseSettings:
    """What changes in the course of a run, and what keeps the terms within bounds."""

    guidance_schedule: str = setting(
        "constant",
        "Whether matching_guidance stays as it is, is drawn for each sample between it and guidance_end, or goes from "
        "it to guidance_end over the run.",
        choices=("constant", "random", "falling"),
    )
    guidance_end: float = setting(1.0, "The other end of matching_guidance, where it is not constant.", 0, 30)
    guidance_rescale: float = setting(
        0.0,
        "Share of the guided answer brought back to the deviation of the unguided one, against saturation; 0 = none.",
        0,
        1,
    )
    normaliser_floor: float = setting(
        1e-5, "Least size of |x - D| that dmd's weight divides by; 0.05 to 0.1 spares what is almost right.", 1e-5, 10
    )
    level_high_end: float = setting(
        0.0, "Greatest noise level at the end of the run, to which level_high goes; 0 = as level_high.", 0, 1
    )


@dataclass(frozen=True)
class FollowTurnSettings:
    """When the critic follows the student."""

    follow_after: str = setting(
        "student", "After whose updates the critic follows: the student's (IDA) or its own.", choices=(STUDENT, CRITIC)
    )


@dataclass(frozen=True)
class PictureSettings:
    """Whose pictures the critic learns from, and how often the student learns the teacher's."""

    critic_pictures: str = setting(
        "fresh",
        "Whether each update of the critic has new pictures of the student, or those before one student update share "
        "them, with new noise.",
        choices=("fresh", "shared"),
    )
    anchor_every: int = setting(
        1, "Updates from one anchor to the next, which then has that many times the weight.", 1, 1000
    )


@dataclass(frozen=True)
class StepSettings:
    """What holds the first of several steps to the teacher's own way, and a LoRA for each."""

    diversity_anchor: float = setting(
        0.0,
        "Of a student of several steps: weight that holds its first step to the teacher's own way, while the matching "
        "is left to the later ones; keeps the seeds' pictures apart. 0.05 is usual; 0 = none.",
        0,
        100,
    )
    diversity_steps: int = setting(6, "Steps of the teacher through the half of its way that this takes.", 1, 1000)
    step_loras: bool = setting(
        False,
        "A LoRA for each of the student's steps, in as many files: what two steps ask for differs. One-Step nodes and "
        "OneStepPipeline draw with them.",
    )


class Fitting:
    """What of these settings does not go together."""

    def check(self: Any, run: Settings) -> None:
        for name in ("level_high", "level_high_end"):
            high = getattr(self, name) or self.level_high
            if self.level_low >= high:
                raise OneStepError(f"level_low {self.level_low} must be below {name} {high}")
        if self.follow and self.critic_rank not in (0, run.rank):
            raise OneStepError(
                f"follow {self.follow} needs a critic of the student's rank {run.rank}, not {self.critic_rank}: "
                "set critic_rank to 0"
            )
        if self.follow and self.step_loras:
            raise OneStepError(
                f"follow {self.follow} needs one LoRA for the critic to follow: set it, or step_loras, off"
            )
        if run.steps + self.warm_start == 0:
            raise OneStepError("steps and warm_start are both 0: nothing would be trained; give steps at least 1")


@dataclass(frozen=True)
class OneTermSettings(
    Fitting,
    StepSettings,
    PictureSettings,
    FollowTurnSettings,
    CourseSettings,
    LevelSettings,
    FollowSettings,
    CriticSettings,
    PairSettings,
    GuidanceSettings,
):
    """Of the methods with a critic whose loss is one term, guidance within it."""


@dataclass(frozen=True)
class MatchingSettings(
    Fitting,
    StepSettings,
    PictureSettings,
    FollowTurnSettings,
    CourseSettings,
    LevelSettings,
    ApartSettings,
    FollowSettings,
    CriticSettings,
    PairSettings,
    WeightSettings,
    GuidanceSettings,
):
    """Of the methods whose matching and guidance are two terms. The fields are in the order of the classes from the
    last to the first, in which graphs keep their values."""


def guidance_at(own: OneTermSettings | MatchingSettings, along: float) -> Scale:
    """k at ``along`` of the matching, 0 to 1."""
    first, last = own.matching_guidance, own.guidance_end
    if own.guidance_schedule == "random" and first != last:
        return RandomScale(min(first, last), max(first, last))
    # k = k_0 + (k_1 - k_0) t
    return first + (last - first) * along if own.guidance_schedule == "falling" else first


def levels_at(own: OneTermSettings | MatchingSettings, along: float) -> UniformTime:
    """The matching's noise levels at ``along`` of it."""
    end = own.level_high_end or own.level_high
    return UniformTime(own.level_low, own.level_high + (end - own.level_high) * along)


def check_matching(host: Host, settings: Settings) -> None:
    """Raises OneStepError where the base has no null condition for the guidance that is asked for, and where the critic
    has no donor to begin as."""
    own = settings.own
    asked = {"matching_guidance": own.matching_guidance}
    asked |= {} if own.guidance_schedule == "constant" else {"guidance_end": own.guidance_end}
    for name, scale in asked.items():
        if host.denoiser.guidance != "cfg" and scale != 1:
            raise OneStepError(
                f"{host.name} has no trained null condition, so {name} {scale:g} cannot be had: set it to 1"
            )
    if own.diversity_anchor and recipe_of(host, settings).steps == 1:
        raise OneStepError(
            "a diversity anchor holds the first of several steps, and the student has one: set diversity_anchor to 0, "
            "or student_steps to 2 to 8"
        )
    if own.step_loras and recipe_of(host, settings).steps == 1:
        raise OneStepError(
            "a LoRA for each step needs several steps, and the student has one: set step_loras to false, or "
            "student_steps to 2 to 8"
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
