"""NCT's data: noises, what a one-step generator makes of them, and the controls of that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.controls import Control
from ..engine.batch import Batch
from .pairs import Blocks, Sides


@dataclass(frozen=True)
class Triples:
    """B noises z [B, C, h, w], what the generator makes of them, x, and its control pictures c [B, ., H, W]; levels: N,
    the distance from t to r is 1 / N."""

    noise: Tensor
    x: Tensor
    control: Tensor
    levels: int


Generate = Callable[[Batch, Tensor], Tensor]
"""(batch, unit noise [B, C, h, w]) -> x0 [B, C, h, w]."""


@dataclass
class TriplePool(Blocks):
    """(z, x = G(z), c = C(decode(x))). A picture is decoded once, as it is made; its control is kept in steps of
    1 / 255, as a file of pictures would keep it. levels: (update) -> N of `Triples`."""

    control: Control
    generate: Generate
    levels: Callable[[int], int]
    stream = "triple"

    def draw(self, batch: Batch, update: int) -> tuple[Batch, Triples]:
        batch, (noise, x, control) = self._take(batch, update)
        return batch, Triples(noise, x, control.float() / 255, self.levels(update))

    def _sides(self, block: int, kept: dict[str, Tensor]) -> Sides:
        return self._noise(block), kept["x"], kept["control"]

    @torch.no_grad()
    def _make(self, block: int, micro: int) -> dict[str, Tensor]:
        noise = self._noise(block)

        def triple(rows: list[int], batch: Batch) -> tuple[Tensor, Tensor]:
            x = self.generate(batch, noise[rows].to(batch.device)).cpu()
            keys = [block * self.settings.batch + row for row in rows]
            # c = C(decode(G(z)))
            control = self.control(self.host.decode(x).cpu(), keys)
            return x, (255 * control).round().to(torch.uint8)

        x, control = (torch.cat(parts) for parts in zip(*self._each(block, micro, triple), strict=True))
        return {"x": x, "control": control}
