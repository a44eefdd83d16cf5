"""Where an adapter sits: a canonical name bound to (some output rows of) one layer of the host's network.

The two hosts build the same network differently: ComfyUI fuses q, k and v (and the MLP of Flux' single blocks) into one
layer, diffusers keeps them apart. An adapter is therefore bound to a `Target`, never to a module. Imports torch alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Target:
    """One adaptable piece of a network, the same in both hosts.

    name: the canonical diffusers module path, e.g. "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q".
        Rank, initial values, optimiser order and file keys depend on it alone.
    module: the host's layer: a Linear or Conv2d of any subclass, cast-on-use and quantised layers too.
    rows: the rows of the layer's output that belong to this target; None means all of them.
    permutation: [rows] int64, or None: the host stores the rows in another order, host = canonical[permutation].
    """

    name: str
    module: nn.Module
    rows: slice | None = None
    permutation: Tensor | None = None

    @property
    def is_conv(self) -> bool:
        return is_conv(self.module)

    @property
    def in_features(self) -> int:
        """Input features of a Linear, input channels of a Conv2d."""
        return int(self.module.in_channels if self.is_conv else self.module.in_features)  # type: ignore[arg-type]

    @property
    def out_rows(self) -> int:
        """Output rows of this target: all of the layer's, or those of its slice."""
        total = out_features(self.module)
        return total if self.rows is None else len(range(*self.rows.indices(total)))

    @property
    def row_range(self) -> tuple[int, int]:
        """First row and the one after the last, in the layer's output."""
        start, stop, _ = (self.rows or slice(None)).indices(out_features(self.module))
        return start, stop

    def shape_a(self, rank: int) -> tuple[int, ...]:
        """[rank, in] of a Linear, [rank, in, kh, kw] of a Conv2d."""
        return (rank, self.in_features, *kernel_size(self.module))

    def shape_b(self, rank: int) -> tuple[int, ...]:
        """[out, rank] of a Linear, [out, rank, 1, 1] of a Conv2d."""
        return (self.out_rows, rank, *(1 for _ in kernel_size(self.module)))

    def host_order(self, rows: Tensor) -> Tensor:
        """[out, ...] in canonical order -> the order in which the host stores these rows."""
        return rows if self.permutation is None else rows[self.permutation.to(rows.device)]

    def canonical_order(self, rows: Tensor) -> Tensor:
        """[out, ...] in the order in which the host stores these rows -> canonical order."""
        if self.permutation is None:
            return rows
        canonical = torch.empty_like(rows)
        canonical[self.permutation.to(rows.device)] = rows
        return canonical


def is_linear(module: nn.Module) -> bool:
    """By its attributes, not its class: some cast-on-use and quantised layers do not derive from nn.Linear."""
    return isinstance(getattr(module, "in_features", None), int) and hasattr(module, "out_features")


def is_conv(module: nn.Module) -> bool:
    """A two-dimensional, ungrouped convolution."""
    kernel = getattr(module, "kernel_size", None)
    return isinstance(kernel, tuple) and len(kernel) == 2 and getattr(module, "groups", 0) == 1


def is_adaptable(module: nn.Module) -> bool:
    return is_linear(module) or is_conv(module)


def out_features(module: nn.Module) -> int:
    """Output features of a Linear, channels of a Conv2d. Read from the layer: a quantised weight has another shape."""
    return int(module.out_channels if hasattr(module, "out_channels") else module.out_features)  # type: ignore[arg-type]


def kernel_size(module: nn.Module) -> tuple[int, ...]:
    """() for a Linear, (kh, kw) for a Conv2d."""
    return tuple(module.kernel_size) if is_conv(module) else ()  # type: ignore[arg-type]
