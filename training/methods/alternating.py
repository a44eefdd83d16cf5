"""The run of a method with a critic (arXiv:2405.14867): a warm start, the critic alone, then critic and student in
turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.profiler import record_function

from ...core.schedule import NoiseSchedule
from ..data.anchors import Anchors
from ..data.pairs import Pairs
from ..engine.batch import Batch
from ..engine.levels import WEIGHTS
from ..engine.setup import Setup
from ..engine.student import STUDENT, BackwardSimulation, Drawn
from ..engine.trainer import EMA
from ..engine.turns import Loss, Phase, Plan, Turn, learning, nothing, on_data
from ..settings import Settings
from .branch import Branch
from .discriminator import HEAD
from .distribution_matching import CRITIC, DistributionMatching, score_metrics
from .diversity_anchor import diversity_of
from .head_turns import GAN, HeadTurns
from .off_trajectory import OffTrajectory
from .regression import Anchored, Regression

ANCHOR, PICTURE = "anchor", "student's picture"
"""What a profile of a run calls the regression beside the matching, and a picture that several critic turns learn
from."""
Objective = Callable[[Settings, float], DistributionMatching]
"""(settings, how far the matching has come, 0 to 1) -> the method's choice of plug-ins."""
AtStep = Callable[[DistributionMatching, NoiseSchedule, Drawn], DistributionMatching]
"""(objective, schedule, a step of the student) -> the objective for that step."""


@dataclass(frozen=True)
class Extras:
    """What a method has besides. simulate: how a picture of a student of several steps comes about. head: makes the
    turns of a discriminator head. anchored: what stands beside the matching in the place of regression on the pairs.
    phased: one of the student's steps after the other, each to its end before the next. critic: adds its role, where
    that is no LoRA."""

    simulate: BackwardSimulation | None = None
    at_step: AtStep | None = None
    off: OffTrajectory | None = None
    head: Callable[[Setup, Pairs, BackwardSimulation], HeadTurns] | None = None
    anchored: Anchored | None = None
    phased: bool = False
    critic: Callable[[Setup], None] | None = None


def alternating(setup: Setup, objective: Objective, extras: Extras | None = None) -> Plan:
    """The plan of such a run; ``objective`` is the method."""
    settings, own, extras = setup.settings, setup.settings.own, extras or Extras()
    (extras.critic or add_critic)(setup)
    for role in (STUDENT, EMA) if own.step_loras else ():
        setup.denoise.roles.split(role, setup.recipe.timesteps)
    pairs = Pairs(setup.host, setup.prompts, settings, setup.folder / "pairs")
    regress = on_data(pairs.draw, partial(Regression(setup.recipe), setup.denoise), "regression")
    simulate = extras.simulate or BackwardSimulation(setup.denoise, setup.recipe)
    diversity, anchors = diversity_of(setup)
    if diversity is not None:
        simulate = replace(simulate, first=1)
    head = extras.head(setup, pairs, simulate) if extras.head else None
    anchored = extras.anchored(setup, pairs) if extras.anchored else (regress, learning(settings))
    turns = Turns(setup, objective, extras, simulate, anchored, diversity, head)
    follow = partial(setup.denoise.roles.lerp, CRITIC, STUDENT, own.follow) if own.follow else nothing
    # theta_F <- (1 - share) theta_F + share theta: after the student's update (IDA, SenseFlow, arXiv:2506.00523), or
    # after the critic's (CDM's merge, arXiv:2605.06376)
    after = {"student": nothing, "critic": nothing, own.follow_after: follow}
    warm = Turn(STUDENT, regress, own.warm_start_rate, then=after["student"])
    phases = [Phase("warm start", own.warm_start, [warm], learning(settings), pairs.blocks, pairs.solve_cost)]
    if not extras.phased:
        phases += _matching(turns, pairs, anchors, after, settings.steps)
    for step, updates in enumerate(shares(settings.steps, setup.recipe.steps) if extras.phased else []):
        phases += _matching(_of_step(turns, pairs, step), pairs, anchors, after, updates)
    return Plan([STUDENT, CRITIC, *([HEAD] if head else [])], phases)


