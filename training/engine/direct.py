"""Methods that ask a loss of the student at once: no critic, but data of their own, and perhaps a side that learns."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from ...core.denoiser import Denoiser
from .batch import Batch


class Direct(Protocol):
    """One method's loss and its data.

    Where the method has a side (core.side), that alone learns; otherwise the student's low-rank factors do.
    """

    def draw(self, batch: Batch, update: int) -> tuple[Batch, Any]:
        """The samples that ``update`` looks at, in place of ``batch``'s (of as many, and with the same indices), and
        what the loss needs to know of them: a function of the run's seed, ``update`` and the indices alone."""
        ...

    def loss(self, denoise: Denoiser, batch: Batch, data: Any) -> Tensor:
        """A scalar with a graph into the student: a sum over a sample's elements, a mean over samples. It chooses the
        roles it asks by itself."""
        ...
