"""One layer of a host with its targets: what their factors add to its output.

Called for each of a network's many hundred layers in each forward, so that what can be known before is found before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.add_lora import EVERYWHERE, LoRA, Place, add_lora
from ..kernels.add_lora_conv import add_lora_conv, mixed
from ..kernels.attention import autocast, in_forward_ad
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
        whole = self._name is not None and first.rows is None and first.permutation is None
        # the one target of a linear layer, the host's as it is ours
        self.alone = self._name if whole and not self.is_conv else None
        self._in, self._out = first.in_features, first.out_rows

    def serves(self, factors: Table) -> bool:
        """Whether ``factors`` hold one of its targets."""
        if self._name is not None:
            return self._name in factors
        return any(name in factors for name in self._names)

    def is_plain(self, x: Tensor, output: Tensor) -> bool:
        """Whether `add_alone_` or `add_one` may serve its fresh ``output``. Autocast, forward mode and a compiler want
        plain operations."""
        return (
            output.dtype is x.dtype
            and output.is_contiguous()
            and not in_forward_ad()
            and not torch.compiler.is_compiling()
            and not (torch.is_grad_enabled() and (autocast(output) or (output.requires_grad and output.is_leaf)))
        )

    def add_alone_(self, a: Tensor, b: Tensor, x: Tensor, output: Tensor) -> None:
        """`add_` of a layer's one target."""
        output.view(-1, self._out).addmm_(x.reshape(-1, self._in).mm(a), b)

    def may_be_written(self, x: Tensor, output: Tensor) -> bool:
        """Whether `add_` may serve its fresh ``output``: no derivative of it is wanted. Autocast, which makes it
        another dtype than x, forward mode and a compiler want plain operations."""
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
            if self.is_conv:
                layer: Any = self._module
                hidden = F.conv2d(x, a, None, layer.stride, layer.padding, layer.dilation)
                _mix(output if span is None else output.narrow(1, *span), hidden, b)
            else:
                place = output.view(-1, output.shape[-1])
                place = place if span is None else place.narrow(1, *span)
                place.addmm_(x.reshape(-1, x.shape[-1]).mm(a), b)

    def loras(self, factors: State, rows: slice | None, train: bool) -> list[LoRA]:
        """What ``factors`` add to some rows of a batch, or None for all. train: whether they get a gradient."""
        found = []
        for target in (target for target in self.targets if target.name in factors):
            a, b = factors[target.name] if train else (factor.detach() for factor in factors[target.name])
            whole = rows is None and target.rows is None
            place = EVERYWHERE if whole else Place(rows or slice(None), target.rows or slice(None))
            found.append(LoRA(a, target.host_order(b), place))
        return found

    def added(self, x: Tensor, output: Tensor, loras: list[LoRA]) -> Tensor:
        """``output`` and ``loras`` of its input x, with a graph; written over where nobody can tell."""
        if not self.is_conv:
            return add_lora(output, x, loras)
        layer: Any = self._module
        return add_lora_conv(output, x, loras, layer.stride, layer.padding, layer.dilation)


def _mix(output: Tensor, hidden: Tensor, b: Tensor) -> None:
    """output [N, out, H, W] += B hidden [N, r, H, W], a matrix product at each place, in place. b: [out, r, 1, 1]."""
    if output.is_contiguous():
        up = b.flatten(1).expand(len(output), -1, -1)
        output.view(*output.shape[:2], -1).baddbmm_(up, hidden.flatten(2))
    elif output.permute(0, 2, 3, 1).is_contiguous():
        rows = hidden.permute(0, 2, 3, 1).reshape(-1, hidden.shape[1])
        output.permute(0, 2, 3, 1).view(-1, output.shape[1]).addmm_(rows, b.flatten(1).t())
    else:
        output.add_(mixed(hidden, b))
