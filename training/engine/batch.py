"""One micro-batch: its conditions, and every random number that belongs to its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core import randomness
from ...core.cond import Cond
from ...core.sending import sent


@dataclass(frozen=True)
class Batch:
    """B samples of one size.

    cond: their conditions. null: one null condition, [1, ...], or None where the base has none.
    samples: their global indices, of which (with seed and step) every random number is a function.
    shape: (C, h, w) of their latents. teachers: the conditions that the teacher is asked with, where these are others.
    texts: their prompts, where they are known. sliced: whether what several roles are asked of them is asked one role
    after the other, in passes of B rows, for less memory. before: before the names of its noise, which so is another.
    """

    cond: Cond
    null: Cond | None
    seed: int
    step: int
    samples: Sequence[int]
    shape: tuple[int, ...]
    device: torch.device
    sliced: bool = False
    teachers: Cond | None = None
    texts: tuple[str, ...] = ()
    before: str = ""

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def of_teacher(self) -> Cond:
        """What the teacher is asked with."""
        return self.cond if self.teachers is None else self.teachers

    def normal(self, stream: str) -> Tensor:
        """[B, C, h, w] standard normal, float32."""
        return sent(
            randomness.normal(self.shape, self.seed, self.before + stream, self.step, self.samples), self.device
        )

    def uniform(self, stream: str) -> Tensor:
        """[B] in [0, 1), float64, on the CPU, where levels live."""
        return randomness.uniform(self.seed, stream, self.step, self.samples)

    def shared_uniform(self, count: int, stream: str) -> Tensor:
        """[count] in [0, 1), float64, of the step: the same for all of its micro-batches."""
        return randomness.uniform(self.seed, stream, self.step, range(count))

    def choice(self, high: int, stream: str) -> int:
        """One whole number in 0 .. high - 1 for the step, the same for all of its micro-batches."""
        return int(randomness.integers(high, self.seed, stream, self.step, [0])[0])

    def nulls(self) -> Cond | None:
        """The null condition of every sample, at its size."""
        return None if self.null is None else self.cond.null_like(self.null)

    def with_nulls(self, rate: float, stream: str) -> Batch:
        """Each sample's condition replaced by the null one with probability ``rate``."""
        nulls = self.nulls()
        if rate == 0 or nulls is None:
            return self
        drop = (self.uniform(stream) < rate).tolist()
        mixed = [(nulls if gone else self.cond)[row : row + 1] for row, gone in enumerate(drop)]
        return replace(self, cond=Cond.concat(mixed))
