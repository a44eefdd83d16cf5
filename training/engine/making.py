"""How long this process has spent on what a teacher or a generator makes: passes without a graph, which take another
time for each forward than those that learn."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

_spent = [0.0]


@contextmanager
def making() -> Iterator[None]:
    """What is done within counts."""
    began = time.monotonic()
    try:
        yield
    finally:
        _spent[0] += time.monotonic() - began


def seconds() -> float:
    """So far."""
    return _spent[0]
