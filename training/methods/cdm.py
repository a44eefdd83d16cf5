"""CDM (arXiv:2605.06376) for students of several steps: dmd on a random continuous schedule, and off its trajectory. On
the recipe's own schedule and without the term off it, it is dmd with backward simulation."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.errors import OneStepError
from ..engine.inputs import recipe_of
from ..engine.setup import Setup
from ..engine.student import BackwardSimulation, RecipeSteps, Steps
from ..engine.turns import Plan
from ..host import Host
from ..settings import MOST_STEPS, Settings, setting
from .alternating import Extras, alternating
from .dmd import dmd
from .matching_settings import MatchingSettings, check_matching
from .method import Method
from .off_trajectory import OffTrajectory
from .random_schedule import RandomSchedule


@dataclass(frozen=True)
class CdmSettings(MatchingSettings):
    """dmd's, with the schedule."""

    student_schedule: str = setting(
        "random",
        "The steps that the student learns in: as many and at such levels as are drawn, or those it draws in.",
        choices=("random", "fixed"),
    )
    schedule_low: int = setting(2, "Fewest steps of a random schedule.", 1, MOST_STEPS)
    schedule_high: int = setting(0, "Most steps of a random schedule; 0 = student_steps.", 0, MOST_STEPS)
    off_trajectory: float = setting(
        1.0, "Weight of the matching off the student's trajectory, at any level that its velocity leads to.", 0, 100
    )


def steps_of(settings: Settings, steps: int) -> Steps:
    """The schedule of a student that draws in ``steps``."""
    own = settings.own
    if own.student_schedule == "fixed":
        return RecipeSteps()
    return RandomSchedule(own.schedule_low, own.schedule_high or steps)


def plan(setup: Setup) -> Plan:
    own, denoise, recipe = setup.settings.own, setup.denoise, setup.recipe
    off = OffTrajectory(own.off_trajectory) if own.off_trajectory else None
    simulate = BackwardSimulation(denoise, recipe, steps_of(setup.settings, recipe.steps))
    return alternating(setup, dmd, Extras(simulate, off=off))


def check(host: Host, settings: Settings) -> None:
    """Raises OneStepError for a schedule that has no length."""
    check_matching(host, settings)
    own, high = settings.own, settings.own.schedule_high or recipe_of(host, settings).steps
    if own.student_schedule == "random" and own.diversity_anchor and own.schedule_low < 2:
        raise OneStepError("a diversity anchor holds the first of several steps: set schedule_low to 2 at least")
    if own.student_schedule == "random" and own.schedule_low > high:
        raise OneStepError(
            f"schedule_low {own.schedule_low} is above the {high} steps that a random schedule may have: lower it, or "
            "raise schedule_high or student_steps (cdm is for students of several steps)"
        )


METHOD = Method(
    name="cdm",
    title="Distribution matching on a random continuous schedule, for several steps",
    paper="arXiv:2605.06376",
    forwards="13.9 + 3.7 a critic update + the steps before",
    plan=plan,
    settings=CdmSettings,
    check=check,
)
