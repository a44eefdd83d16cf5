"""Memory that runs out: every way it is said, and slices that halve and make the same."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from onestep.core.errors import OneStepError
from onestep.core.memory import OutOfMemory, Slices, attempt, is_out_of_memory, noticed

SAID = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB)"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes."),
]
OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    OneStepError("out of memory"),
    KeyError("out of memory"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", SAID, ids=str)
def test_it_is_recognised_whichever_library_says_it(error: Exception) -> None:
    assert is_out_of_memory(error)
    if hasattr(torch, "AcceleratorError"):
        assert issubclass(torch.AcceleratorError, RuntimeError)


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_nothing_else_is(error: BaseException) -> None:
    assert not is_out_of_memory(error)

    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        attempt(fail)
    assert caught.value is error


class Holds:
    """A card for ``most`` samples at a time."""

    def __init__(self, most: int, error: Exception) -> None:
        self.most, self.error, self.asked = most, error, []  # type: ignore[var-annotated]

    def __call__(self, rows: list[int]) -> Tensor:
        self.asked.append(rows)
        if len(rows) > self.most:
            raise self.error
        return torch.tensor(rows) ** 2


@pytest.mark.parametrize("error", SAID[:3], ids=str)
@pytest.mark.parametrize("most", [1, 2, 3, 5, 11])
def test_slices_halve_and_make_the_same(most: int, error: Exception) -> None:
    """Every sample once, in order; a size that failed is not tried again, and each is said once."""
    notes: list[str] = []
    slices, card = Slices(8, "the pictures"), Holds(most, error)
    with noticed(notes):
        for _ in range(2):
            assert torch.cat(slices(range(11), card)).tolist() == [row**2 for row in range(11)]
    sizes = [8, 4, 2, 1][: 1 + (most < 8) + (most < 4) + (most < 2)]
    assert slices.size == sizes[-1]
    assert notes == [f"out of memory: the pictures in slices of {size} from here on" for size in sizes[1:]]
    assert sum(len(rows) > most for rows in card.asked) == len(sizes) - 1


def test_uneven_slices_halve_to_what_they_hold() -> None:
    """The failed slice is the short last one: half of it, not of the whole size."""
    slices, card = Slices(7, "x"), Holds(2, SAID[0])
    assert len(torch.cat(slices(range(3), card))) == 3
    assert slices.size == 2


def test_one_sample_that_does_not_fit_is_a_sentence() -> None:
    with pytest.raises(OutOfMemory, match=r"out of memory in the pictures, with one sample at a time \(CUDA error: ou"):
        Slices(4, "the pictures")(range(4), Holds(0, SAID[2]))


def test_what_failed_is_freed_before_it_is_tried_again() -> None:
    """An error's traceback holds the tensors of the frames it went through."""
    held: list[Any] = []

    def fail() -> None:
        big = torch.ones(8, requires_grad=True)
        graph = (big * 2).exp()
        held.append(weakref.ref(graph))
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert attempt(fail) == (None, "CUDA out of memory")
    assert held[0]() is None
