"""The head's own turns in a run, and the term that it gives the student's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from ...core.features import Features
from ...core.memory import attempt, exhausted, notice
from ...core.roles import TEACHER
from ..data.pairs import Pairs
from ..data.real_pictures import RealPictures, pictures_in
from ..engine.batch import Batch
from ..engine.levels import LevelSampler, UniformTime
from ..engine.setup import Setup
from ..engine.student import BackwardSimulation
from ..engine.turns import Turn, learning, nothing
from ..host import Host
from ..settings import Settings
from .discriminator import HEAD, LOSSES, Discriminator, Head
from .distribution_matching import DistributionMatching, Scores
from .f_divergence import WEIGHTS, Ratios, Weigh

GAN = "discriminator's term"
"""What a profile of a run calls it."""


@dataclass(frozen=True)
class TeachersPictures:
    """The pairs' ends, looked at under their own prompts."""

    pairs: Pairs

    def draw(self, batch: Batch, update: int) -> tuple[Batch, Tensor]:
        """(like ``batch``, of pairs; their pictures [B, C, h, w])."""
        batch, (_, real) = self.pairs.draw(batch, update)
        return batch, real

    def looked_at(self, batch: Batch) -> Batch:
        return batch


@dataclass(frozen=True)
class HeadTurns:
    """real: the pictures that are. simulate: how a picture of the student comes about. ratios: by which the matching's
    gradient is weighed, None for not at all."""

    setup: Setup
    discriminator: Discriminator
    real: TeachersPictures | RealPictures
    simulate: BackwardSimulation
    ratios: Ratios | None = None

    @property
    def turns(self) -> list[Turn]:
        """Of an update."""
        own = self.setup.settings.own
        then = nothing if self.ratios is None else self.ratios.settle
        return [Turn(HEAD, self.teach, own.head_learning_rate, 0.0, then=then)] * own.head_updates

    def weighed(self, objective: DistributionMatching) -> DistributionMatching:
        """``objective`` with the ratios' weight, where there are any."""
        ratios = self.ratios
        if ratios is None:
            return objective

        def h(scores: Scores) -> Tensor:
            assert scores.logit is not None
            return ratios(self.setup.denoise.schedule, scores.sigma, scores.logit)

        return replace(objective, judge=self.discriminator, ratio=h)

    def teach(self, batch: Batch, share: float, update: int) -> Mapping[str, Any]:
        """The head's loss on real pictures and on the student's, the teacher's being of the same prompts."""
        drawn, real = self.real.draw(batch, update)
        batch = replace(drawn, sliced=batch.sliced)
        with torch.no_grad():
            fake = self.simulate(batch).x0
        loss, numbers = self.discriminator.head_loss(self.setup.denoise, self.real.looked_at(batch), real, fake)
        (share * loss).backward()
        return numbers

    def pull(self, batch: Batch, x: Tensor, index: int) -> tuple[Tensor | None, Mapping[str, Any]]:
        """What the student's cotangent at ``index`` of its updates has of the discriminator, [B, ...] or None, and
        numbers. The first update asks as well, for nothing: what the term needs is known before a night has passed."""
        weight = self.weight(index)
        if not weight and (index or not self.setup.settings.own.gan_weight):
            return None, {}
        with record_function(GAN):
            found, numbers = self.told(batch, x)
        return (weight * found if weight else None), numbers

    def told(self, batch: Batch, x: Tensor) -> tuple[Tensor, Mapping[str, Any]]:
        """The discriminator's cotangent of the student's x [B, ...] of ``batch``, and numbers."""
        return self.discriminator.cotangent(self.setup.denoise, self.real.looked_at(batch), x)

    def weight(self, index: int) -> float:
        """w at ``index`` of the student's updates."""
        own, along = self.setup.settings.own, index / max(1, self.setup.settings.steps)
        if own.gan_ramp == 0:
            return float(own.gan_weight) if along >= own.gan_start else 0.0
        # w(t) = w clip((t - t_0) / T, 0, 1)
        return float(own.gan_weight * min(1.0, max(0.0, (along - own.gan_start) / own.gan_ramp)))

    # -- what it costs ------------------------------------------------------------------------------------------------

    @property
    def asked(self) -> float:
        """The share of the student's updates in which the term is asked for."""
        own, steps = self.setup.settings.own, max(1, self.setup.settings.steps)
        if not own.gan_weight:
            return 0.0
        first = math.ceil(own.gan_start * steps) if own.gan_ramp == 0 else math.floor(own.gan_start * steps) + 1
        return (max(0, steps - first) + (first > 0)) / steps

    @property
    def cost(self) -> float:
        """Forwards of a sample in an update: the head's turns, and the student's term."""
        return self.setup.settings.own.head_updates * self.cost_of_turn + self.asked * cost_of_term(self.setup.settings)

    @property
    def draws_pairs(self) -> bool:
        return isinstance(self.real, TeachersPictures)

    @property
    def cost_of_turn(self) -> float:
        return self.simulate.cost + self.discriminator.forwards