def shares(updates: int, parts: int) -> list[int]:
    """``updates`` in as many parts, as equal as can be."""
    return [updates * (part + 1) // parts - updates * part // parts for part in range(parts)]


def _of_step(turns: Turns, pairs: Pairs, step: int) -> Turns:
    """Those of the phase of one of the student's steps."""
    regress = on_data(pairs.draw, partial(Regression(turns.setup.recipe, only=step), turns.setup.denoise), "regression")
    passed = step * turns.own.critic_warm_up
    return replace(
        turns,
        simulate=replace(turns.simulate, only=step),
        anchored=(regress, turns.anchored[1]),
        passed=passed,
        of=f" {step + 1}",
    )


def _matching(
    turns: Turns,
    pairs: Pairs,
    anchors: Anchors | None,
    after: Mapping[str, Callable[[], None]],
    updates: int,
) -> list[Phase]:
    """The critic alone, then both in turn."""
    settings, own, head = turns.setup.settings, turns.own, turns.head
    critic = Turn(
        CRITIC, turns.teach_critic, own.critic_learning_rate, 0.0, then=after["critic"], half_scale=SMALL_GRADIENTS
    )
    scale = SMALL_GRADIENTS if own.matching_scale == "mean" else 1.0
    student = Turn(STUDENT, turns.match, settings.learning_rate, 0.0, then=after["student"], half_scale=scale)
    warm_up, of_head = own.critic_warm_up if settings.steps else 0, head.turns if head else []
    ahead = [replace(turn, falls=False) for turn in (critic, *of_head[:1])]
    ahead_cost = turns.cost_of_critic + (head.cost_of_turn if head else 0.0)
    drawn = (pairs.blocks, pairs.solve_cost) if head and head.draws_pairs else (0, 0.0)
    both, made = [critic] * own.critic_updates + of_head + [student], _made(turns, pairs, anchors)
    return [
        Phase(f"critic{turns.of}", warm_up, ahead, ahead_cost, *drawn),
        Phase(f"{settings.method}{turns.of}", updates, both, turns.cost, *made, turns.rare),
    ]


def _made(turns: Turns, pairs: Pairs, anchors: Anchors | None) -> tuple[int, float]:
    """The updates of the run up to which the matching makes data, and what an update of these makes, in the mean."""
    own, found = turns.own, []
    if turns.head is not None and turns.head.draws_pairs:
        # in each update, and the anchor finds them made
        found.append((max(0, pairs.blocks - turns.first), pairs.solve_cost))
    elif own.anchor:
        found.append((own.anchor_every * max(0, pairs.blocks - turns.first), pairs.solve_cost / own.anchor_every))
    if anchors is not None:
        found.append((anchors.blocks, anchors.solve_cost))
    longest = max((updates for updates, _ in found), default=0)
    whole = sum(updates * cost for updates, cost in found)
    return turns.first + turns.passed + longest, whole / longest if longest else 0.0


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
    """The losses of both roles. anchored: of the student on what the teacher has made, beside the matching, and
    forwards of a sample in it; diversity: another of these. passed: updates of the critic alone since the matching
    began. of: after the names of the phase and its parts."""

    setup: Setup
    objective: Objective
    extras: Extras
    simulate: BackwardSimulation
    anchored: tuple[Loss, float]
    diversity: Loss | None = None
    head: HeadTurns | None = None
    passed: int = 0
    of: str = ""
    _kept: dict[tuple[int, ...], Drawn] = field(default_factory=dict, compare=False)

    # -- the critic ---------------------------------------------------------------------------------------------------

    def teach_critic(self, batch: Batch, share: float, update: int) -> Mapping[str, Any]:
        """The critic's loss on the student's own pictures."""
        if self.own.critic_pictures == "shared":
            of, drawn = self._shared(batch)
            batch = replace(batch, cond=of.cond, null=of.null, shape=of.shape, teachers=of.teachers)
        else:
            with torch.no_grad():
                drawn = self.simulate(batch)
        later: list[Branch] = []
        loss = self.at(update, drawn).critic_loss(self.setup.denoise, batch, drawn.x0, later)
        (share * loss).backward()
        for branch in later:
            branch.backward()
        return {"critic": loss.detach()}

    def _shared(self, batch: Batch) -> tuple[Batch, Drawn]:
        """The samples of the update's first turn, and the student's pictures of them. They are a function of these and
        of the student, which stays as it is while the critic learns: a run that goes on between two of its turns makes
        them again."""
        turns = self.own.critic_updates + 1 + (len(self.head.turns) if self.head else 0)
        first = self.setup.prompts.batch(batch.step - batch.step % turns, batch.samples)
        key = (first.step, *first.samples)
        if key not in self._kept:
            for other in [other for other in self._kept if other[0] != first.step]:
                del self._kept[other]
            with torch.no_grad(), record_function(PICTURE + self.of):
                self._kept[key] = self.simulate(first)
        return first, self._kept[key]

    # -- the student --------------------------------------------------------------------------------------------------

    def match(self, batch: Batch, share: float, update: int) -> Mapping[str, Any]:
        """<x, sg(G)>.backward(): the sum over a sample's elements, or their mean; the mean over samples."""
        own, denoise = self.own, self.setup.denoise
        if own.matching_scale == "mean":
            share = share / math.prod(batch.shape)
        # what goes back through other networks holds a graph of theirs: the student's is made after them
        with torch.set_grad_enabled(not self.planned.backwards):
            drawn = self.simulate(batch)
        objective = self.at(update, drawn)
        cotangent, scores = objective.cotangent(denoise, batch, drawn.x0)
        pull, judged = self.head.pull(batch, drawn.x0, self.index(update)) if self.head else (None, {})
        cotangent = cotangent if pull is None else cotangent + pull
        drawn = self.simulate.again(batch, drawn) if objective.backwards else drawn
        drawn.x0.backward(cotangent * (share / len(batch)))
        if self.extras.off is not None:
            self.extras.off(denoise, batch, drawn, objective, share)
        numbers = {**score_metrics(scores), **judged}
        # with the student's answer goes what its pass held for backward, before the anchors' graph takes the room
        del drawn, objective, cotangent, scores, pull
        return {**numbers, **self._beside(batch, share, update)}

    def _beside(self, batch: Batch, share: float, update: int) -> Mapping[str, Any]:
        """The anchors of the student, each on its data in the order that they are made in."""
        own, index = self.own, self.index(update)
        if own.anchor and index % own.anchor_every == 0:
            with record_function(ANCHOR + self.of):
                # each n-th time with n times the weight
                at = self.first + index // own.anchor_every
                self.anchored[0](batch, share * own.anchor * own.anchor_every, at)
        if self.diversity is None:
            return {}
        return self.diversity(batch, share * own.diversity_anchor, index)

    # -- where the run stands -----------------------------------------------------------------------------------------

    @property
    def own(self) -> Any:
        """The method's settings."""
        return self.setup.settings.own

    @property
    def first(self) -> int:
        """The first update of the matching."""
        return int(self.own.warm_start + self.own.critic_warm_up)

    def index(self, update: int) -> int:
        """Of an update among those of the matching; 0 before."""
        return max(0, update - self.first - self.passed)

    def at(self, update: int, drawn: Drawn) -> DistributionMatching:
        """The objective as it is at ``update``, for a step of the student."""
        settings, at_step = self.setup.settings, self.extras.at_step
        made = self.objective(settings, self.index(update) / max(1, settings.steps))
        made = replace(made, critic_weight=WEIGHTS[self.own.critic_weight])
        made = self.head.weighed(made) if self.head else made
        return made if at_step is None else at_step(made, self.setup.denoise.schedule, drawn)

    # -- what it costs ------------------------------------------------------------------------------------------------

    @property
    def planned(self) -> DistributionMatching:
        """The objective that costs are reckoned by, which are the same at every update."""
        return self.objective(self.setup.settings, 0.0)

    @property
    def cost(self) -> float:
        """Forwards of a sample in an update of the matching."""
        own, learn, picture = self.own, learning(self.setup.settings), self.simulate.cost
        planned, saved = self.planned, (self.own.critic_updates - 1) * (self.own.critic_pictures == "shared")
        scores = planned.forwards + planned.backwards * learn + (planned.backwards > 0)
        terms = [self.anchored[1] / own.anchor_every if own.anchor else 0.0, learn if self.diversity else 0.0]
        off = 0.0 if self.extras.off is None else learn + scores
        terms += [off, self.head.cost if self.head else 0.0]
        critic = own.critic_updates * self.cost_of_critic - saved * picture
        return critic + picture - 1 + learn + scores + sum(terms)

    @property
    def cost_of_critic(self) -> float:
        """Forwards of a sample in a turn of the critic, its picture among them."""
        return self.simulate.cost + learning(self.setup.settings) * self.planned.taught_forwards

    @property
    def rare(self) -> Mapping[str, float]:
        """`Phase.rare`."""
        rare = {ANCHOR + self.of: 1 / self.own.anchor_every, PICTURE + self.of: 1 / self.own.critic_updates}
        return rare | ({GAN: self.head.asked} if self.head else {})
