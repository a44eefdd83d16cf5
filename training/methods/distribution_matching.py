r"""The one training step of every distribution-matching method.

    critic:   x = sg(G(z)),  x_s = alpha x + sigma n,  L_F = w_F(lambda) |D_F(x_s) - x|^2
    student:  x = G(z),      G = h w (a_DM (D_F - D_c) - (k - 1) (D_c - D_u)) + Jacobian terms,   <x, sg(G)>.backward()

D_c, D_u: teacher with prompt and with the null condition; D_F: critic. The first difference matches distributions, the
second is guidance: plain DMD (arXiv:2311.18828, Eq. 7) has both at one level, Decoupled DMD (arXiv:2511.22677) each at
its own.
A method is a choice of the plug-ins below; `alternating` is its run: a warm start, the critic alone, then both in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from ...core.cond import Cond
from ...core.denoiser import Denoiser
from ...core.errors import OneStepError
from ...core.roles import TEACHER
from ...core.schedule import NoiseSchedule, add_noise, expand
from ..data.pairs import Pairs
from ..engine.batch import Batch
from ..engine.levels import LevelSampler, LevelWeight, UniformTime, at, v_weight
from ..engine.setup import Setup
from ..engine.student import STUDENT, generate
from ..engine.turns import Loss, Phase, Plan, Turn, learning, nothing, on_data
from .regression import Regression

CRITIC = "critic"
ANCHOR = "anchor"  # what a profile of a run calls the regression beside the matching


@dataclass(frozen=True)
class Scores:
    """What the networks say of the student's x at one noise level. All [B, ...], no graph; sigma [B].

    real: teacher with prompt. null: teacher with the null condition, or None unasked. fake: critic, None unasked.
    fake_null: critic with the null condition, None unless its own guidance is on.
    """

    x: Tensor
    x_s: Tensor
    sigma: Tensor
    real: Tensor
    null: Tensor | None = None
    fake: Tensor | None = None
    fake_null: Tensor | None = None


Renoise = Callable[[NoiseSchedule, Tensor, Tensor, Tensor], Tensor]
"""(schedule, x, noise, sigma) -> x_s."""
Weight = Callable[[NoiseSchedule, Scores, float], Tensor]
"""(schedule, scores, k) -> weight [B]."""
Ratio = Callable[[Scores], Tensor]
"""h(r) [B] of f-divergences; 1 for the reverse KL."""
Jacobian = Callable[[Denoiser, Batch, Scores], Tensor]
"""Cotangent on x of terms through teacher and critic (SiD, SIM)."""


def dmd_weight(schedule: NoiseSchedule, scores: Scores, k: float) -> Tensor:
    """1 / mean_CHW |x - D_real^k| (arXiv:2311.18828, Eq. 8), never above 1e5."""
    real = scores.real if scores.null is None else scores.null + k * (scores.real - scores.null)
    return 1 / (scores.x - real).abs().flatten(1).mean(1).clamp_min(1e-5)


@dataclass(frozen=True)
class DistributionMatching:
    """guidance: k of the teacher. critic_guidance: k of the critic where the student asks it; it is taught without.
    matching: a_DM. guidance_levels: None puts the guidance term at the matching term's level. null_rate: share of
    samples on which the critic learns the null condition.
    """

    guidance: float = 2.0
    critic_guidance: float = 1.0
    matching: float = 1.0
    levels: LevelSampler = UniformTime()
    guidance_levels: LevelSampler | None = None
    critic_levels: LevelSampler = UniformTime(0.0, 1.0)
    critic_weight: LevelWeight = v_weight
    weight: Weight = dmd_weight
    ratio: Ratio | None = None
    renoise: Renoise = add_noise
    jacobian: Jacobian | None = None
    null_rate: float = 0.0

    # -- the critic ---------------------------------------------------------------------------------------------------

    def critic_loss(self, denoise: Denoiser, batch: Batch, x: Tensor) -> Tensor:
        """w_F |D_F(x_s) - sg(x)|^2: mean over elements and samples. x: the student's, [B, ...]."""
        batch = batch.with_nulls(self.null_rate, "critic null")
        sigma = self._levels(denoise, self.critic_levels, batch, "critic level")
        x = x.detach()
        x_s = self.renoise(denoise.schedule, x, batch.normal("critic noise"), sigma)
        with denoise.roles.use(CRITIC):
            error = (denoise(x_s, sigma, batch.cond) - x).square().flatten(1).mean(1)
        return (at(self.critic_weight, denoise.schedule, sigma).to(error) * error).mean()

    # -- the student --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def cotangent(self, denoise: Denoiser, batch: Batch, x: Tensor) -> tuple[Tensor, Scores]:
        """G [B, ...], the gradient of the loss in the student's x [B, ...], and the scores it was made of."""
        x = x.detach()
        scores = self.scores(denoise, batch, x, self.levels, "match", critic=True)
        g = self.matching * self._match(denoise, scores)
        if self.guidance != 1:
            g = g + self._guide(denoise, batch, scores)
        if self.jacobian is not None:
            g = g + self.jacobian(denoise, batch, scores)
        return g, scores

    def scores(
        self, denoise: Denoiser, batch: Batch, x: Tensor, levels: LevelSampler, stream: str, *, critic: bool
    ) -> Scores:
        """Every answer about x at one level, from one forward: rows of the teacher, then rows of the critic."""
        sigma = self._levels(denoise, levels, batch, f"{stream} level")
        x_s = self.renoise(denoise.schedule, x, batch.normal(f"{stream} noise"), sigma)
        asked = self._asked(batch, critic)
        teachers = sum(role == TEACHER for role, _, _ in asked)
        blocks = [(TEACHER, teachers * len(x)), (CRITIC, (len(asked) - teachers) * len(x))]
        with denoise.roles.rows([block for block in blocks if block[1]]):
            conds = Cond.concat([cond for _, _, cond in asked])
            answer = denoise(torch.cat([x_s] * len(asked)), sigma.repeat(len(asked)), conds)
        answers = dict(zip([name for _, name, _ in asked], answer.chunk(len(asked)), strict=True))
        return Scores(x, x_s, sigma, **answers)

    def _asked(self, batch: Batch, critic: bool) -> list[tuple[str, str, Cond]]:
        """(role, answer's name, conditions) of each row block; critic blocks last."""
        apart = self.guidance_levels is not None and critic
        asked = [(TEACHER, "real", batch.cond)]
        if self.guidance != 1 and not apart:
            asked.append((TEACHER, "null", self._nulls(batch)))
        if critic:
            asked.append((CRITIC, "fake", batch.cond))
        if critic and self.critic_guidance != 1:
            asked.append((CRITIC, "fake_null", self._nulls(batch)))
        return asked

    def _match(self, denoise: Denoiser, scores: Scores) -> Tensor:
        """w h (D_F - D_c), and the critic's own guidance where it has any."""
        assert scores.fake is not None
        delta = scores.fake - scores.real
        if scores.fake_null is not None:
            # D_F^k - D_c = (D_F - D_c) + (k_F - 1) (D_F - D_F,u): PG-SB and VSD guide both sides
            delta = delta + (self.critic_guidance - 1) * (scores.fake - scores.fake_null)
        return self._weighed(denoise, scores, delta)

    def _guide(self, denoise: Denoiser, batch: Batch, scores: Scores) -> Tensor:
        """- w h (k - 1) (D_c - D_u), at the matching term's level or at its own."""
        if self.guidance_levels is not None:
            scores = self.scores(denoise, batch, scores.x, self.guidance_levels, "guide", critic=False)
        assert scores.null is not None
        return self._weighed(denoise, scores, -(self.guidance - 1) * (scores.real - scores.null))

    def _weighed(self, denoise: Denoiser, scores: Scores, delta: Tensor) -> Tensor:
        weighed = expand(self.weight(denoise.schedule, scores, self.guidance), delta) * delta
        return weighed if self.ratio is None else expand(self.ratio(scores), delta) * weighed

    def _levels(self, denoise: Denoiser, levels: LevelSampler, batch: Batch, stream: str) -> Tensor:
        return levels(denoise.schedule, batch.uniform(stream))

    def _nulls(self, batch: Batch) -> Cond:
        nulls = batch.nulls()
        if nulls is None:
            raise OneStepError(
                f"this base has no trained null condition, so guidance {self.guidance:g} cannot be had: "
                "set matching_guidance to 1"
            )
        return nulls


