"""Guidance in one forward (AGD, arXiv:2503.07274), as agd and guidance-lora share it: the student answers at once what
the teacher answers under classifier-free guidance, on the guided teacher's own trajectories."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from ...core.denoiser import Denoiser
from ...core.errors import OneStepError
from ...core.guidance_adapter import new_adapter
from ...core.recipe import Recipe
from ...core.schedule import cast_as, of_size
from ..data.trajectories import States, Trajectories
from ..engine.batch import Batch
from ..engine.setup import Setup
from ..engine.student import STUDENT
from ..engine.turns import Plan, on_data, one_phase
from ..host import Host
from ..settings import MOST_STEPS, Settings, need_steps, setting


@dataclass(frozen=True)
class GuidanceInOne:
    """conditioned: whether the student is given each trajectory's guidance (an adapter), or not (a LoRA)."""

    conditioned: bool

    def __call__(self, denoise: Denoiser, batch: Batch, data: States) -> Tensor:
        """|D(x, t, c, w) - D_w|^2 / ((w - 1)^2 |D_c - D_u|), D_w = D_u + w (D_c - D_u) (AGD, Eq. 8, which weighs by the
        noise instead): a sum over a sample's elements, a mean over samples. A student that is not given w answers
        for all scales at once, and there (w - 1)^2 is left out."""
        cond = batch.cond.with_(guidance=cast_as(data.w, data.x)) if self.conditioned else batch.cond
        with denoise.roles.use(STUDENT):
            x0 = denoise(data.x, data.sigma, cond)
        error = (x0 - data.target).square().flatten(1).sum(1)
        # a prompt that asks for what the null prompt asks for has no guidance: its states must not outweigh all others
        size = cast_as(data.apart, error) + LEAST * data.target.flatten(1).norm(dim=1)
        reach = (cast_as(data.w, error) - 1).clamp_min(LEAST) if self.conditioned else 1
        return (error / (reach**2 * size)).mean()


LEAST = 1e-3
"""What counts as no guidance: of a scale, that it is above 1; of |D_c - D_u|, its share of |D_w|."""


@dataclass(frozen=True)
class GuidanceSettings:
    """Of the methods that learn guidance. automatic: where the trajectories' guidance lies if nothing else is said;
    None: at the teacher's own."""

    automatic: ClassVar[tuple[float, float] | None] = None

    guidance_low: float = setting(
        0.0, "Least guidance that is learnt; 0 = automatic: 1 for agd, else the guidance itself.", 0, 30
    )
    guidance_high: float = setting(
        0.0, "Greatest guidance that is learnt; 0 = automatic: 12 for agd, else the guidance itself.", 0, 30
    )
    states: int = setting(
        4,
        "States of guided trajectories that are kept for each prompt drawn; from teacher_steps on, none of the "
        "teacher's answers is thrown away.",
        1,
        256,
    )

    def check(self, run: Settings) -> None:
        need_steps(run)
        low, high = scales(run)
        if low > high:
            raise OneStepError(f"guidance_low {low:g} must not be above guidance_high {high:g}")
        need_recipe(run, "follows trajectories of")


def need_recipe(run: Settings, does: str) -> None:
    """Raises OneStepError where the teacher's steps, in which the student is drawn, are more than a recipe can hold."""
    if run.teacher_steps > MOST_STEPS:
        raise OneStepError(
            f"{run.method} {does} {run.teacher_steps} steps: set teacher_steps to at most {MOST_STEPS}; 20 to 50 do "
            "well"
        )


def scales(settings: Settings) -> tuple[float, float]:
    """Least and greatest guidance of the trajectories."""
    own = settings.own
    low, high = own.automatic or (settings.guidance, settings.guidance)
    return own.guidance_low or low, own.guidance_high or high


def guided(setup: Setup, conditioned: bool) -> Plan:
    """The plan of a student that learns guidance."""
    settings = setup.settings
    kept = setup.folder / "trajectories", scales(settings), settings.own.states
    states = Trajectories(setup.host, setup.prompts, settings, *kept)
    loss = on_data(states.draw, partial(GuidanceInOne(conditioned), setup.denoise))
    return one_phase(STUDENT, loss, settings, states.blocks, 2.0 * max(settings.teacher_steps, settings.own.states))


def check_guided(host: Host, settings: Settings) -> None:
    """Raises OneStepError where this checkpoint has no guidance to learn."""
    if host.denoiser.guidance != "cfg":
        raise OneStepError(
            f"{host.name} has no trained null condition, so it has no guidance that {settings.method} could learn: "
            "choose a base that is drawn with guidance"
        )


def guided_recipe(host: Host, settings: Settings) -> Recipe:
    """The teacher's own steps, each of one forward."""
    schedule = of_size(host.denoiser.schedule, host.latent_shape(settings.size_list[0]))
    times = schedule.trailing(settings.teacher_steps)
    return Recipe.at(schedule, times, family=host.family, sizes=settings.size_list)


def adapter(host: Host, settings: Settings) -> Any:
    """A new guidance adapter for this base."""
    return new_adapter(host.denoiser.roles.targets, host.family, settings.seed)


def check_adapter(host: Host, settings: Settings) -> None:
    """Raises OneStepError where this checkpoint has no place for an adapter."""
    if settings.targets != "all" or settings.initial_lora:
        raise OneStepError(
            f"{settings.method} trains an adapter, which has places of its own: set targets=all and no initial_lora"
        )
    adapter(host, settings)
