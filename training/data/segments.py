"""Segments of a student's rollout and where they should end, kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import randomness
from ...core.cond import Cond
from ..engine.batch import Batch
from ..engine.prompts import Size
from .pairs import Blocks, Sides

Move = Callable[[Batch, Cond, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Moves:
    """B segments. x: [B, C, h, w] their starts. sigma, lower: [B] their levels, float64. end: y. negative: of each."""

    x: Tensor
    sigma: Tensor
    lower: Tensor
    end: Tensor
    negative: Cond


@dataclass
class Segments(Blocks):
    """Segments of the student's rollout without a negative, and where its negative would have them end.

    prompts: of the cases. negatives, both: the other texts of each case, in their order. levels: [steps + 1] sigma.
    move: (batch, prompt and negative as one text, unit noise, segment) -> (x, y).
    """

    levels: Tensor
    move: Move
    negatives: Cond
    both: dict[Size, Cond]
    stream = "segment"

    def draw(self, batch: Batch, update: int) -> tuple[Batch, Moves]:
        drawn, (x, end, segment, at) = self._take(batch, update)
        sigmas = self.levels
        negative = self.negatives[at].sent(drawn.device)
        return drawn, Moves(x, sigmas[segment], sigmas[segment + 1], end, negative)

    def _segment(self, block: int) -> int:
        """One for a block: its samples go together."""
        return int(randomness.integers(len(self.levels) - 1, self.settings.seed, "segment", block, [0])[0])

    def _sides(self, block: int, kept: dict[str, Tensor]) -> Sides:
        rows = range(self.settings.batch)
        at = torch.stack([self._prompt(block, row) for row in rows])
        return kept["x"], kept["end"], torch.full((len(rows),), self._segment(block)), at

    @torch.no_grad()
    def _make(self, block: int, micro: int) -> dict[str, Tensor]:
        noise = self._noise(block)

        def segment(rows: list[int], batch: Batch) -> tuple[Tensor, Tensor]:
            at = torch.stack([self._prompt(block, row) for row in rows])
            both = self.both[self._size(block)][at].to(batch.device)
            x, end = self.move(batch, both, noise[rows].to(batch.device), self._segment(block))
            return x.cpu(), end.cpu()

        x, end = (torch.cat(parts) for parts in zip(*self._each(block, micro, segment), strict=True))
        return {"x": x, "end": end}
