r"""Distillation-DPO (arXiv:2504.11447): of two pictures that the student draws for a prompt, the one with more of a
reward is drawn towards the teacher, and the other one away from it.

    x_w, x_l = G(z, c), G(z', c),  r(x_w) >= r(x_l);   critic F_w learns of x_w, critic F_l of x_l, as dmd's does
    G_w = 2 s(-m) w (D_{F_w} - D_T)(x_w),   G_l = -2 s(-m) w (D_{F_l} - D_T)(x_l),   both 0 where m >= cap
    m = beta ((e_T - e_{F_l})(x_l) - (e_T - e_{F_w})(x_w)),   e_R(x) = w(lambda) mean |D_R(x_s, c) - x|^2

The reward needs no gradient. T: the base, the adapters off. m: by how much more the worse ones than the better ones
are the critics' and not the teacher's, in errors of denoising as Diffusion-DPO's margin has them (arXiv:2311.12908,
Eq. 14); s: the logistic function, 2 s(0) = 1. The authors' code has no such weight, and the worse pictures are pushed
without end; that it falls with the margin and ends at a cap is ours, and so is what concerns pictures: they complete
LiDAR scenes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.router import Router
from ...core.schedule import cast_as, expand
from ..engine.batch import Batch
from ..engine.levels import WEIGHTS, at, v_weight
from ..engine.setup import Setup
from ..engine.student import STUDENT, BackwardSimulation
from ..engine.turns import Phase, Plan, Turn, learning
from ..host import Host
from ..settings import Settings, setting
from .alternating import SMALL_GRADIENTS, add_critic
from .distribution_matching import CRITIC, DistributionMatching, Scores
from .dmd import dmd
from .drawn_pairs import RANKED_BY, REWARD_MODEL, DrawnPairs
from .matching_settings import CriticSettings, Fitting, GuidanceSettings, LevelSettings, check_matching
from .method import Method
from .rewards import ranked, rewards_of


@dataclass(frozen=True)
class DistillationDpoSettings(Fitting, LevelSettings, CriticSettings, GuidanceSettings):
    """The reward, and how far a pair is told apart."""

    follow: ClassVar[float] = 0.0
    diversity_anchor: ClassVar[float] = 0.0
    step_loras: ClassVar[bool] = False
    warm_start: ClassVar[int] = 0
    separate_levels: ClassVar[bool] = False
    guidance_schedule: ClassVar[str] = "constant"
    guidance_end: ClassVar[float] = 1.0
    guidance_rescale: ClassVar[float] = 0.0
    normaliser_floor: ClassVar[float] = 1e-5
    level_high_end: ClassVar[float] = 0.0
    matching_weight: ClassVar[float] = 1.0

    reward: str = setting("saturation, contrast", RANKED_BY)
    reward_model: str = setting("", REWARD_MODEL)
    beta: float = setting(
        10.0, "How soon a pair counts as told apart: the margin of its squared errors times this.", 0.01, 10_000
    )
    margin_cap: float = setting(
        3.0, "The margin from which on a pair teaches nothing more: at 3 it is told apart with 95%.", 0.1, 100
    )


@dataclass(frozen=True)
class PairTurns:
    """The losses of both roles."""

    setup: Setup
    pairs: DrawnPairs
    objective: DistributionMatching

    def teach_critics(self, batch: Batch, share: float, update: int) -> Mapping[str, Any]:
        """Each critic on what is its own of the student's pictures."""
        pair, losses = self.pairs(batch)[0], []
        for side, drawn in enumerate(pair.both):
            with self.setup.denoise.roles.steps.told(side):
                loss = self.objective.critic_loss(self.setup.denoise, batch, drawn.x0)
                (share * loss).backward()
            losses.append(loss.detach())
        return {"critic": torch.stack(losses).mean()}

    def match(self, batch: Batch, share: float, update: int) -> Mapping[str, Any]:
        """<x_w, sg(G_w)> + <x_l, sg(G_l)>, one after the other: a graph of one picture at a time."""
        denoise = self.setup.denoise
        pair, numbers = self.pairs(batch)
        found = []
        for side, drawn in enumerate(pair.both):
            with denoise.roles.steps.told(side):
                found.append(self.objective.cotangent(denoise, batch, drawn.x0))
        (g_w, better), (g_l, worse) = found
        margin = self.margin(better, worse)
        weight = self.weight(margin) * pair.told_apart.to(margin)
        for drawn, g in zip(pair.both, (g_w, -g_l), strict=True):
            x = self.pairs.simulate.again(batch, drawn).x0
            x.backward(expand(weight, g) * g * (share / self._scale(batch)))
            del x
        told_apart = (margin > 0).double().mean()
        return {**numbers, "margin": margin.mean(), "told_apart": told_apart}

    def margin(self, better: Scores, worse: Scores) -> Tensor:
        """m [B], float64."""

        def ratio(scores: Scores) -> Tensor:
            # e_T - e_F: how much likelier x is to the critic than to the teacher
            assert scores.fake is not None
            errors = [(answer - scores.x).double().square().flatten(1).mean(1) for answer in (scores.real, scores.fake)]
            return cast_as(at(v_weight, self.setup.denoise.schedule, scores.sigma), errors[0]) * (errors[0] - errors[1])

        return self.setup.settings.own.beta * (ratio(worse) - ratio(better))

    def weight(self, margin: Tensor) -> Tensor:
        """2 s(-m), 0 from the cap on."""
        return 2 * torch.sigmoid(-margin) * (margin < self.setup.settings.own.margin_cap)

    def _scale(self, batch: Batch) -> int:
        each = torch.Size(batch.shape).numel() if self.setup.settings.own.matching_scale == "mean" else 1
        return len(batch) * each


