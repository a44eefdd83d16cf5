"""One layer of a host with its targets: what their factors add to its output.

Called for each of a network's many hundred layers in each forward, so that what can be known before is found before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.attention import in_forward_ad
from ..kernels.low_rank import low_rank_conv, low_rank_linear
from .factors import State
from .targets import Target

Table = Mapping[str, tuple[Tensor, Tensor]]
"""Factors as `AdaptedLayer.add_` reads them, see `entry`."""


def entry(target: Target, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A target's factors for a `Table`: B in the order of the host's rows, both of a linear layer transposed."""
    b = target.host_order(b)
    return (a, b) if target.is_conv else (a.t(), b.t())


class AdaptedLayer:
    """targets: those of one layer, in the order of their output rows."""

    def __init__(self, targets: list[Target]) -> None:
        self.targets = sorted(targets, key=lambda target: target.row_range)
        first = self.targets[0]
        self.is_conv, self._module = first.is_conv, first.module
        spans = [target.row_range for target in self.targets]
        self._places = [
            (target.name, None if target.rows is None else (start, stop - start))
            for target, (start, stop) in zip(self.targets, spans, strict=True)
        ]
        self._names = [target.name for target in self.targets]
        self._name = self._names[0] if len(self._names) == 1 else None

    def serves(self, factors: Table) -> bool:
        """Whether ``factors`` hold one of its targets."""
        if self._name is not None:
            return self._name in factors
        return any(name in factors for name in self._names)

    def may_be_written(self, x: Tensor, output: Tensor) -> bool:
        """Whether its fresh ``output`` may be added to in place: no derivative of it is wanted. Autocast, which makes
        it another dtype than x, forward mode and a compiler want plain operations."""
        if torch.is_grad_enabled() or output.dtype != x.dtype or in_forward_ad() or torch.compiler.is_compiling():
            return False
        return self.is_conv or output.is_contiguous()

    def add_(self, table: Table, x: Tensor, output: Tensor) -> None:
        """Each target's product, added to its rows of ``output`` in place, without a graph."""
        for name, span in self._places:
            pair = table.get(name)
            if pair is None:
                continue
            a, b = pair
            if a.dtype != x.dtype:  # a layer that computes in another dtype than the call's first
                a, b = a.to(x.dtype), b.to(x.dtype)
            if self.is_conv:
                layer: Any = self._module
                hidden = F.conv2d(x, a, None, layer.stride, layer.padding, layer.dilation)
                _mix(output if span is None else output.narrow(1, *span), hidden, b)
            else:
                place = output.view(-1, output.shape[-1])
                place = place if span is None else place.narrow(1, *span)
                place.addmm_(x.reshape(-1, x.shape[-1]).mm(a), b)

    def added(self, factors: State, x: Tensor, output: Tensor, train: bool) -> Tensor:
        """``output`` plus each target's product on its own rows, in a new tensor. train: whether factors get a
        gradient."""
        axis = 1 if self.is_conv else output.ndim - 1
        pieces, at = [], 0
        for target in (target for target in self.targets if target.name in factors):
            if target.rows is None:
                return self._product(target, factors[target.name], x, output, train)
            start, stop = target.row_range
            if start > at:
                pieces.append(output.narrow(axis, at, start - at))
            piece = output.narrow(axis, start, stop - start)
            pieces.append(self._product(target, factors[target.name], x, piece, train))
            at = stop
        if at < output.shape[axis]:
            pieces.append(output.narrow(axis, at, output.shape[axis] - at))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)

    def _product(
        self, target: Target, factors: tuple[Tensor, Tensor], x: Tensor, output: Tensor, train: bool
    ) -> Tensor:
        a, b = factors if train else (factors[0].detach(), factors[1].detach())
        if a.device != x.device:  # a running mean that is kept in the host's memory
            a, b = a.to(x.device), b.to(x.device)
        b = target.host_order(b)
        if not self.is_conv:
            return low_rank_linear(output, x, a, b)
        layer: Any = self._module
        return low_rank_conv(output, x, a, b, layer.stride, layer.padding, layer.dilation)


def _mix(output: Tensor, hidden: Tensor, b: Tensor) -> None:
    """output [N, out, H, W] += B hidden [N, r, H, W], a matrix product at each place, in place. b: [out, r, 1, 1]."""
    if output.is_contiguous():
        up = b.flatten(1).expand(len(output), -1, -1)
        output.view(*output.shape[:2], -1).baddbmm_(up, hidden.flatten(2))
    elif output.permute(0, 2, 3, 1).is_contiguous():
        rows = hidden.permute(0, 2, 3, 1).reshape(-1, hidden.shape[1])
        output.permute(0, 2, 3, 1).view(-1, output.shape[1]).addmm_(rows, b.flatten(1).t())
    else:
        output.add_(F.conv2d(hidden, b))
