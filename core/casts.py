"""Float32 factors in a network's own dtype, cast at once instead of layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .adapted_layer import Table, entry
from .factors import State
from .targets import Target

ALIGNED = 64
"""Numbers: each factor begins at a multiple of so many, where matrix kernels read fastest."""


class Casts:
    """One role's factors in one flat buffer, for a pass without a graph: two kernels where a cast for each use would
    take two for each layer. The pass alone holds it: whoever writes to the masters afterwards is heeded."""

    def __init__(self, targets: Mapping[str, Target]) -> None:
        self._targets = targets
        # views of factors that need no cast, and the places in memory that they are of: one value, for several threads
        self._views: tuple[Any, Table] = (None, {})

    @torch.no_grad()
    def of(self, factors: State, dtype: torch.dtype, device: torch.device) -> Table:
        """``factors`` in ``dtype`` on ``device``; as they are, where that is theirs."""
        first = next(iter(factors.values()))[0]
        if first.dtype != dtype or first.device != device:
            return self._entries(self._cast(factors, dtype, device))
        if any(self._targets[name].permutation is not None for name in factors):  # which copies
            return self._entries(factors)
        places = [value.data_ptr() for pair in factors.values() for value in pair]
        known, table = self._views
        if places != known or table.keys() != factors.keys():
            table = self._entries(factors)
            self._views = places, table
        return table

    def drop(self) -> None:
        """Forget the factors that were asked for last."""
        self._views = None, {}

    def _entries(self, factors: State) -> Table:
        return {name: entry(self._targets[name], a.detach(), b.detach()) for name, (a, b) in factors.items()}

    def _cast(self, factors: State, dtype: torch.dtype, device: torch.device) -> State:
        every = [value.detach() for pair in factors.values() for value in pair]
        starts, at = [], 0
        for value in every:
            starts.append(at)
            at += -(-value.numel() // ALIGNED) * ALIGNED
        # cast where they lie: a mean in the host's memory crosses to the card once, and in the smaller dtype
        flat = torch.empty(at, dtype=dtype, device=every[0].device)
        pieces = [_piece(flat, start, value) for start, value in zip(starts, every, strict=True)]
        torch.ops.aten._foreach_copy_.default(pieces, every)
        flat = flat.to(device)
        views = iter([_piece(flat, start, value) for start, value in zip(starts, every, strict=True)])
        return {name: (next(views), next(views)) for name in factors}


def _piece(flat: Tensor, start: int, like: Tensor) -> Tensor:
    return flat[start : start + like.numel()].view(like.shape)
