r"""Score identity distillation (SiD, arXiv:2404.04057; guided, arXiv:2406.01561), as the authors' code has it.

    L = w (R - K) . ((R - x) - a (R - K)),   R = D_T(x_s),  K = D_F(x_s),  x_s = alpha x + sigma n

The weight w is a constant of the gradient; R and K are not: L is the squared distance of two scores, and so is its
gradient in x, through both networks. L is bilinear in R, K and x, whence the cotangent of each:

    c_x = -w (R - K),   c_R = w ((R - x) + (1 - 2 a)(R - K)),   c_K = w (2 a (R - K) - (R - x)),
    G = c_x + alpha (J_R^T c_R + J_K^T c_K)

c_x is what distribution matching has by itself, w (K - R), guided as it may be; the rest is `ScoreIdentity`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.denoiser import Denoiser
from ...core.schedule import expand
from ..engine.batch import Batch
from ..settings import Settings
from .distribution_matching import DistributionMatching, Scores, Weight, tokens_of
from .guidance_scale import Tokens, guided, scale_of
from .guidance_strategy import strategy_at
from .matching_settings import levels_at
from .pull_back import pulled_back


def through_networks(
    objective: DistributionMatching, denoise: Denoiser, batch: Batch, scores: Scores, c_real: Tensor, c_fake: Tensor
) -> Tensor:
    """alpha (J_R^T c_R + J_K^T c_K) [B, ...], guidance on either side branch by branch."""
    guide = Guide(objective.rescale, tokens_of(denoise, scores.x_s))
    k, k_f = (scale_of(scale, batch) for scale in (objective.guidance, objective.critic_guidance))
    of_real, in_real = guide.back(scores, ("real", "null"), k, c_real)
    of_fake, in_fake = guide.back(scores, ("fake", "fake_null"), k_f, c_fake)
    cotangents = of_real | of_fake
    asked = [(role, cond, cotangents[name]) for role, name, cond in objective.asked(batch, critic=True)]
    alpha = expand(denoise.schedule.alpha(scores.sigma), in_real)
    return pulled_back(denoise, scores, asked) + alpha * (in_real + in_fake)


@dataclass(frozen=True)
class Guide:
    """What guidance is made with, beside its scale."""

    rescale: float
    tokens: Tokens

    def back(
        self, scores: Scores, names: tuple[str, str], k: Tensor, cotangent: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The cotangents of an answer with the prompt and without, by their names in `Scores`, and of x_s where
        guidance itself reads it, for that of D^k; one that is not guided passes it on."""
        with_prompt, without = names
        d_c, d_u = getattr(scores, with_prompt), getattr(scores, without)
        if d_u is None:
            return {with_prompt: cotangent}, torch.zeros_like(cotangent)
        with torch.enable_grad():
            d_c, d_u, x_s = (value.detach().requires_grad_() for value in (d_c, d_u, scores.x_s))
            of = None if self.tokens is None else (self.tokens[0], x_s)
            # k c and (1 - k) c, where nothing is rescaled
            answer = guided(d_c, d_u, k, self.rescale, of)
            found = torch.autograd.grad(answer, [d_c, d_u, x_s], cotangent, materialize_grads=True)
        return {with_prompt: found[0], without: found[1]}, found[2]


@dataclass(frozen=True)
class ScoreIdentity:
    """alpha: a of the equation. 1/2 is the distance of the scores itself; with 1 the student's own spread is held
    still."""

    alpha: float = 1.0

    def __call__(self, objective: DistributionMatching, denoise: Denoiser, batch: Batch, scores: Scores) -> Tensor:
        real, fake = scores.sides
        apart, to_real = real - fake, real - scores.x
        w = expand(objective.weight(denoise.schedule, scores), apart)
        c_real = w * (to_real + (1 - 2 * self.alpha) * apart)
        c_fake = w * (2 * self.alpha * apart - to_real)
        return through_networks(objective, denoise, batch, scores, c_real, c_fake)


def score_identity(settings: Settings, along: float, alpha: float, weight: Weight) -> DistributionMatching:
    """The objective of a method by score identity, at ``along`` of its matching, 0 to 1."""
    own = settings.own
    strategy = strategy_at(own, along)
    return DistributionMatching(
        guidance=strategy.teacher,
        critic_guidance=strategy.critic,
        taught=strategy.critic,
        null_rate=strategy.null_rate,
        levels=levels_at(own, along),
        weight=weight,
        rescale=own.guidance_rescale,
        jacobian=ScoreIdentity(alpha),
    )
