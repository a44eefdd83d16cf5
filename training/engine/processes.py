"""Several processes that train one run, started by torchrun or accelerate: each takes rows of every batch, and their
gradients are summed.

    g = sum_p g_p        of the rows of process p, each weighed by its share of the whole batch

Every process holds the same adapters and takes the same steps: only the first, of rank 0, writes. Without such a start
there is one process, and nothing here does anything. What is told from one to all is JSON, never a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

from ...core.errors import OneStepError

BACKENDS = "cpu:gloo,cuda:nccl"
PATIENCE = timedelta(days=1)
"""For which one process waits for another: the first one alone encodes the prompts, draws what the watch compares with
and writes, which may take longer than torch's ten minutes. One that has died is noticed at once."""
MOST = 2**24
"""Numbers that are summed at once: so much room, not that of all gradients, is taken beside them."""


class Alone(OneStepError):
    """Another process of the run has ended, or cannot be reached."""


@contextmanager
def joined(device: str | None = None) -> Iterator[str | None]:
    """Within, this process is one of those that WORLD_SIZE counts, where torchrun or accelerate has said so.

    device: as a person names it; what is yielded is this process's own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or distributed.is_initialized():
        yield device
        return
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = own_device(device, cards)
    if device == f"cuda:{_local_rank()}":
        torch.cuda.set_device(device)  # what names no device of its own goes there too
    try:
        distributed.init_process_group(BACKENDS if cards else "gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise OneStepError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']:.20}, but the processes do not find each other ({_why(error)}): "
            "start them by torchrun or accelerate launch, or unset WORLD_SIZE"
        ) from None
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def own_device(name: str | None, cards: int) -> str | None:
    """The device of this process where ``name`` is asked of all: the GPU of its place on the machine.

    cards: GPUs that it sees. Raises OneStepError where one GPU is named to several processes of a machine, and where
    there are fewer GPUs than processes.
    """
    kind, _, index = (name or "cuda").partition(":")
    if kind != "cuda" or not cards:
        return name
    own, here = _local_rank(), int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE", "1"))
    if index and here > 1:
        raise OneStepError(
            f"--device {name:.20} is one GPU for the {here} processes of this machine: leave --device out, so that "
            "each takes a GPU of its own, and choose which by CUDA_VISIBLE_DEVICES"
        )
    if index:
        return name
    if own >= cards:
        raise OneStepError(f"this machine has {cards} GPUs, fewer than its processes: start at most {cards} on it")
    return f"cuda:{own}"


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def _met() -> Iterator[None]:
    """Within, processes exchange something. Raises Alone where one of them is gone."""
    try:
        yield
    except RuntimeError as error:
        raise Alone(
            f"another process of this run has ended or cannot be reached ({_why(error)}): what it has said tells why. "
            "The last state is intact: start the run again with --resume"
        ) from None


def _why(error: Exception) -> str:
    """The first line of what torch says, without the place in its own source."""
    lines = re.sub(r"^\[[^\]]*\]\s*", "", str(error).strip()).splitlines()
    return (lines or [type(error).__name__])[0][:120]


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
        with _met():  # not a barrier, which waits on a card
            distributed.all_reduce(torch.zeros(1))


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
    with _met():
        distributed.broadcast(length, 0)
        told = told if is_first() else torch.empty(int(length), dtype=torch.uint8)
        distributed.broadcast(told, 0)
    return json.loads(bytes(told.tolist()))


def agree(facts: Mapping[str, Any]) -> None:
    """Raises OneStepError, in every process, where not all have these ``facts``, by name: what JSON can hold."""
    if count() == 1:
        return
    hashes = [hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest() for value in facts.values()]
    own = torch.tensor([list(digest) for digest in hashes], dtype=torch.uint8)
    every = [torch.empty_like(own) for _ in range(count())]
    with _met():
        distributed.all_gather(every, own)
    other = [name for at, name in enumerate(facts) if any(not torch.equal(one[at], every[0][at]) for one in every)]
    if other:
        raise OneStepError(
            f"the {count()} processes of this run have not the same {' and '.join(other)}: start all of them with the "
            "same command, checkpoint and files"
        )


def refuse_shared(device: torch.device) -> None:
    """Raises OneStepError, in every process, where two of them have one GPU. device: this process's."""
    if count() == 1:
        return
    own = torch.tensor(list(hashlib.sha256(_card(device).encode()).digest()), dtype=torch.uint8)
    every = [torch.empty_like(own) for _ in range(count())]
    with _met():
        distributed.all_gather(every, own)
    ranks = [at for at, one in enumerate(every) if sum(torch.equal(one, other) for other in every) > 1]
    if ranks:
        raise OneStepError(
            f"processes {' and '.join(map(str, ranks))} of this run have one GPU between them: start one for each GPU, "
            "by torchrun or accelerate launch, which tell each its LOCAL_RANK; CUDA_VISIBLE_DEVICES chooses the GPUs"
        )


def _card(device: torch.device) -> str:
    """What only this GPU is called, on any machine; on a CPU, which processes share, what only this process is."""
    if device.type != "cuda":
        return f"process {rank()}"
    found = torch.cuda.get_device_properties(device)
    return str(getattr(found, "uuid", None) or f"{platform.node()} {device}")


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Each gradient becomes the sum of all processes', to the same bits in each."""
    if count() == 1:
        return
    for grads in _parts(_gradients(parameters)):
        flat = torch.cat([grad.flatten() for grad in grads])
        with _met():
            distributed.all_reduce(flat)
        for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(summed.view_as(grad))


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Of those that have one in any process: 0 where this one's rows gave none."""
    reached = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
    with _met():
        distributed.all_reduce(reached)
    found = [parameter for parameter, somewhere in zip(parameters, reached.tolist(), strict=True) if somewhere]
    for parameter in found:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in found if parameter.grad is not None]


def _parts(values: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """``values`` in order, in parts of at most `MOST` numbers, or of one."""
    part: list[Tensor] = []
    held = 0
    for value in values:
        if part and held + value.numel() > MOST:
            yield part
            part, held = [], 0
        part.append(value)
        held += value.numel()
    if part:
        yield part


def sum_tensor(value: Tensor) -> Tensor:
    """The sum of all processes' ``value``."""
    if count() == 1:
        return value
    summed = value.detach().cpu().clone()
    with _met():
        distributed.all_reduce(summed)
    return summed.to(value)


def sum_numbers(numbers: dict[str, float]) -> dict[str, float]:
    """The sums of all processes' numbers, by name."""
    if count() == 1:
        return numbers
    names = sorted(numbers)
    values = torch.tensor([numbers[name] for name in names], dtype=torch.float64)
    with _met():
        distributed.all_reduce(values)
    return dict(zip(names, values.tolist(), strict=True))
