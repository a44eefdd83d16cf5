"""Several processes that train one run, started by torchrun or accelerate: each takes rows of every batch, and their
gradients are summed.

    g = sum_p g_p        of the rows of process p, each weighed by its share of the whole batch

Every process holds the same adapters and takes the same steps: only the first, of rank 0, writes. Without such a start
there is one process, and nothing here does anything. What is told from one to all is JSON, never a pickle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

from ...core.errors import OneStepError

BACKENDS = "cpu:gloo,cuda:nccl"


@contextmanager
def joined() -> Iterator[None]:
    """Within, this process is one of those that WORLD_SIZE counts, where torchrun or accelerate has said so."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or distributed.is_initialized():
        yield
        return
    on_cards = torch.cuda.is_available()
    if on_cards:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group(BACKENDS if on_cards else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def count() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    return distributed.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def own(samples: int) -> range:
    """This process's rows of a batch of ``samples``. Raises OneStepError where there are fewer than processes."""
    if samples < count():
        raise OneStepError(f"batch is {samples} on {count()} processes: give at least {count()}, or start fewer")
    return range(samples * rank() // count(), samples * (rank() + 1) // count())


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        distributed.barrier()


@contextmanager
def first_alone() -> Iterator[None]:
    """Within, the first process alone; then the others, who find what it has made."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


def same(value: Any) -> Any:
    """The first process's ``value``, in all of them: what JSON can hold."""
    if count() == 1:
        return value
    told = torch.tensor(list(json.dumps(value).encode()) if is_first() else [], dtype=torch.uint8)
    length = torch.tensor([len(told)])
    distributed.broadcast(length, 0)
    told = told if is_first() else torch.empty(int(length), dtype=torch.uint8)
    distributed.broadcast(told, 0)
    return json.loads(bytes(told.tolist()))


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Each gradient becomes the sum of all processes', to the same bits in each."""
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if count() == 1 or not found:
        return
    flat = torch.cat([grad.flatten() for grad in found])
    distributed.all_reduce(flat)
    for grad, summed in zip(found, flat.split([grad.numel() for grad in found]), strict=True):
        grad.copy_(summed.view_as(grad))


def sum_numbers(numbers: dict[str, float]) -> dict[str, float]:
    """The sums of all processes' numbers, by name."""
    if count() == 1:
        return numbers
    names = sorted(numbers)
    values = torch.tensor([numbers[name] for name in names], dtype=torch.float64)
    distributed.all_reduce(values)
    return dict(zip(names, values.tolist(), strict=True))
