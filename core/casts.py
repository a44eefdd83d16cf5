"""Float32 factors in a network's own dtype, cast at once instead of layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .adapted_layer import Table, entry
from .factors import State
from .targets import Target

ALIGNED = 64
"""Numbers: each factor begins at a multiple of so many, where matrix kernels read fastest."""
KEPT = 3


class Casts:
    """A role's factors in one flat buffer for a pass: two kernels where a cast for each use would take two for each
    layer, and again where a block is recomputed. The pass alone holds it, and its graph: whoever writes to the masters
    afterwards, in whatever way, is heeded by the next."""

    def __init__(self, targets: Mapping[str, Target]) -> None:
        self._targets = targets
        # views of factors that need no cast, with the places in memory that they are of, of the last few asked for
        self._views: dict[int, tuple[list[int], Table]] = {}

    @torch.no_grad()
    def of(self, factors: State, dtype: torch.dtype, device: torch.device) -> Table:
        """``factors`` in ``dtype`` on ``device``; as they are, where that is theirs."""
        first = next(iter(factors.values()))[0]
        if first.dtype != dtype or first.device != device:
            return self._entries(self._cast(factors, dtype, device))
        if any(self._targets[name].permutation is not None for name in factors):  # which copies
            return self._entries(factors)
        places = [value.data_ptr() for pair in factors.values() for value in pair]
        known, table = self._views.get(id(factors), (None, {}))
        if places != known or table.keys() != factors.keys():
            table = self._entries(factors)
            others = list(self._views.items())[-KEPT:]  # written as a whole: threads share it
            self._views = {**dict(others), id(factors): (places, table)}
        return table

    def drop(self) -> None:
        """Forget the factors that were asked for."""
        self._views = {}

    def _entries(self, factors: State) -> Table:
        return {name: entry(self._targets[name], a.detach(), b.detach()) for name, (a, b) in factors.items()}

    def _cast(self, factors: State, dtype: torch.dtype, device: torch.device) -> State:
        every = [value for pair in factors.values() for value in pair]
        # on the meta device nothing is read, and bytes are to grow with the rank alone
        step = 1 if every[0].is_meta else ALIGNED
        sizes = [-(-value.numel() // step) * step for value in every]
        # cast where they lie: a mean in the host's memory crosses to the card once, and in the smaller dtype
        flat = torch.empty(sum(sizes), dtype=dtype, device=every[0].device)
        torch.ops.aten._foreach_copy_.default(_pieces(flat, sizes, every), every)
        views = iter(_pieces(flat.to(device), sizes, every))
        return {name: (next(views), next(views)) for name in factors}


def _pieces(flat: Tensor, sizes: list[int], like: list[Tensor]) -> list[Tensor]:
    return [
        piece[: value.numel()].view(value.shape) if piece.numel() > value.numel() else piece.view(value.shape)
        for piece, value in zip(flat.split(sizes), like, strict=True)
    ]
