"""The run of a method with a critic (arXiv:2405.14867): a warm start, the critic alone, then critic and student in
turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from ..data.pairs import Pairs
from ..engine.batch import Batch
from ..engine.levels import WEIGHTS
from ..engine.setup import Setup
from ..engine.student import STUDENT, BackwardSimulation
from ..engine.turns import Loss, Phase, Plan, Turn, learning, nothing, on_data
from ..settings import Settings
from .distribution_matching import CRITIC, DistributionMatching, Scores
from .regression import Regression

ANCHOR, PICTURE = "anchor", "student's picture"
"""What a profile of a run calls the regression beside the matching, and a picture that several critic turns learn
from."""
Objective = Callable[[Settings, float], DistributionMatching]
"""(settings, how far the matching has come, 0 to 1) -> the method's choice of plug-ins."""


def alternating(setup: Setup, objective: Objective) -> Plan:
    """The plan of such a run; ``objective`` is the method."""
    settings, own = setup.settings, setup.settings.own
    add_critic(setup)
    pairs = Pairs(setup.host, setup.prompts, settings, setup.folder / "pairs")
    regress = on_data(pairs.draw, partial(Regression(setup.recipe), setup.denoise), "regression")
    turns = Turns(setup, objective, regress if own.anchor else None)
    follow = partial(setup.denoise.roles.lerp, CRITIC, STUDENT, own.follow) if own.follow else nothing
    # theta_F <- (1 - share) theta_F + share theta: after the student's update (IDA, SenseFlow, arXiv:2506.00523), or
    # after the critic's (CDM's merge, arXiv:2605.06376)
    after = {"student": nothing, "critic": nothing, own.follow_after: follow}
    critic = Turn(
        CRITIC, turns.teach_critic, own.critic_learning_rate, 0.0, then=after["critic"], half_scale=SMALL_GRADIENTS
    )
    warm = Turn(STUDENT, regress, own.warm_start_rate, then=after["student"])
    scale = SMALL_GRADIENTS if own.matching_scale == "mean" else 1.0
    student = Turn(STUDENT, turns.match, settings.learning_rate, 0.0, then=after["student"], half_scale=scale)
    learn, warm_up = learning(settings), own.critic_warm_up if settings.steps else 0
    return Plan(
        [STUDENT, CRITIC],
        [
            Phase("warm start", own.warm_start, [warm], learn, pairs.blocks, pairs.solve_cost),
            Phase("critic", warm_up, [replace(critic, falls=False)], turns.picture_cost + learn),
            Phase(
                settings.method,
                settings.steps,
                [critic] * own.critic_updates + [student],
                turns.cost,
                turns.first + own.anchor_every * max(0, pairs.blocks - turns.first),
                pairs.solve_cost / own.anchor_every if own.anchor else 0.0,
                turns.rare,
            ),
        ],
    )


SMALL_GRADIENTS = 1024.0
"""`Turn.half_scale` of a loss that is a mean over elements."""


@torch.no_grad()
def add_critic(setup: Setup) -> None:
    """A critic of the student's rank starts from the student's A, an initial LoRA's too, and from B = 0; or as the
    initial LoRA."""
    settings, roles = setup.settings, setup.denoise.roles
    if settings.own.critic_start == "donor":
        roles.copy(STUDENT, CRITIC)
        return
    roles.add(CRITIC, settings.own.critic_rank or settings.rank, settings.seed, setup.host.device)
    started = roles.state(STUDENT)
    for name, (a, _) in roles.state(CRITIC).items():
        if started[name][0].shape == a.shape:
            a.copy_(started[name][0])


