"""The diversity anchor of DP-DMD (arXiv:2602.03139): the first of several steps is held to the teacher's own way from
the same noise, the matching is left to the later ones; where pictures of one prompt come to differ, they stay apart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ...core.denoiser import Denoiser
from ...core.recipe import Recipe
from ...core.sampling import initial_latents
from ...core.schedule import expand
from ..data.anchors import Anchors, anchor_levels
from ..engine.batch import Batch
from ..engine.setup import Setup
from ..engine.student import STUDENT
from ..engine.turns import Loss, on_data


@dataclass(frozen=True)
class DiversityAnchor:
    """steps: that the teacher has taken to where the student's first step is to lead."""

    recipe: Recipe
    steps: int

    def __call__(self, denoise: Denoiser, batch: Batch, anchors: tuple[Tensor, Tensor]) -> Tensor:
        """|D(x_1) - D*|^2: a sum over a sample's elements, a mean over samples; ``anchors`` is (z, x_k), each
        [B, ...]."""
        noise, x_k = anchors
        levels = anchor_levels(denoise.schedule, self.recipe, self.steps)
        sigma, lower = (level.expand(len(batch)) for level in (levels[0], levels[-1]))
        x = initial_latents(denoise.schedule, noise, sigma, self.recipe.initial_noise_scale)
        with denoise.roles.use(STUDENT):
            x0 = denoise(x, sigma, batch.cond)
        return (x0 - self.target(denoise, x, x_k, sigma, lower)).square().flatten(1).sum(1).mean()

    @staticmethod
    def target(denoise: Denoiser, x: Tensor, x_k: Tensor, sigma: Tensor, lower: Tensor) -> Tensor:
        """D* [B, ...], whose step of DDIM from x at sigma to the level ``lower`` ends at x_k: of a flow model from pure
        noise its velocity is v* = (x - x_k) / (1 - t_k)."""
        # x_k = a_k D* + s_k (x - a_1 D*) / s_1
        alpha, ratio = denoise.schedule.alpha(sigma), lower / sigma
        return (x_k - expand(ratio, x) * x) / expand(denoise.schedule.alpha(lower) - ratio * alpha, x)


def diversity_of(setup: Setup) -> tuple[Loss | None, Anchors | None]:
    """Its loss and what that is on, where the settings have it."""
    own = setup.settings.own
    if not own.diversity_anchor:
        return None, None
    place, steps = setup.folder / "anchors", own.diversity_steps
    anchors = Anchors(setup.host, setup.prompts, setup.settings, place, setup.recipe, steps)
    loss = partial(DiversityAnchor(setup.recipe, steps), setup.denoise)
    return on_data(anchors.draw, loss, "diversity"), anchors
