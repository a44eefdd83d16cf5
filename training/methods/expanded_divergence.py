r"""Uni-Instruct's divergences (arXiv:2505.20755): an f-divergence, expanded along the noise, by score identity.

    F = E_q[C(r) |y|^2],   y = s_F - s_T,   r = p(x_s) / q(x_s),   C = r^2 f''(r)

at each level, p the teacher's density and q the student's; s_F and s_T are the scores of critic and teacher. Its
gradient in the student is a sum of three (DI, FGM, SIM), where C is a constant of the last two:

    dF = E[r^2 C'' |y|^2 y . dx_s] + d E[(C - r C') |y|^2] - 2 d E[C y . (s_F - score(x_s | x))]

With y = alpha (K - R) / sigma^2 and s_F - score(x_s | x) = alpha (K - x) / sigma^2 it is 2 alpha^2 / sigma^4 times the
gradient of

    L = C (R - K) . (K - x) + (C - r C') |R - K|^2 / 2   and   r^2 C'' alpha^2 / sigma^2 |K - R|^2 (K - R) . dx / 2,

in whose place is the weight of distribution matching, w / E[C]. Where C = r (the KL) only the first part is there; by
the reverse KL (C = 1) it is score identity at alpha 1/2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.denoiser import Denoiser
from ...core.schedule import cast_as, expand
from ..engine.batch import Batch
from .distribution_matching import DistributionMatching, Scores
from .f_divergence import Ratios, Weigh
from .score_identity import through_networks


@dataclass(frozen=True)
class Expanded:
    """Of a divergence, functions of r [B]. sim: C. fgm: C - r C'. di: r^2 C''."""

    sim: Weigh
    fgm: Weigh
    di: Weigh


DIVERGENCES: dict[str, Expanded] = {
    "reverse-kl": Expanded(torch.ones_like, torch.ones_like, torch.zeros_like),
    # C = r: every mode of the teacher's is to be covered
    "kl": Expanded(lambda r: r, torch.zeros_like, torch.zeros_like),
    # C = 1 + r
    "jeffreys": Expanded(lambda r: 1 + r, torch.ones_like, torch.zeros_like),
    # C = r / (1 + r)
    "jensen-shannon": Expanded(
        lambda r: r / (1 + r), lambda r: r**2 / (1 + r) ** 2, lambda r: -2 * r**2 / (1 + r) ** 3
    ),
    # C = r^2
    "chi-square": Expanded(lambda r: r**2, lambda r: -(r**2), lambda r: 2 * r**2),
}
WEIGHTS: dict[str, Weigh] = {name: terms.sim for name, terms in DIVERGENCES.items()}
"""C by the divergence's name, which weighs what distribution matching has by itself."""
Ratio = Callable[[Scores], Tensor]
"""r [B] of samples."""


@dataclass(frozen=True)
class ExpandedDivergence:
    """ratio: r. mean: E[C] [1]."""

    terms: Expanded
    ratio: Ratio
    mean: Tensor

    def __call__(self, objective: DistributionMatching, denoise: Denoiser, batch: Batch, scores: Scores) -> Tensor:
        """What L has beside c_x = w C / E[C] (K - R)."""
        real, fake = scores.sides
        apart, r, mean = real - fake, self.ratio(scores), cast_as(self.mean, scores.x)
        w = objective.weight(denoise.schedule, scores)
        sim, fgm, di = (
            expand(cast_as(weigh(r), w) * w / cast_as(mean, w), apart)
            for weigh in (self.terms.sim, self.terms.fgm, self.terms.di)
        )
        c_real = sim * (fake - scores.x) + fgm * apart
        c_fake = sim * (apart - (fake - scores.x)) - fgm * apart
        pulled = through_networks(objective, denoise, batch, scores, c_real, c_fake)
        # alpha^2 / sigma^2 |y|^2 y, y in x0
        snr = expand((denoise.schedule.alpha(scores.sigma) / scores.sigma) ** 2, apart)
        return pulled - 0.5 * di * snr * expand(apart.square().flatten(1).sum(1), apart) * apart


def expanded(name: str, ratios: Ratios, denoise: Denoiser) -> ExpandedDivergence:
    """By the ratios of a head that learns."""

    def r(scores: Scores) -> Tensor:
        assert scores.logit is not None
        return ratios.scaled(denoise.schedule, scores.sigma, scores.logit)

    return ExpandedDivergence(DIVERGENCES[name], r, ratios.weight)
