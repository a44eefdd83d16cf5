"""A value that each thread has for itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class PerThread(Generic[T]):
    """``usual`` in every thread, but where that thread itself has set another. It can be copied, as a network's hooks
    are with it, which threading.local cannot."""

    def __init__(self, usual: T) -> None:
        self._usual = usual
        self._set: dict[int, T] = {}
        self.traced = usual
        """What a compiler sees, which cannot tell threads apart: whoever runs what it compiled writes it before."""

    def get(self, thread: int | None = None) -> T:
        """This thread's, or that of the thread of an identifier."""
        if torch.compiler.is_compiling():
            return self.traced
        return self._set.get(threading.get_ident() if thread is None else thread, self._usual)

    @contextmanager
    def set(self, value: T) -> Iterator[None]:
        """Within, ``value`` in this thread."""
        here = threading.get_ident()
        before = self._set.get(here, self._usual)
        self._set[here] = value
        try:
            yield
        finally:
            if before is self._usual:
                self._set.pop(here, None)  # a thread that ends leaves nothing
            else:
                self._set[here] = before
