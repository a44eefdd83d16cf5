"""Guidance distilled on noised pictures (arXiv:2210.03142, stage one), as guided-distillation and lora-guided share it:
where agd follows the guided teacher's own trajectories, here any time of any picture is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...core.denoiser import Denoiser, guided
from ...core.roles import TEACHER
from ...core.schedule import add_noise, cast_as
from ..engine.batch import Batch
from ..engine.levels import WEIGHTS, LevelSampler, LevelWeight, at, natural, usual_levels
from ..engine.setup import Setup
from ..engine.student import STUDENT
from ..engine.turns import Plan, on_data, one_phase
from ..host import Host
from ..settings import Settings
from .consistency import SourceSettings, check_source, pictures_of
from .guidance import check_guided, need_recipe


@dataclass(frozen=True)
class AnswersSettings(SourceSettings):
    """Its pictures."""

    def check(self, run: Settings) -> None:
        super().check(run)
        need_recipe(run, "draws in")


@dataclass(frozen=True)
class GuidedAnswers:
    """low, high: of w, which is drawn for each sample. levels: where it looks. weight: of the squared error in x0.
    conditioned: whether the student is given w."""

    low: float
    high: float
    levels: LevelSampler
    weight: LevelWeight
    conditioned: bool

    def __call__(self, denoise: Denoiser, batch: Batch, x: Tensor) -> Tensor:
        """omega(lambda) |D(x_t, c, w) - (D_u + w (D_c - D_u))|^2 (Eq. 4): a sum over a sample's elements, a mean over
        samples. x: pictures, [B, C, h, w]."""
        sigma = self.levels(denoise.schedule, batch.uniform("guided level"))
        x_t = add_noise(denoise.schedule, x, batch.normal("guided noise"), sigma)
        w = self.low + (self.high - self.low) * batch.uniform("guided scale")
        with torch.no_grad(), denoise.roles.use(TEACHER):
            target = guided(denoise, x_t, sigma, batch.cond, batch.nulls(), w)
        cond = batch.cond.with_(guidance=cast_as(w, x)) if self.conditioned else batch.cond
        with denoise.roles.use(STUDENT):
            error = (denoise(x_t, sigma, cond) - target).square().flatten(1).sum(1)
        return (cast_as(at(self.weight, denoise.schedule, sigma), error) * error).mean()


def guided_answers(setup: Setup, low: float, high: float, conditioned: bool) -> Plan:
    """The plan of such a student."""
    denoise, pictures = setup.denoise, pictures_of(setup)
    answers = GuidedAnswers(low, high, usual_levels(denoise), WEIGHTS[natural(denoise)], conditioned)
    loss = on_data(pictures.draw, partial(answers, denoise))
    return one_phase(STUDENT, loss, setup.settings, *pictures.fresh, beside=2)


def check_answers(host: Host, settings: Settings) -> None:
    """Raises OneStepError where this checkpoint has no guidance to learn, and for pictures that cannot be read."""
    check_guided(host, settings)
    check_source(host, settings)
