"""Guided distillation, stage one (arXiv:2210.03142): the student is told the guidance, which no plain LoRA can be, so
it is an adapter. agd learns the same on the guided teacher's own trajectories."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.errors import OneStepError
from ..host import Host
from ..settings import Settings, setting
from .guidance import adapter, check_adapter, guided_recipe
from .guided_answers import AnswersSettings, check_answers, guided_answers
from .method import Method


@dataclass(frozen=True)
class GuidedDistillationSettings(AnswersSettings):
    """And how far the dial goes."""

    guidance_low: float = setting(1.0, "Least guidance that is learnt; 1 = none, where the dial begins.", 1, 30)
    guidance_high: float = setting(14.0, "Greatest guidance that is learnt.", 1, 30)

    def check(self, run: Settings) -> None:
        super().check(run)
        if self.guidance_low > self.guidance_high:
            raise OneStepError(
                f"guidance_low {self.guidance_low:g} must not be above guidance_high {self.guidance_high:g}"
            )


def check(host: Host, settings: Settings) -> None:
    """Raises OneStepError where this checkpoint has no guidance to learn, or no place for an adapter."""
    check_answers(host, settings)
    check_adapter(host, settings)


METHOD = Method(
    name="guided-distillation",
    title="Guided distillation: a guidance dial in one forward, as an adapter, on pictures",
    paper="arXiv:2210.03142",
    forwards="4.2 + the picture",
    plan=lambda setup: guided_answers(
        setup, setup.settings.own.guidance_low, setup.settings.own.guidance_high, conditioned=True
    ),
    settings=GuidedDistillationSettings,
    adapter=adapter,
    recipe=guided_recipe,
    check=check,
    guidance_input=True,
)
