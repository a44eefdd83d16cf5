"""Memory that runs out: how it is recognised, and how work goes on in smaller slices, with the same result."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch

from .errors import OneStepError

Result = TypeVar("Result")

MARKS = (
    "out of memory",  # torch.AcceleratorError of CUDA and HIP, MPS; ComfyUI asks for the same
    "alloc_failed",  # cuBLAS, cuSPARSE and cuDNN: CUBLAS_STATUS_ALLOC_FAILED
    "allocation_failed",  # cuDNN 9: ..._DEVICE_ALLOCATION_FAILED, ..._HOST_ALLOCATION_FAILED
    "unable to find an engine to execute this computation",  # cuDNN without room for any plan's workspace
    "can't allocate memory",  # the CPU's allocator
    "not enough memory: you tried to allocate",  # the same on Windows
)

_notices: ContextVar[list[str] | None] = ContextVar("notices", default=None)


class OutOfMemory(OneStepError):
    """No slice is small enough; nothing that was learnt is lost."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a device, or the host, had no memory left: torch's own error, those of its libraries,
    and Python's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error).lower() for mark in MARKS)


@contextmanager
def noticed(notes: list[str]) -> Iterator[None]:
    """Within, what is said of memory is added to ``notes``, once each."""
    token = _notices.set(notes)
    try:
        yield
    finally:
        _notices.reset(token)


def notice(text: str) -> None:
    """Say ``text`` to whoever listens."""
    notes = _notices.get()
    if notes is not None and text not in notes:
        notes.append(text)


def attempt(work: Callable[[], Result]) -> tuple[Result | None, str]:
    """(what ``work`` gives, ""), or (None, why) where memory ran out; all that it held is free by then."""
    try:
        return work(), ""
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        why = str(error).strip().split("\n")[0][:120] or type(error).__name__
    # outside of the except clause, whose traceback holds on to the tensors of what failed
    release()
    return None, why


def release() -> None:
    """Give back what torch keeps of a device's memory for later."""
    gc.collect()
    torch.cuda.empty_cache()


def exhausted(what: str, why: str) -> OutOfMemory:
    """The error where one sample at a time is too much."""
    return OutOfMemory(
        f"out of memory in {what}, with one sample at a time ({why}): close what else uses the card, or choose "
        "smaller sizes, a lower rank or fewer targets"
    )


@dataclass
class Slices:
    """Work over samples, at most ``size`` of them at a time: half as many from where memory runs out. what: the work,
    in words."""

    size: int
    what: str

    def __call__(self, rows: Sequence[int], make: Callable[[list[int]], Result]) -> list[Result]:
        """``make`` of each slice of ``rows``, in order. Raises OutOfMemory where one sample does not fit."""
        parts: list[Result] = []
        at = 0
        while at < len(rows):
            some = list(rows[at : at + self.size])
            found, why = attempt(lambda some=some: (make(some),))  # type: ignore[misc]
            if found is None:
                self._halve(len(some), why)
                continue
            parts.append(found[0])
            at += len(some)
        return parts

    def _halve(self, failed: int, why: str) -> None:
        if failed == 1:
            raise exhausted(self.what, why)
        self.size = -(-failed // 2)
        notice(f"out of memory: {self.what} in slices of {self.size} from here on")
