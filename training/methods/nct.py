"""Noise consistency training (NCT, arXiv:2506.19741): a control for a frozen one-step generator, without pictures.

G is the generator, C the control's extractor, f is G with the adapter. A noise and its control belong together:

    x = G(z),  c = C(x),  z_t = sqrt(1 - s_t^2) z + s_t e,  s_0 = 0, s_1 = 1,  z and e ~ N(0, I)

Each z_t is standard normal, so f may be asked at each; the further t, the less z_t knows of c. What holds at z (the
boundary, f(z, c) = x) is carried to t = 1, where the noise is any, by asking nearer noises for the same:

    L = d(f(z_t, c), sg f(z_r, c)) + lambda d(f(z, c), x),   r < t, the same e for both

Public of the paper are these terms. Ours, with what was found on the bundled model in benchmarks/results:

    r = max(0, t - 1 / N),   f(z_0, c) = x,   t ~ U(0, 1], or 0 for a share of samples

A sample at t = 0 is the boundary term, their share beta its weight: lambda = beta / (1 - beta). A run begins (N = 1) as
the regression of x on z_t and c, which teaches the control at once; then N grows (as the steps of ECT,
arXiv:2406.14548, section 3.2, shrink), and of the pictures that c allows f gives one, not their mean. What is asked for
x itself, t < 1 / N, holds the rest: with fewer of these f soon agrees with itself on nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.denoiser import Denoiser
from ...core.recipe import Recipe
from ...core.sampling import initial_latents
from ...core.schedule import expand
from ..engine.batch import Batch
from ..engine.student import STUDENT, level

ROUND = 0.3


@dataclass(frozen=True)
class Triples:
    """B noises z [B, C, h, w], what the generator makes of them, x, and its control pictures c [B, ., H, W]; levels: N,
    the distance from t to r is 1 / N."""

    noise: Tensor
    x: Tensor
    control: Tensor
    levels: int


Source = Callable[[Batch, int], tuple[Batch, Triples]]
"""(batch, update) -> the triples that this update looks at, and their batch."""


@dataclass(frozen=True)
class NoiseConsistency:
    """The loss, as a direct method (training.direct). boundary: beta."""

    recipe: Recipe
    source: Source
    boundary: float = 0.1

    def draw(self, batch: Batch, update: int) -> tuple[Batch, Triples]:
        return self.source(batch, update)

    def loss(self, denoise: Denoiser, batch: Batch, data: Triples) -> Tensor:
        """A sum over a sample's elements, so to say: d is of whole samples. A mean over samples."""
        own = batch.uniform("nct boundary") < self.boundary
        t = torch.where(own, 0.0, 1 - batch.uniform("nct level"))
        fresh = batch.normal("nct noise")
        later = controlled(denoise, self.recipe, batch, coupled(data.noise, fresh, t), data.control)
        # d(f(z_t, c), sg f(z_r, c))
        return distance(later, self._earlier(denoise, batch, data, fresh, t)).mean()

    @torch.no_grad()
    def _earlier(self, denoise: Denoiser, batch: Batch, data: Triples, fresh: Tensor, t: Tensor) -> Tensor:
        """f(z_r, c) for r = max(0, t - 1 / N), which is x for r = 0."""
        r = (t - 1 / data.levels).clamp_min(0)
        if not bool((r > 0).any()):
            return data.x
        found = controlled(denoise, self.recipe, batch, coupled(data.noise, fresh, r), data.control)
        return torch.where(expand(r, data.x) > 0, found, data.x)


def controlled(denoise: Denoiser, recipe: Recipe, batch: Batch, noise: Tensor, control: Tensor | None = None) -> Tensor:
    """f(noise, control) [B, ...], the frozen generator and its adapter; G(noise) where ``control`` is None."""
    sigma = level(denoise, recipe, 0, batch)
    with denoise.roles.use(STUDENT, control=control):
        return denoise(initial_latents(denoise.schedule, noise, sigma, recipe.initial_noise_scale), sigma, batch.cond)


def coupled(z: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """z_t = sqrt(1 - s_t^2) z + s_t e for t [B] in [0, 1] and s_t = sin(pi t / 2): equal angles from z to e. z_0 = z
    exactly."""
    angle = math.pi / 2 * t.double()
    return expand(torch.cos(angle), z) * z + expand(torch.sin(angle), z) * e


def distance(a: Tensor, b: Tensor) -> Tensor:
    """[B] sqrt(|a - b|^2 + c^2) - c over a whole sample (arXiv:2310.14189, section 3.3), c = ROUND sqrt(numel): round
    where a and b are near. With that paper's 0.00054 it has a kink at a = b, which holds a new adapter, f = G, where it
    starts: the boundary pulls back with norm 1 from the least departure."""
    c = ROUND * math.sqrt(a[0].numel())
    return torch.sqrt((a - b).square().flatten(1).sum(1) + c**2) - c


def levels_at(update: int, total: int, first: int, last: int) -> int:
    """N of ``update``: ``first``, doubled in equal stages of the run until ``last``."""
    stages = 1 + max(0, round(math.log2(last / first)))
    return min(last, first * 2 ** (update * stages // max(total, 1)))