def plan(setup: Setup) -> Plan:
    """Both critics alone, then they and the student in turn."""
    settings, own, roles = setup.settings, setup.settings.own, setup.denoise.roles
    add_critic(setup)
    # which of the two serves is always told: the centroids are never asked
    roles.split(CRITIC, Router(torch.zeros(2, 1)))
    objective = replace(dmd(settings), critic_weight=WEIGHTS[own.critic_weight])
    pairs = DrawnPairs(BackwardSimulation(setup.denoise, setup.recipe), ranked(setup))
    turns = PairTurns(setup, pairs, objective)
    critic = Turn(CRITIC, turns.teach_critics, own.critic_learning_rate, 0.0, half_scale=SMALL_GRADIENTS)
    scale = SMALL_GRADIENTS if own.matching_scale == "mean" else 1.0
    student = Turn(STUDENT, turns.match, settings.learning_rate, 0.0, half_scale=scale)
    of_pair, learn = pairs.cost, 2 * learning(settings)
    cost = own.critic_updates * (of_pair + learn) + of_pair + 2 * objective.forwards + learn
    ahead = Phase("critic", own.critic_warm_up, [replace(critic, falls=False)], of_pair + learn)
    both = [critic] * own.critic_updates + [student]
    return Plan([STUDENT, CRITIC], [ahead, Phase(settings.method, settings.steps, both, cost)])


def check(host: Host, settings: Settings) -> None:
    """Raises OneStepError as dmd's, and for rewards that are not there."""
    rewards_of(settings, host.device.type == "meta")
    check_matching(host, settings)


def note(settings: Settings) -> str:
    if settings.initial_lora:
        return ""
    return "no initial_lora: the pairs are of the base itself in few steps; begin with a student that draws already"


METHOD = Method(
    name="distillation-dpo",
    title="Distillation with preferences: the student's own pictures, ranked by a reward",
    paper="arXiv:2504.11447",
    forwards="19.7 + 13.5 a critic update, the decoder twice in each",
    plan=plan,
    settings=DistillationDpoSettings,
    check=check,
    note=note,
)
