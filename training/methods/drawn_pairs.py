r"""Pairs that a run draws and ranks itself: of two pictures that the student, as it is, draws for a prompt, the better
one is that with more of a reward.

    x, x' = G(z, c), G(z', c);   x_w = x where r(x) >= r(x'), else x';   x_l: the other one
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..engine.batch import Batch
from ..engine.student import BackwardSimulation, Drawn
from .rewards import Ranked

RANKED_BY = (
    "By what the student's two pictures of a prompt are ranked, several with commas, each times a number if you "
    "like (agreement, contrast*0.5): agreement = picture and prompt as the CLIP in reward_model sees them; "
    "saturation and contrast are guards, alike for usual pictures, and pictures that are alike teach nothing; or "
    "one of your own, given to onestep.distill."
)
REWARD_MODEL = "The folder of a CLIP of transformers (config.json, model.safetensors, its tokenizer), for agreement."


@dataclass(frozen=True)
class Pair:
    """What the student has drawn of each prompt: the better one, the worse one. told_apart: [B], False for two that are
    alike."""

    better: Drawn
    worse: Drawn
    told_apart: Tensor

    @property
    def both(self) -> tuple[Drawn, Drawn]:
        return self.better, self.worse


def picked(first: Tensor, one: Drawn, other: Drawn) -> Drawn:
    """``one`` where ``first`` [B], else ``other``: both are of one step."""
    at = first.reshape(-1, *[1] * (one.x.ndim - 1))
    return replace(one, x0=torch.where(at, one.x0, other.x0), x=torch.where(at, one.x, other.x))


@dataclass(frozen=True)
class DrawnPairs:
    """simulate: the student as a generator. rank: by the reward."""

    simulate: BackwardSimulation
    rank: Ranked

    @property
    def cost(self) -> float:
        """Forwards of a pair."""
        return 2 * self.simulate.cost

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[Pair, dict[str, Any]]:
        """Of the student as it is, with numbers for the metrics."""
        one, other = self.simulate(batch, train=False), self.simulate(replace(batch, before="second "), train=False)
        (mine, numbers), (theirs, _) = self.rank(batch, one.x0), self.rank(batch, other.x0)
        first, told_apart = mine >= theirs, mine != theirs
        numbers |= {"reward_gap": (mine - theirs).abs().mean(), "pairs": told_apart.double().mean()}
        return Pair(picked(first, one, other), picked(~first, one, other), told_apart), numbers
