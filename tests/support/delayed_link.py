"""A link from the host to a device that plays the worst schedule: what is copied is broken until it is waited for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from onestep.core.stream_link import PlainLink


class DelayedLink(PlainLink):
    """A copy breaks its slot as it begins (every bit is set: no number, in any dtype) and is made when it is waited
    for. begun, waited: bytes of each, in order."""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__(device or torch.device("cpu"))
        self.begun: list[int] = []
        self.waited: list[int] = []
        self.closed = False

    @torch.no_grad()
    def copy(self, into: Tensor, source: Tensor) -> Any:
        into.fill_(255)
        self.begun.append(len(source))
        return [into, source]

    @torch.no_grad()
    def wait(self, ticket: Any) -> None:
        into, source = ticket
        into.copy_(source)
        self.waited.append(len(source))

    def close(self) -> None:
        self.closed = True


class FailingLink(DelayedLink):
    """Of which the copy of number ``at``, counted from 1, fails as a card without memory would."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def copy(self, into: Tensor, source: Tensor) -> Any:
        if len(self.begun) + 1 == self.at:
            self.at = 0
            into.fill_(255)
            raise torch.OutOfMemoryError("injected")
        return super().copy(into, source)


@contextmanager
def only_of_the_ring(stream: Any) -> Iterator[None]:
    """Within, every layer of a streamed block computes with weights in the ring: a card could not read the host's."""
    slots = {slot.untyped_storage().data_ptr() for slot in stream._ring}

    def check(layer: Any, *unused: Any) -> None:
        for weight in layer.parameters(recurse=False):
            parts = (
                [getattr(weight, name) for name in weight.__tensor_flatten__()[0]][:1]
                if is_of_parts(weight)
                else [weight]
            )
            assert all(part.untyped_storage().data_ptr() in slots for part in parts), f"{layer} is on the host"

    layers = [layer for block in stream._packed for layer in block.modules()]
    handles = [layer.register_forward_pre_hook(check) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_of_parts(weight: Tensor) -> bool:
    return hasattr(weight, "__tensor_flatten__")
