"""How guidance lies on teacher and critic in score identity distillation (arXiv:2406.01561, arXiv:2505.12674)."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.errors import OneStepError
from ..host import Host
from ..settings import Settings, setting
from .guidance_scale import Scale
from .matching_settings import OneTermSettings, check_matching, guidance_at

TEACHERS, LONG_SHORT, ZERO, ANTI = "teacher", "long-short", "zero-cfg", "anti-cfg"
STRATEGIES = (TEACHERS, LONG_SHORT, ZERO, ANTI)
UNGUIDED = (ZERO, ANTI)
"""Whose teacher is asked without guidance."""


@dataclass(frozen=True)
class ScoreIdentitySettings(OneTermSettings):
    """Of the methods by score identity. One update of the critic for each of the student's, as the papers have it."""

    critic_updates: int = setting(1, "Updates of the critic for each of the student's.", 1, 100)
    guidance_strategy: str = setting(
        TEACHERS,
        "teacher = matching_guidance on the teacher alone; long-short = the same on the critic too, as it learns and "
        "as it is asked (LSG); zero-cfg = none, and the critic never sees a prompt; anti-cfg = none on the teacher, "
        "anti_guidance on the critic. The last two have no guidance to choose; their paper has them for more variety.",
        choices=STRATEGIES,
    )
    anti_guidance: float = setting(-1.0, "Critic's guidance under anti-cfg, below 0.", -30, -0.01)


@dataclass(frozen=True)
class Strategy:
    """teacher: k of the teacher. critic: k of the critic, as it learns and as it is asked. null_rate: share of the
    samples on which it learns the null condition."""

    teacher: Scale
    critic: Scale
    null_rate: float


def strategy_at(own: ScoreIdentitySettings, along: float) -> Strategy:
    """At ``along`` of the matching, 0 to 1."""
    k = guidance_at(own, along)
    # kappa_4 of the teacher; kappa_1 of the critic as it learns = kappa_2 = kappa_3 as it is asked
    if own.guidance_strategy == LONG_SHORT:
        return Strategy(k, k, 0.1)
    if own.guidance_strategy == ZERO:
        return Strategy(1.0, 0.0, 0.0)
    if own.guidance_strategy == ANTI:
        return Strategy(1.0, own.anti_guidance, 0.1)
    return Strategy(k, 1.0, 0.0)


def check_strategy(host: Host, settings: Settings) -> None:
    """Raises OneStepError where the base has no null condition that the strategy needs."""
    strategy = settings.own.guidance_strategy
    if strategy in UNGUIDED and host.denoiser.guidance != "cfg":
        raise OneStepError(
            f"{host.name} has no trained null condition, which the critic of guidance_strategy {strategy} is asked "
            "with: set guidance_strategy to teacher and matching_guidance to 1"
        )
    check_matching(host, settings)


def note_strategy(settings: Settings) -> str:
    own = settings.own
    if own.guidance_strategy not in UNGUIDED:
        return ""
    return f"guidance_strategy {own.guidance_strategy}: matching_guidance {own.matching_guidance:g} is not used"