# -- a run ------------------------------------------------------------------------------------------------------------


def alternating(setup: Setup, objective: DistributionMatching) -> Plan:
    """Regression on the teacher's pairs, the critic alone, then critic and student in turn (arXiv:2405.14867)."""
    settings, own, roles = setup.settings, setup.settings.own, setup.denoise.roles
    add_critic(setup)
    pairs = Pairs(setup.host, setup.prompts, settings, setup.folder / "pairs")
    regress = on_data(pairs.draw, partial(Regression(setup.recipe), setup.denoise), "regression")
    # IDA (SenseFlow, arXiv:2506.00523)
    follow = partial(roles.lerp, CRITIC, STUDENT, own.follow) if own.follow else nothing
    turns = Turns(setup, objective, regress if own.anchor else None, own.anchor)
    critic = Turn(CRITIC, turns.teach_critic, own.critic_learning_rate, 0.0, half_scale=1024.0)
    warm = Turn(STUDENT, regress, own.warm_start_rate, then=follow)
    student = Turn(STUDENT, turns.match, settings.learning_rate, 0.0, then=follow)
    # forwards of a sample: the student's picture and the loss of each critic; picture, three scores and anchor
    learn, fresh = learning(settings), (pairs.blocks, pairs.solve_cost)
    cost = (1 + learn) * own.critic_updates + learn + 3 + (learn if own.anchor else 0)
    return Plan(
        [STUDENT, CRITIC],
        [
            Phase("warm start", own.warm_start, [warm], learn, *fresh),
            Phase("critic", own.critic_warm_up if settings.steps else 0, [replace(critic, falls=False)], 1 + learn),
            Phase(settings.method, settings.steps, [critic] * own.critic_updates + [student], cost, *fresh),
        ],
    )


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
    """The losses of both roles. regress: of the student on pairs, ``anchor`` of which stands beside the matching."""

    setup: Setup
    objective: DistributionMatching
    regress: Loss | None = None
    anchor: float = 0.0

    def teach_critic(self, batch: Batch, share: float, update: int) -> Mapping[str, Any]:
        """The critic's loss on the student's own pictures."""
        with torch.no_grad():
            x = generate(self.setup.denoise, self.setup.recipe, batch)
        loss = self.objective.critic_loss(self.setup.denoise, batch, x)
        (share * loss).backward()
        return {"critic": loss.detach()}

    def match(self, batch: Batch, share: float, update: int) -> Mapping[str, Any]:
        """<x, sg(G)>.backward(): the sum over a sample's elements, the mean over samples."""
        x = generate(self.setup.denoise, self.setup.recipe, batch)
        cotangent, scores = self.objective.cotangent(self.setup.denoise, batch, x)
        x.backward(cotangent * (share / len(batch)))
        if self.regress is not None:
            with record_function(ANCHOR):
                self.regress(batch, share * self.anchor, update)
        return score_metrics(scores)


def score_metrics(scores: Scores) -> Mapping[str, Any]:
    """gap = rms(D_F - D_c) / rms(D_c - x); cos of the two; mean and standard deviation of the student's x."""
    numbers = {"x_mean": scores.x.mean(), "x_std": scores.x.std()}
    if scores.fake is None:
        return numbers
    delta, pull = scores.fake - scores.real, scores.real - scores.x
    cos = torch.cosine_similarity(delta.flatten(1), pull.flatten(1)).mean()
    return numbers | {"gap": delta.norm() / pull.norm().clamp_min(1e-12), "cos": cos}
