"""Several texts beside one picture in a network of one stream, which refines each text and puts the picture behind it.

Of Z-Image, whose times on the first rotary axis are 1, 2, ... over a text and its filling, the next for the picture;
and of Lumina 2, which fills nothing up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Texts:
    """own: tokens of the prompt, the negative and, where there is one, the empty text. multiple: the network fills each
    up to a multiple of so many, by learnt tokens; 1: it does not."""

    own: tuple[int, ...]
    multiple: int

    @property
    def filled(self) -> tuple[int, ...]:
        """Tokens of each text with its filling."""
        return tuple(-(-length // self.multiple) * self.multiple for length in self.own)

    @property
    def filling(self) -> Tensor:
        """[T] bool, of all texts one behind the other: True where a learnt token belongs."""
        places = [torch.arange(whole) >= own for own, whole in zip(self.own, self.filled, strict=True)]
        return torch.cat(places)

    @property
    def times(self) -> Tensor:
        """[T] of all texts' tokens: each ends where the prompt does, right before the picture.

        Rotary attention knows times by their differences alone, so that each text is to the picture as if it were the
        only one. Those of a text that is longer than the prompt begin below 1.
        """
        end = self.picture
        return torch.cat([torch.arange(end - whole, end) for whole in self.filled])

    @property
    def picture(self) -> int:
        """The picture's time."""
        return self.filled[0] + 1

    def joined(self, tokens: Sequence[Tensor]) -> Tensor:
        """[..., L, C] of each text -> [..., T, C], zeros where it is filled up."""
        rows = zip(tokens, self.filled, strict=True)
        return torch.cat([pad(text, (0, 0, 0, whole - text.shape[-2])) for text, whole in rows], -2)