def cost_of_term(settings: Settings) -> float:
    """Forwards of a sample: the backward goes through what is before the block that is looked at, about a third."""
    return 1 + (learning(settings) - 1) / 3


# -- how a head comes about -------------------------------------------------------------------------------------------


def head_turns(setup: Setup, pairs: Pairs, simulate: BackwardSimulation, ratios: Ratios | None = None) -> HeadTurns:
    """Of a head that gives the student a term beside the matching. ratios: as `HeadTurns` has them."""
    own = setup.settings.own
    levels = UniformTime(own.head_level_low, own.head_level_high)
    return HeadTurns(setup, add_head(setup, levels, ratios), real_pictures(setup, pairs), simulate, ratios)


def real_pictures(setup: Setup, pairs: Pairs) -> TeachersPictures | RealPictures:
    """A person's own, encoded, where the settings have them; else the teacher's."""
    if not getattr(setup.settings.own, "real_pictures", ""):
        return TeachersPictures(pairs)
    own = RealPictures(setup, setup.folder / "pictures")
    own.prepare()
    return own


def weighing_head_turns(setup: Setup, pairs: Pairs, simulate: BackwardSimulation) -> HeadTurns:
    """With the ratios of f-distill's settings."""
    return head_turns(setup, pairs, simulate, ratios_of(setup.settings, WEIGHTS))


def ratios_of(settings: Settings, weights: Mapping[str, Weigh]) -> Ratios:
    """As its settings have them."""
    own = settings.own
    return Ratios(own.divergence, own.ratio_low, own.ratio_high, own.ratio_memory, weights)


def add_head(setup: Setup, levels: LevelSampler, ratios: Ratios | None = None) -> Discriminator:
    """A discriminator whose head is among the roles, and ``ratios`` with what is kept of it."""
    own, host = setup.settings.own, setup.host
    features = features_of(host, setup.settings)
    head = Head(channels_of(setup, features), own.head_width, own.head_cells, setup.settings.seed)
    if ratios is not None:
        head.ratios = ratios
    setup.denoise.roles.add_module(HEAD, head.to(host.device))
    note = None if ratios is None else ratios.note
    penalty = own.head_penalty, own.head_penalty_noise
    return Discriminator(head, features, LOSSES[own.head_loss], levels, *penalty, note)


def features_of(host: Host, settings: Settings) -> Features:
    """What the head of such a run looks at. Raises OneStepError where there is nothing to look at."""
    roles = host.denoiser.roles
    return Features(roles.targets, host.blocks, settings.own.head_blocks, roles.active_here)


def channels_of(setup: Setup, features: Features) -> list[int]:
    """Of each feature, as one forward of one sample shows."""
    batch, levels = setup.prompts.batch(0, [0]), setup.recipe.levels(setup.denoise.schedule)

    def look() -> list[int]:
        x = torch.zeros(1, *batch.shape, device=batch.device)
        with torch.no_grad(), setup.denoise.roles.use(TEACHER), features.kept(x) as found:
            setup.denoise(x, levels[:1], batch.cond)
        return [value.shape[1] for value in found]

    found, why = attempt(look)
    if found is None:
        notice("out of memory: the base's blocks are looked at once more")
        found, why = attempt(look)
    if found is None:
        raise exhausted("the first look at the base's blocks", why)
    return found


def check_head(host: Host, settings: Settings) -> None:
    """Raises OneStepError where the base has no blocks that a head could look at, or a folder no pictures."""
    features_of(host, settings)
    if getattr(settings.own, "real_pictures", ""):
        pictures_in(settings.own.real_pictures)
