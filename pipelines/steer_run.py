"""What the processors of one steered network share, and what is true of the forward under way."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from ..core.guidance import Steering
from .heads import repeated
from .own_guidance import Rows, part
from .steer_text import Away, alike
from .threads import is_here


@dataclass
class Run:
    """What the processors of one steered network share.

    away: the negative, and the empty text behind it, in tokens as an encoder gives them. rows: which of each batch are
    steered. cache: whether keys and values of the negative are kept from one forward to the next. The rest is true of
    the forward under way: whether it is steered, the tokens of the positive text, those of each row's own where they
    are of several lengths, those of the negative where the network embeds them first, and whether an attention has
    steered yet.
    """

    steering: Steering
    away: Away
    rows: Rows
    cache: bool
    active: bool = False
    positive_tokens: int = 0
    positive_lengths: tuple[int, ...] | None = None
    embedded: Tensor | None = None
    reached: bool = False
    thread: int = field(default_factory=get_ident)

    @property
    def acting(self) -> bool:
        """Whether the forward under way, in this thread, is steered."""
        return self.active and is_here(self.thread)

    def steered(self, batch: int) -> slice:
        """The rows of a batch that are steered."""
        return part(self.rows, batch)

    def count(self, batch: int) -> int:
        """How many of a batch are."""
        return batch if self.rows == "all" else batch // 2

    def spread(self, negative: Tensor, batch: int) -> Tensor:
        """[n, ...] -> [batch, ...]. Rows that are not steered carry the other half's negative, which nothing of theirs
        reads."""
        count = self.count(batch)
        return torch.cat([repeated(negative, count)] * (batch // count))

    def by_lengths(self, batch: int) -> list[tuple[Any, ...]] | None:
        """Where rows have different numbers of tokens: the rows of each two numbers, of the prompt and of the negative;
        None where all have the same."""
        if self.positive_lengths is None and self.away.lengths is None:
            return None
        count = self.count(batch)
        negatives = self.away.each(count) * (batch // count)
        return alike(self.positive_lengths or (self.positive_tokens,) * batch, negatives)

    def chosen(self, image: Tensor) -> Tensor | None:
        """The same as flags [B], on the device of the picture's tokens [B, ...]; None is all."""
        if self.rows == "all":
            return None
        flags = torch.zeros(len(image), dtype=torch.bool, device=image.device)
        flags[self.steered(len(image))] = True
        return flags
