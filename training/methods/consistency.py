"""The run of a consistency method: pictures, noised to a time of a trajectory, and `trajectory.TwoTimes` on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ...core.errors import OneStepError
from ...core.recipe import Recipe
from ..data.captioned_pictures import CaptionedPictures, captioned
from ..data.pairs import Pairs
from ..engine.batch import Batch
from ..engine.inputs import recipe_of
from ..engine.setup import Setup
from ..engine.student import STUDENT
from ..engine.turns import Plan, on_data_at, one_phase, with_nulls
from ..host import Host
from ..settings import NoSettings, Settings, setting
from .trajectory import Distance, Grid, Huber, Noised, Start, TeacherSteps, TwoTimes, square

Objective = Callable[[float], TwoTimes]
"""How far the run has come, 0 to 1 -> the method's choice of plug-ins."""
Source = Callable[[Batch, int], tuple[Batch, Start]]
"""(batch, update) -> (the samples that it learns from, where their trajectories are looked at)."""

Check = Callable[[Host, Settings], None]
"""`Method.check`."""


@dataclass(frozen=True)
class SourceSettings(NoSettings):
    """Which pictures a trajectory leads to."""

    pictures: str = setting(
        "",
        "A folder of your pictures, each with its caption in a .txt file of its name, to learn from; empty = the "
        "teacher's own pictures of the prompts.",
    )
    caption: str = setting("", "The caption of pictures without a .txt file; empty = each needs one.")


@dataclass(frozen=True)
class SolverSettings(NoSettings):
    """The solver between two times, and how its ends are compared."""

    solver_steps: int = setting(
        48,
        "Steps of the teacher's solver from the student's first level to a picture, of which a pair of times is one "
        "apart; rounded up to as many for each of the student's steps.",
        1,
        1000,
    )
    guidance_low: float = setting(
        0.0, "Least guidance of the solver's steps, drawn for each sample; 0 = the run's guidance.", 0, 30
    )
    guidance_high: float = setting(0.0, "Greatest guidance of the solver's steps; 0 = the run's guidance.", 0, 30)
    distance: str = setting(
        "huber",
        "How two answers are compared: huber = about by the sum of their differences, l2 = by the square.",
        choices=("huber", "l2"),
    )
    distance_width: float = setting(
        1e-3, "Difference, in units of the latents, below which huber counts squares.", 1e-6, 10
    )

    def check(self, run: Settings) -> None:
        super().check(run)
        low, high = scales(run)
        if low > high:
            least, most = (
                told if value else "guidance"
                for told, value in (("guidance_low", self.guidance_low), ("guidance_high", self.guidance_high))
            )
            raise OneStepError(f"{least} {low:g} must not be above {most} {high:g}")


@dataclass(frozen=True)
class ConsistencySettings(SolverSettings, SourceSettings):
    """Of a method that has both."""


@dataclass(frozen=True)
class SquareSettings(ConsistencySettings):
    """Of one whose paper compares by the square."""

    distance: str = setting(
        "l2",
        "How two answers are compared: huber = about by the sum of their differences, l2 = by the square.",
        choices=("huber", "l2"),
    )


@dataclass(frozen=True)
class GuidedSettings(NoSettings):
    """Whether guidance is learnt, or left to the drawing."""

    guided_solver: bool = setting(
        True,
        "Whether the solver's steps are guided. Off: the student learns the plain trajectories and the null condition, "
        "and is drawn with the run's guidance, two forwards a step: negative prompts go on working.",
    )

    def check(self, run: Settings) -> None:
        super().check(run)
        drawn = run.own.guidance_low or run.own.guidance_high
        if drawn and not self.guided_solver:
            raise OneStepError(
                f"guided_solver is off, so no guidance of the solver's steps is drawn, but {drawn:g} is named: set "
                "guidance_low and guidance_high to 0"
            )


NULL_RATE = 0.1
"""Of a student that is drawn with guidance: the share of samples on which it learns the null condition."""


def null_rate(settings: Settings) -> float:
    return 0.0 if settings.own.guided_solver else NULL_RATE


def as_guided(host: Host, settings: Settings) -> Recipe:
    """The student's steps without noise between them, guided where the solver's are not."""
    found = deterministic(host, settings)
    left = not settings.own.guided_solver and host.denoiser.guidance == "cfg"
    return replace(found, guidance=settings.guidance) if left else found


def scales(settings: Settings) -> tuple[float, float]:
    """Least and greatest guidance of the solver's steps."""
    own = settings.own
    return own.guidance_low or settings.guidance, own.guidance_high or settings.guidance


def distance_of(settings: Settings) -> Distance:
    return Huber(settings.own.distance_width) if settings.own.distance == "huber" else square


