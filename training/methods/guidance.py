"""Guidance in one forward (AGD, arXiv:2503.07274): the student answers at once what the teacher answers under
classifier-free guidance, on the guided teacher's own trajectories."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...core.denoiser import Denoiser
from ...core.errors import OneStepError
from ...core.guidance_adapter import new_adapter
from ...core.recipe import Recipe
from ..data.trajectories import States, Trajectories
from ..engine.batch import Batch
from ..engine.prompts import Prompts
from ..engine.student import STUDENT
from ..host import Host
from ..settings import Settings


@dataclass(frozen=True)
class GuidanceInOne:
    """told: whether the student is told each trajectory's guidance (an adapter), or not (a LoRA)."""

    trajectories: Trajectories
    told: bool

    def draw(self, batch: Batch, update: int) -> tuple[Batch, States]:
        return self.trajectories.draw(batch, update)

    def loss(self, denoise: Denoiser, batch: Batch, data: States) -> Tensor:
        """|D(x, t, c, w) - D_w|^2 / ((w - 1)^2 |D_c - D_u|), D_w = D_u + w (D_c - D_u) (AGD, Eq. 8, which weighs by the
        noise instead): a sum over a sample's elements, a mean over samples. A student that is not told w answers for
        all scales at once, and there (w - 1)^2 is left out."""
        cond = batch.cond.with_(guidance=data.w.to(data.x)) if self.told else batch.cond
        with denoise.roles.use(STUDENT):
            x0 = denoise(data.x, data.sigma, cond)
        error = (x0 - data.target).square().flatten(1).sum(1)
        # a prompt that asks for what the null prompt asks for has no guidance: its states must not outweigh all others
        size = data.apart.to(error) + LEAST * data.target.flatten(1).norm(dim=1)
        reach = (data.w.to(error) - 1).clamp_min(LEAST) if self.told else 1
        return (error / (reach**2 * size)).mean()


LEAST = 1e-3
"""What counts as no guidance: of a scale, that it is above 1; of |D_c - D_u|, its share of |D_w|."""


def agd(host: Host, settings: Settings, prompts: Prompts, folder: Path) -> GuidanceInOne:
    return GuidanceInOne(Trajectories(host, prompts, settings, folder / "trajectories"), told=True)


def guidance_lora(host: Host, settings: Settings, prompts: Prompts, folder: Path) -> GuidanceInOne:
    return GuidanceInOne(Trajectories(host, prompts, settings, folder / "trajectories"), told=False)


def adapter(host: Host, settings: Settings) -> Any:
    """What agd trains: a new adapter for this base."""
    return new_adapter(host.denoiser.roles.targets, host.family, settings.seed)


def check(host: Host, settings: Settings) -> None:
    """Raises OneStepError where this checkpoint has no guidance to learn, or no place for an adapter."""
    if host.denoiser.guidance != "cfg":
        raise OneStepError(
            f"{host.name} has no trained null condition, so it has no guidance that {settings.method} could learn: "
            "choose a base that is drawn with guidance"
        )
    if settings.method == "agd" and (settings.targets != "all" or settings.initial_lora):
        raise OneStepError("agd trains an adapter, which has places of its own: set targets=all and no initial_lora")
    if settings.method == "agd" and settings.scales[0] < 1:
        raise OneStepError(
            f"guidance_low is {settings.scales[0]:g}: an adapter's dial begins at 1, which is no guidance"
        )
    if settings.method == "agd":
        adapter(host, settings)


def guided_recipe(host: Host, settings: Settings) -> Recipe:
    """The teacher's own steps, each of one forward."""
    schedule = host.denoiser.schedule
    times = schedule.trailing(settings.teacher_steps)
    return Recipe.at(schedule, times, family=host.family, sizes=settings.size_list)
