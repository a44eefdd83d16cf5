"""What of a network is computed again in backward: all of its blocks, their feed-forwards alone, or nothing.

A feed-forward keeps most bytes for the least work: of SDXL's blocks two thirds of what autograd keeps, for a third of
the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .families import block_of

NOTHING, FEED_FORWARDS, BLOCKS = "nothing", "feed-forwards", "blocks"
GRADES = (NOTHING, FEED_FORWARDS, BLOCKS)
"""From the fastest to the one that keeps least."""


def recomputed(blocks: Iterable[nn.Module], grade: str) -> list[nn.Module]:
    """The modules to checkpoint. blocks: all of a network's that may be. grade: one of `GRADES`."""
    if grade == FEED_FORWARDS:
        return [part for block in blocks for part in _feed_forwards(block)]
    return list(blocks) if grade == BLOCKS else []


def heavier(grade: str) -> str | None:
    """The next that keeps less; None where there is none."""
    at = GRADES.index(grade) + 1
    return GRADES[at] if at < len(GRADES) else None


def _feed_forwards(block: nn.Module) -> Iterable[nn.Module]:
    """Those that a block has: the last of SD3's has none for the text."""
    inside = dict(block.named_modules())
    return (inside[path] for path in block_of(block).feed_forwards if path in inside)