@dataclass(frozen=True)
class Turns:
    """The losses of both roles. regress: of the student on pairs, which stands beside the matching."""

    setup: Setup
    objective: Objective
    regress: Loss | None = None
    _kept: dict[tuple[int, ...], Tensor] = field(default_factory=dict, compare=False)

    @property
    def simulate(self) -> BackwardSimulation:
        """How a picture of the student comes about."""
        return BackwardSimulation(self.setup.denoise, self.setup.recipe)

    # -- the critic ---------------------------------------------------------------------------------------------------

    def teach_critic(self, batch: Batch, share: float, update: int) -> Mapping[str, Any]:
        """The critic's loss on the student's own pictures."""
        if self.setup.settings.own.critic_pictures == "shared":
            of, x = self._shared(batch)
            batch = replace(batch, cond=of.cond, null=of.null, shape=of.shape)
        else:
            with torch.no_grad():
                x = self.simulate(batch).x0
        loss = self.at(update).critic_loss(self.setup.denoise, batch, x)
        (share * loss).backward()
        return {"critic": loss.detach()}

    def _shared(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The samples of the update's first turn, and the student's pictures of them. They are a function of these and
        of the student, which stays as it is while the critic learns: a run that goes on between two of its turns makes
        them again."""
        first = self.setup.prompts.batch(batch.step - batch.step % self.turns, batch.samples)
        key = (first.step, *first.samples)
        if key not in self._kept:
            for other in [other for other in self._kept if other[0] != first.step]:
                del self._kept[other]
            with torch.no_grad(), record_function(PICTURE):
                self._kept[key] = self.simulate(first).x0
        return first, self._kept[key]

    # -- the student --------------------------------------------------------------------------------------------------

    def match(self, batch: Batch, share: float, update: int) -> Mapping[str, Any]:
        """<x, sg(G)>.backward(): the sum over a sample's elements, or their mean; the mean over samples."""
        own = self.setup.settings.own
        if own.matching_scale == "mean":
            share = share / math.prod(batch.shape)
        x = self.simulate(batch).x0
        cotangent, scores = self.at(update).cotangent(self.setup.denoise, batch, x)
        x.backward(cotangent * (share / len(batch)))
        index = self.index(update)
        if self.regress is not None and index % own.anchor_every == 0:
            with record_function(ANCHOR):
                # each n-th time with n times the weight, on pairs in the order that they are made in
                self.regress(batch, share * own.anchor * own.anchor_every, self.first + index // own.anchor_every)
        return score_metrics(scores)

    # -- where the run stands -----------------------------------------------------------------------------------------

    @property
    def turns(self) -> int:
        """`Plan.turns`."""
        return int(self.setup.settings.own.critic_updates) + 1

    @property
    def first(self) -> int:
        """The first update of the matching."""
        own = self.setup.settings.own
        return int(own.warm_start + own.critic_warm_up)

    def index(self, update: int) -> int:
        """Of an update among those of the matching; 0 before."""
        return max(0, update - self.first)

    def at(self, update: int) -> DistributionMatching:
        """The objective as it is at ``update``."""
        settings = self.setup.settings
        made = self.objective(settings, self.index(update) / max(1, settings.steps))
        return replace(made, critic_weight=WEIGHTS[settings.own.critic_weight])

    # -- what it costs ------------------------------------------------------------------------------------------------

    @property
    def picture_cost(self) -> float:
        """Forwards of a picture that is drawn without a graph: of its step, and of those before."""
        return (self.setup.recipe.steps + 1) / 2

    @property
    def cost(self) -> float:
        """Forwards of a sample in an update of the matching."""
        own, learn = self.setup.settings.own, learning(self.setup.settings)
        pictures = 1 if own.critic_pictures == "shared" else own.critic_updates
        critic = pictures * self.picture_cost + own.critic_updates * learn
        student = self.picture_cost - 1 + learn + self.at(0).forwards
        return critic + student + (learn / own.anchor_every if own.anchor else 0.0)

    @property
    def rare(self) -> Mapping[str, float]:
        """`Phase.rare`."""
        own = self.setup.settings.own
        return {ANCHOR: 1 / own.anchor_every, PICTURE: 1 / own.critic_updates}


def score_metrics(scores: Scores) -> Mapping[str, Any]:
    """gap = rms(D_F - D_c) / rms(D_c - x); cos of the two; mean and standard deviation of the student's x."""
    numbers = {"x_mean": scores.x.mean(), "x_std": scores.x.std()}
    if scores.fake is None:
        return numbers
    delta, pull = scores.fake - scores.real, scores.real - scores.x
    cos = torch.cosine_similarity(delta.flatten(1), pull.flatten(1)).mean()
    return numbers | {"gap": delta.norm() / pull.norm().clamp_min(1e-12), "cos": cos}
