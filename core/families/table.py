"""What the families' tables are made of: a row per layer of ComfyUI's network, with the canonical names it holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import OneStepError

INPUT, REST = "input", "rest"
"""Widths of a fused layer's parts: as many rows as the layer has inputs; an equal share of the rows that are left."""
QKV = (INPUT, INPUT, INPUT)


@dataclass(frozen=True)
class Row:
    """host: ComfyUI's module path. names: the canonical names of its output rows, one or several. widths: of each of
    several, `INPUT` or `REST`.

    swapped: a modulation whose [2 h, h] layer holds scale and shift in the other order than diffusers'. The same layer
    of another width (SD3's norm1_context of all blocks but the last: 6 h) has the same order in both hosts.
    """

    host: str
    names: tuple[str, ...]
    swapped: bool = False
    widths: tuple[str, ...] = ()

    def slices(self, inputs: int, outputs: int) -> list[slice | None]:
        """The output rows of each name, of a layer of these sizes."""
        if len(self.names) == 1:
            return [None]
        rests = self.widths.count(REST)
        left = outputs - inputs * self.widths.count(INPUT)
        if left < rests or (left % rests if rests else left):
            wanted = f"{'more than ' if rests else ''}{self.widths.count(INPUT)} times its inputs"
            raise OneStepError(
                f"The layer {self.host} has {inputs} inputs and {outputs} outputs; as a fused {' + '.join(self.names)} "
                f"it should have {wanted}. This variant of the network is not supported."
            )
        widths = [inputs if width == INPUT else left // rests for width in self.widths]
        starts = [sum(widths[:i]) for i in range(len(widths))]
        return [slice(start, start + width) for start, width in zip(starts, widths, strict=True)]

    def permutation(self, inputs: int, outputs: int) -> Tensor | None:
        """[outputs] or None: host rows = canonical rows[permutation]. It is its own inverse."""
        return torch.arange(outputs).roll(inputs) if self.swapped and outputs == 2 * inputs else None

    def inside(self, host: str, canonical: str) -> Row:
        """The same row of a block at these paths."""
        return replace(self, host=f"{host}.{self.host}", names=tuple(f"{canonical}.{name}" for name in self.names))


def repeated(block: Iterable[Row], host: str, canonical: str, size: int) -> Iterator[Row]:
    """The rows of ``size`` blocks alike, numbered in both hosts."""
    for i in range(size):
        yield from (row.inside(f"{host}.{i}", f"{canonical}.{i}") for row in block)


def count(names: Iterable[str], pattern: str) -> int:
    """How many numbered members a list has: one more than the largest number behind `pattern` + "."."""
    found = (re.match(rf"{pattern}\.(\d+)\.", name) for name in names)
    return max((int(hit[1]) + 1 for hit in found if hit), default=0)


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key: numbers inside a path count as numbers, so that block 10 follows block 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
