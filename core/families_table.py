"""What the families' tables are made of: a row per layer of ComfyUI's network, with the canonical names it holds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import OneStepError


@dataclass(frozen=True)
class Row:
    """host: ComfyUI's module path. names: the canonical names of its output rows: one, or q, k, v, or q, k, v, mlp.

    swapped: a modulation whose [2 h, h] layer holds scale and shift in the other order than diffusers'. The same layer
    of another width (SD3's norm1_context of all blocks but the last: 6 h) has the same order in both hosts.
    """

    host: str
    names: tuple[str, ...]
    swapped: bool = False

    def slices(self, inputs: int, outputs: int) -> list[slice | None]:
        """The output rows of each name. q, k and v are as wide as the layer's input; the MLP has what is left."""
        if len(self.names) == 1:
            return [None]
        widths = [inputs] * 3 + [outputs - 3 * inputs] * (len(self.names) - 3)
        if sum(widths) != outputs or min(widths) <= 0:
            raise OneStepError(
                f"The layer {self.host} has {inputs} inputs and {outputs} outputs; as a fused {' + '.join(self.names)} "
                f"it should have {'3' if len(self.names) == 3 else 'more than 3'} times its inputs. "
                "This variant of the network is not supported."
            )
        starts = [sum(widths[:i]) for i in range(len(widths))]
        return [slice(start, start + width) for start, width in zip(starts, widths, strict=True)]

    def permutation(self, inputs: int, outputs: int) -> Tensor | None:
        """[outputs] or None: host rows = canonical rows[permutation]. It is its own inverse."""
        return torch.arange(outputs).roll(inputs) if self.swapped and outputs == 2 * inputs else None


def count(names: Iterable[str], pattern: str) -> int:
    """How many numbered members a list has: one more than the largest number behind `pattern` + "."."""
    found = (re.match(rf"{pattern}\.(\d+)\.", name) for name in names)
    return max((int(hit[1]) + 1 for hit in found if hit), default=0)


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key: numbers inside a path count as numbers, so that block 10 follows block 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