def solver_of(setup: Setup, eta: float = 0.0) -> TeacherSteps:
    """The teacher's steps, guided where the base has a null condition."""
    guided = setup.denoise.guidance == "cfg" and getattr(setup.settings.own, "guided_solver", True)
    return TeacherSteps(*(scales(setup.settings) if guided else (1.0, 1.0)), eta=eta)


def grid_of(setup: Setup, phases: int = 1) -> Grid:
    """The solver's levels: as many in each of the student's steps, and in each of ``phases``."""
    steps = setup.recipe.steps
    multiple = phases // math.gcd(phases, steps)
    return Grid(setup.recipe, multiple * -(-setup.settings.own.solver_steps // (steps * multiple)))


def check_consistency(host: Host, settings: Settings) -> None:
    """Raises OneStepError where guidance is drawn that the base does not have, and for pictures that cannot be read."""
    check_solver(host, settings)
    check_source(host, settings)


def check_solver(host: Host, settings: Settings) -> None:
    """Raises OneStepError where guidance is drawn that the base does not have."""
    own = settings.own
    if host.denoiser.guidance != "cfg" and not getattr(own, "guided_solver", True):
        raise OneStepError(
            f"{host.name} has no trained null condition, so its student cannot be drawn with guidance: set "
            "guided_solver to true"
        )
    if host.denoiser.guidance != "cfg" and (own.guidance_low or own.guidance_high):
        raise OneStepError(
            f"{host.name} has no trained null condition, so its solver's guidance cannot be drawn: set guidance_low "
            "and guidance_high to 0"
        )


def of_whole_range(check: Check) -> Check:
    """``check`` of a method whose every level leads to the picture, which one of several experts may not know."""

    def checked(host: Host, settings: Settings) -> None:
        if settings.noise_levels[0] > 0:
            raise OneStepError(
                f"{settings.method} leads from every noise level to the picture, and noise_range "
                f"{settings.noise_range} ends before it: choose a method whose steps end where the range does, one "
                "with phases or with a critic (docs/choosing.md)"
            )
        check(host, settings)

    return checked


def check_source(host: Host, settings: Settings) -> None:
    """Raises OneStepError for pictures that cannot be read or have no caption."""
    if settings.own.pictures:
        captioned(host, settings)


# -- where trajectories begin -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """Pictures with fresh noise: a person's own under their captions, or the teacher's."""

    own: CaptionedPictures | None
    pairs: Pairs

    def draw(self, batch: Batch, update: int) -> tuple[Batch, Tensor]:
        """(samples like ``batch``, their pictures [B, C, h, w])."""
        if self.own is not None:
            drawn, x0 = self.own.draw(batch)
            # guided away from the run's negative, as on the teacher's pictures
            drawn = replace(drawn, null=batch.null)
        else:
            drawn, (_, x0) = self.pairs.draw(batch, update)
        return replace(drawn, sliced=batch.sliced), x0

    def __call__(self, batch: Batch, update: int) -> tuple[Batch, Start]:
        drawn, x0 = self.draw(batch, update)
        return drawn, Noised(x0, drawn.normal("trajectory noise"), drawn.uniform("trajectory time"))

    @property
    def fresh(self) -> tuple[int, float]:
        """Updates in which pictures are made, and what a sample's costs."""
        return (0, 0.0) if self.own is not None else (self.pairs.blocks, self.pairs.solve_cost)


def pictures_of(setup: Setup) -> Pictures:
    """As the settings name them; a person's own are encoded now."""
    own = None
    if setup.settings.own.pictures:
        own = CaptionedPictures(setup)
        own.prepare()
    return Pictures(own, Pairs(setup.host, setup.prompts, setup.settings, setup.folder / "pairs"))


# -- the run ----------------------------------------------------------------------------------------------------------


def consistency(
    setup: Setup,
    objective: Objective,
    cost: float,
    source: Source,
    fresh: tuple[int, float] = (0, 0.0),
    null_rate: float = 0.0,
) -> Plan:
    """The plan of such a run. cost: forwards of a sample from x_t to x_r and of the target. fresh: `Phase.fresh` and
    its cost. null_rate: the share of samples that learn the null condition in their prompt's place."""
    settings = setup.settings

    def value(batch: Batch, start: Start, update: int) -> Tensor:
        return objective(update / settings.steps)(setup.denoise, batch, start)

    loss = on_data_at(with_nulls(source, null_rate, "trajectory null"), value, "consistency")
    return one_phase(STUDENT, loss, settings, *fresh, beside=cost)


def deterministic(host: Host, settings: Settings) -> Recipe:
    """The student's steps, each from where the one before led: no noise between them."""
    return replace(recipe_of(host, settings), renoise=False, eta=0.0)
