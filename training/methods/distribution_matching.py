r"""The one training step of every distribution-matching method.

    critic:   x = sg(G(z)),  x_s = alpha x + sigma n,  L_F = w_F(lambda) |D_F(x_s) - x|^2
    student:  x = G(z),      G = h w (a_DM (D_F - D_c) - (k - 1) (D_c - D_u)) + Jacobian terms,   <x, sg(G)>.backward()

D_c, D_u: teacher with prompt and with the null condition; D_F: critic. The first difference matches distributions, the
second is guidance: plain DMD (arXiv:2311.18828, Eq. 7) has both at one level, Decoupled DMD (arXiv:2511.22677) each at
its own.
A method is a choice of the plug-ins below; its run is `alternating`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ...core.cond import Cond
from ...core.denoiser import Denoiser
from ...core.errors import OneStepError
from ...core.roles import TEACHER
from ...core.schedule import NoiseSchedule, add_noise, cast_as, expand
from ..engine.batch import Batch
from ..engine.levels import LevelSampler, LevelWeight, UniformTime, at, v_weight
from .branch import Branch
from .discriminator import Discriminator
from .guidance_scale import Scale, Tokens, added, guided, scale_of

CRITIC = "critic"


@dataclass(frozen=True)
class Scores:
    """What the networks say of the student's x at one noise level. All [B, ...], no graph; sigma [B].

    real: teacher with prompt. null: teacher with the null condition, or None unasked. fake: critic, None unasked.
    fake_null: critic with the null condition, None unless its own guidance is on. guided, fake_guided: D^k of the
    teacher and of the critic, None where there is no guidance. logit [B]: the discriminator's, or None.
    told: other numbers for the metrics.
    """

    x: Tensor
    x_s: Tensor
    sigma: Tensor
    real: Tensor
    null: Tensor | None = None
    fake: Tensor | None = None
    fake_null: Tensor | None = None
    guided: Tensor | None = None
    fake_guided: Tensor | None = None
    logit: Tensor | None = None
    told: dict[str, Any] = field(default_factory=dict)

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """(R, K): teacher's and critic's answer, guided where they are."""
        fake = self.fake if self.fake_guided is None else self.fake_guided
        assert fake is not None
        return self.real if self.guided is None else self.guided, fake


Renoise = Callable[[NoiseSchedule, Tensor, Tensor, Tensor], Tensor]
"""(schedule, x, noise, sigma) -> x_s."""
Weight = Callable[[NoiseSchedule, Scores], Tensor]
"""(schedule, scores) -> weight [B]."""
Ratio = Callable[[Scores], Tensor]
"""h(r) [B] of f-divergences; 1 for the reverse KL."""
Jacobian = Callable[["DistributionMatching", Denoiser, Batch, Scores], Tensor]
"""(objective, denoise, batch, scores) -> cotangent on x of terms through teacher and critic (`score_identity`)."""
Residual = Callable[[NoiseSchedule, Tensor, Tensor, Tensor], Tensor]
"""(schedule, the critic's answer, noise, sigma) -> what of it is in error, [B, ...]."""
Importance = Callable[[NoiseSchedule, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(schedule, x, x_s, noise, sigma) -> what a critic's sample weighs besides, [B]."""


@dataclass(frozen=True)
class DmdWeight:
    """1 / mean_CHW |x - D_real^k| (arXiv:2311.18828, Eq. 8). floor: of the mean, so that the weight of a sample that
    is almost the teacher's own has an end."""

    floor: float = 1e-5

    def __call__(self, schedule: NoiseSchedule, scores: Scores) -> Tensor:
        real = scores.real if scores.guided is None else scores.guided
        return 1 / (scores.x - real).abs().flatten(1).mean(1).clamp_min(self.floor)


dmd_weight = DmdWeight()


@dataclass(frozen=True)
class DistributionMatching:
    """guidance: k of the teacher. critic_guidance: k of the critic where the student asks it; 0 asks it without the
    prompt alone. taught: k that the critic learns under. rescale: phi of all (`guidance_scale.guided`). matching: a_DM.
    guidance_levels: None puts the guidance term at the matching term's level. null_rate: share of samples on which the
    critic learns the null condition. judge: whose logit of x_s the scores have. residual: what the critic is taught to
    bring to 0, where that is not D_F - x. apart: whether each role is asked in a forward of its own. teacher: the role
    that answers as it.
    """

    guidance: Scale = 2.0
    critic_guidance: Scale = 1.0
    taught: Scale = 1.0
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
    rescale: float = 0.0
    importance: Importance | None = None
    residual: Residual | None = None
    apart: bool = False
    judge: Discriminator | None = None
    teacher: str = TEACHER

    @property
    def forwards(self) -> int:
        """Of one sample in the student's cotangent."""
        apart = 0 if self.guidance_levels is None or self.guidance == 1 else 1
        return 2 + (self.guidance != 1) + (self.critic_guidance not in (0, 1)) + apart

    @property
    def backwards(self) -> int:
        """Of these, those that the cotangent goes back through, each after one forward more."""
        return 0 if self.jacobian is None else self.forwards

    @property
    def taught_forwards(self) -> int:
        """Of one sample in the critic's loss, with a backward each."""
        return 1 if self.taught in (0, 1) else 2

    # -- the critic ---------------------------------------------------------------------------------------------------

    def critic_loss(self, denoise: Denoiser, batch: Batch, x: Tensor, later: list[Branch] | None = None) -> Tensor:
        """w_F |D_F(x_s) - sg(x)|^2: mean over elements and samples. x: the student's, [B, ...]. later: takes what of a
        sliced batch is run backward after the loss has been, so that one branch of guidance has a graph at a time."""
        batch = batch.with_nulls(self.null_rate, "critic null")
        sigma = self._levels(denoise, self.critic_levels, batch, "critic level")
        x, noise = x.detach(), batch.normal("critic noise")
        x_s = self.renoise(denoise.schedule, x, noise, sigma)
        with denoise.roles.use(CRITIC):
            answer = self._taught(denoise, batch, x_s, sigma, later)
        left = answer - x if self.residual is None else self.residual(denoise.schedule, answer, noise, sigma)
        error = left.square().flatten(1).mean(1)
        weighed = cast_as(at(self.critic_weight, denoise.schedule, sigma), error) * error
        if self.importance is not None:
            weighed = cast_as(self.importance(denoise.schedule, x, x_s, noise, sigma), error) * weighed
        return weighed.mean()

    def _taught(
        self, denoise: Denoiser, batch: Batch, x_s: Tensor, sigma: Tensor, later: list[Branch] | None
    ) -> Tensor:
        """D_F, or D_F^k, with a graph."""
        if self.taught == 1:
            return denoise(x_s, sigma, batch.cond)
        nulls = self._nulls(batch)
        if self.taught == 0:
            return denoise(x_s, sigma, nulls)
        if batch.sliced and later is not None:
            later.append(branch := Branch(denoise, CRITIC, x_s, sigma, batch.cond))
            d_c, d_u = branch.answer, denoise(x_s, sigma, nulls)
        elif batch.sliced:
            d_c, d_u = denoise(x_s, sigma, batch.cond), denoise(x_s, sigma, nulls)
        else:
            both = denoise(torch.cat([x_s, x_s]), sigma.repeat(2), Cond.concat([batch.cond, nulls]))
            d_c, d_u = both.chunk(2)
        return guided(d_c, d_u, scale_of(self.taught, batch), self.rescale, tokens_of(denoise, x_s))

    # -- the student --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def cotangent(self, denoise: Denoiser, batch: Batch, x: Tensor, stream: str = "") -> tuple[Tensor, Scores]:
        """G [B, ...], the gradient of the loss in the student's x [B, ...], and the scores it was made of. stream:
        before the names of its random numbers."""
        x = x.detach()
        scores = self.scores(denoise, batch, x, self.levels, f"{stream}match", critic=True)
        g = self.matching * self._match(denoise, batch, scores)
        if self.guidance != 1:
            g = g + self._guide(denoise, batch, scores, f"{stream}guide")
        if self.jacobian is not None:
            g = g + self.jacobian(self, denoise, batch, scores)
        return g, scores

    def scores(
        self, denoise: Denoiser, batch: Batch, x: Tensor, levels: LevelSampler, stream: str, *, critic: bool
    ) -> Scores:
        """Every answer about x at one level, from one forward: rows of the teacher, then rows of the critic; or, of
        a sliced batch, from a forward for each."""
        sigma = self._levels(denoise, levels, batch, f"{stream} level")
        x_s = self.renoise(denoise.schedule, x, batch.normal(f"{stream} noise"), sigma)
        asked = self.asked(batch, critic)
        answers: dict[str, Any] = {}
        for some in [[one] for one in asked] if batch.sliced or self.apart else [asked]:
            blocks = [(role, len(x) * len([*rows])) for role, rows in groupby(role for role, _, _ in some)]
            with denoise.roles.rows(blocks), self._judging(x_s, some[0][1]) as seen:
                conds = Cond.concat([cond for _, _, cond in some])
                answer = denoise(torch.cat([x_s] * len(some)), sigma.repeat(len(some)), conds)
            if self.judge is not None and seen:
                # the teacher with the prompt comes first
                answers["logit"] = self.judge.logit([value[: len(x)] for value in seen])
            answers |= zip([name for _, name, _ in some], answer.chunk(len(some)), strict=True)
        for side, with_prompt, without, k in (
            ("guided", "real", "null", self.guidance),
            ("fake_guided", "fake", "fake_null", self.critic_guidance),
        ):
            if without in answers:
                pair, scale = (answers[with_prompt], answers[without]), scale_of(k, batch)
                answers[side] = guided(*pair, scale, self.rescale, tokens_of(denoise, x_s))
        return Scores(x, x_s, sigma, **answers)

    def _judging(self, x_s: Tensor, first: str) -> AbstractContextManager[list[Tensor]]:
        """Within, a forward whose first answer is ``first`` leaves the teacher's features."""
        return nullcontext([]) if self.judge is None or first != "real" else self.judge.features.kept(x_s)

    def asked(self, batch: Batch, critic: bool) -> list[tuple[str, str, Cond]]:
        """(role, answer's name, conditions) of each row block; critic blocks last."""
        apart = self.guidance_levels is not None and critic
        asked = [(self.teacher, "real", batch.of_teacher)]
        if self.guidance != 1 and not apart:
            asked.append((self.teacher, "null", self._nulls(batch)))
        if critic and self.critic_guidance == 0:
            asked.append((CRITIC, "fake", self._nulls(batch)))
        elif critic:
            asked.append((CRITIC, "fake", batch.cond))
        if critic and self.critic_guidance not in (0, 1):
            asked.append((CRITIC, "fake_null", self._nulls(batch)))
        return asked

    def _match(self, denoise: Denoiser, batch: Batch, scores: Scores) -> Tensor:
        """w h (D_F - D_c), and the critic's own guidance where it has any."""
        assert scores.fake is not None
        delta = scores.fake - scores.real
        if scores.fake_null is not None:
            # D_F^k - D_c = (D_F - D_c) + (k_F - 1) (D_F - D_F,u): PG-SB and VSD guide both sides
            k = scale_of(self.critic_guidance, batch)
            delta = delta + added(scores.fake, scores.fake_null, k, self.rescale, tokens_of(denoise, scores.x_s))
        return self._weighed(denoise, scores, delta)

    def _guide(self, denoise: Denoiser, batch: Batch, scores: Scores, stream: str) -> Tensor:
        """- w h (k - 1) (D_c - D_u), at the matching term's level or at its own."""
        if self.guidance_levels is not None:
            scores = self.scores(denoise, batch, scores.x, self.guidance_levels, stream, critic=False)
        assert scores.null is not None
        tokens = tokens_of(denoise, scores.x_s)
        k = scale_of(self.guidance, batch)
        return self._weighed(denoise, scores, -added(scores.real, scores.null, k, self.rescale, tokens))

    def _weighed(self, denoise: Denoiser, scores: Scores, delta: Tensor) -> Tensor:
        weighed = expand(self.weight(denoise.schedule, scores), delta) * delta
        return weighed if self.ratio is None else expand(self.ratio(scores), delta) * weighed

    def _levels(self, denoise: Denoiser, levels: LevelSampler, batch: Batch, stream: str) -> Tensor:
        return levels(denoise.schedule, batch.uniform(stream))

    def _nulls(self, batch: Batch) -> Cond:
        nulls = batch.nulls()
        if nulls is None:
            raise OneStepError(
                f"this base has no trained null condition, so guidance {self.guidance} cannot be had: "
                "set matching_guidance to 1"
            )
        return nulls


def tokens_of(denoise: Denoiser, x_s: Tensor) -> Tokens:
    """What guidance needs of a denoiser with a token_norm."""
    return (denoise.token_norm, x_s) if denoise.token_norm else None


def score_metrics(scores: Scores) -> Mapping[str, Any]:
    """gap = rms(D_F - D_c) / rms(D_c - x); cos of the two; mean and standard deviation of the student's x."""
    numbers = {"x_mean": scores.x.mean(), "x_std": scores.x.std(), **scores.told}
    if scores.logit is not None:
        numbers["logit"] = scores.logit.mean()
    if scores.fake is None:
        return numbers
    delta, pull = scores.fake - scores.real, scores.real - scores.x
    cos = torch.cosine_similarity(delta.flatten(1), pull.flatten(1)).mean()
    return numbers | {"gap": delta.norm() / pull.norm().clamp_min(1e-12), "cos": cos}
