"""Noise consistency training (NCT, arXiv:2506.19741): a control for a frozen one-step generator, without pictures.

G is the generator, C the control's extractor, f is G with the adapter. A noise and its control belong together:

    x = G(z),  c = C(x),  z_t = sqrt(1 - s_t^2) z + s_t e,  s_0 = 0, s_1 = 1,  z and e ~ N(0, I)

Each z_t is standard normal, so f may be asked at each; the further t, the less z_t knows of c. What holds at z (the
boundary, f(z, c) = x) is carried step by step to t = 1, where the noise is any, by asking neighbours for the same:

    L = d(f(z_t, c), sg f(z_r, c)) + lambda d(f(z, c), x),   t and r neighbours, the same e for both

Public of the paper are these terms. Ours: the levels and how they grow finer, d, lambda = 1, and that neighbours of t =
0 take x itself for f(z, c).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.denoiser import Denoiser
from ...core.recipe import Recipe
from ...core.sampling import fed_latents
from ...core.schedule import expand
from ..batch import Batch
from ..student import STUDENT, level


@dataclass(frozen=True)
class Triples:
    """B noises z [B, C, h, w], what the generator makes of them, x, and its control pictures c [B, ., H, W]; levels: N,
    in how many steps t goes from 0 to 1."""

    noise: Tensor
    x: Tensor
    control: Tensor
    levels: int


Source = Callable[[Batch, int], tuple[Batch, Triples]]
"""(batch, update) -> the triples that this update looks at, and their batch."""


@dataclass(frozen=True)
class NoiseConsistency:
    """The loss, as a direct method (training.direct). boundary: lambda."""

    recipe: Recipe
    source: Source
    boundary: float = 1.0

    def draw(self, batch: Batch, update: int) -> tuple[Batch, Triples]:
        return self.source(batch, update)

    def loss(self, denoise: Denoiser, batch: Batch, data: Triples) -> Tensor:
        """A sum over a sample's elements, so to say: d is of whole samples. A mean over samples."""
        step = 1 + (batch.uniform("nct level") * data.levels).floor()
        fresh = batch.normal("nct noise")
        t, r = step / data.levels, (step - 1) / data.levels
        with torch.no_grad():
            earlier = controlled(denoise, self.recipe, batch, coupled(data.noise, fresh, r), data.control)
            earlier = torch.where(expand(step == 1, data.x) > 0, data.x, earlier)
        later = controlled(denoise, self.recipe, batch, coupled(data.noise, fresh, t), data.control)
        # d(f(z_t, c), sg f(z_r, c))
        loss = distance(later, earlier)
        if self.boundary:
            # lambda d(f(z, c), G(z))
            loss = loss + self.boundary * distance(
                controlled(denoise, self.recipe, batch, data.noise, data.control), data.x
            )
        return loss.mean()


def controlled(denoise: Denoiser, recipe: Recipe, batch: Batch, noise: Tensor, control: Tensor | None = None) -> Tensor:
    """f(noise, control) [B, ...], the frozen generator and its adapter; G(noise) where ``control`` is None."""
    sigma = level(denoise, recipe, 0, batch)
    with denoise.roles.use(STUDENT, control=control):
        return denoise(fed_latents(denoise.schedule, noise, sigma, recipe.fed[0]), sigma, batch.cond)


def coupled(z: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """z_t = sqrt(1 - s_t^2) z + s_t e for t [B] in [0, 1] and s_t = sin(pi t / 2): equal angles from z to e. z_0 = z
    exactly."""
    angle = math.pi / 2 * t.double()
    return expand(torch.cos(angle), z) * z + expand(torch.sin(angle), z) * e


def distance(a: Tensor, b: Tensor) -> Tensor:
    """[B] sqrt(|a - b|^2 + c^2) - c over a whole sample, c = 0.00054 sqrt(numel) (arXiv:2310.14189, section 3.3): where
    a and b are apart, the gradient has norm 1 whatever the distance, so that neither term outgrows the other."""
    c = 0.00054 * math.sqrt(a[0].numel())
    return torch.sqrt((a - b).square().flatten(1).sum(1) + c**2) - c


def levels_at(update: int, total: int, first: int, last: int) -> int:
    """N of ``update``: ``first``, doubled in equal stages of the run until ``last`` (as ECT, arXiv:2406.14548,
    section 3.2, halves its steps)."""
    stages = 1 + max(0, round(math.log2(last / first)))
    return min(last, first * 2 ** (update * stages // max(total, 1)))
