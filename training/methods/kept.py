"""A few-step model as a run began with it: what it is held to where it is drawn, and what its pictures are compared
with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from ...core.denoiser import Denoiser
from ...core.recipe import Recipe
from ...core.roles import TEACHER
from ..data.captioned_pictures import CaptionedPictures
from ..engine.batch import Batch
from ..engine.setup import Setup
from ..engine.student import STUDENT, BackwardSimulation
from ..engine.turns import learning
from ..settings import Settings
from ..watch.measures import draw, patch_distance, watched
from ..watch.reference import Latents, Reference

BEFORE = "before"
"""The role of a student as it began; where it began as the base, the teacher is it."""
KEPT = "kept"
FEW = 8
"""Steps, the most that are held."""


@dataclass(frozen=True)
class Kept:
    """before: the role that the student was. simulate: how its states come about."""

    simulate: BackwardSimulation
    before: str = TEACHER

    def __call__(self, denoise: Denoiser, batch: Batch) -> Tensor:
        """|D(x_k) - D_0(x_k)|^2, a sum over a sample's elements, a mean over samples."""
        with torch.no_grad():
            was = self.simulate(batch, role=self.before, train=False)
        with denoise.roles.use(STUDENT):
            error = denoise(was.x, was.sigma, batch.cond) - was.x0
        return error.square().flatten(1).sum(1).mean()


@dataclass(frozen=True)
class Hold:
    """kept: what is held. weight: of it in a run's loss."""

    kept: Kept
    weight: float

    def __call__(self, denoise: Denoiser, batch: Batch, share: float) -> Mapping[str, Any]:
        """Runs backward; its number is of an element."""
        with record_function(KEPT):
            value = self.kept(denoise, batch)
            (share * self.weight * value).backward()
        return {"kept": value.detach() / torch.Size(batch.shape).numel()}

    def cost(self, settings: Settings) -> float:
        """Forwards of a sample."""
        return learning(settings) + self.kept.simulate.cost


def held(setup: Setup, weight: float) -> Hold | None:
    """What holds a model that is drawn in few steps without guidance; None for another, and without a weight."""
    if not weight or not in_few(setup.recipe):
        return None
    return Hold(Kept(BackwardSimulation(setup.denoise, setup.recipe), before(setup)), weight)


def in_few(recipe: Recipe) -> bool:
    """Whether a model so drawn is drawn in few steps without guidance."""
    return recipe.guidance == 1 and recipe.steps <= FEW


def as_it_began(setup: Setup) -> None:
    """Keep the student as it is now for the role `before`."""
    if setup.settings.initial_lora:
        setup.denoise.roles.copy(STUDENT, BEFORE)


def before(setup: Setup) -> str:
    """The role of the model as the run began."""
    return BEFORE if setup.settings.initial_lora else TEACHER


def by_beginning(setup: Setup) -> Reference:
    """What the model drew from the same noise as the run began."""
    return Reference(lambda batch, noise: {"x": draw(setup.host, setup.recipe, before(setup), batch, noise, {})})


def by_pictures(setup: Setup, pictures: CaptionedPictures) -> Reference:
    """The pictures beside what the model drew under their captions as the run began."""
    host = setup.host
    rows, size = watched(len(pictures.every), setup.settings), setup.prompts.sizes[0]

    def make(batch: Batch, noise: Tensor) -> Latents:
        plain = draw(host, setup.recipe, before(setup), batch, noise, {})
        shown = pictures.at_first_size(rows[list(batch.samples)].tolist())
        return {"x": plain, "plain": plain, "pictures": shown}

    return Reference(
        make,
        pictures.texts.conds[size][rows],
        missed=lambda host, latents, x: patch_distance(x, latents["pictures"]),
        above=lambda host, latents, rows: [host.decode(latents["pictures"][rows]), host.decode(latents["plain"][rows])],
    )
