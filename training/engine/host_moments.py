"""An optimiser's moments in the host's memory: a step has a part of them on the device at a time, to one result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..settings import Settings

MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")
"""Of AdamW, and of bitsandbytes' of 8 bits."""
PART = 2**23
"""Numbers of parameters whose moments are on the device at once, where no single tensor has more: 64 MiB at most."""


def serves(settings: Settings) -> bool:
    """Muon's step is of whole matrices, and its optimisers are two."""
    return settings.optimizer != "muon"


def send(optimizer: torch.optim.Optimizer) -> None:
    """All of them to the host."""
    _to_host(optimizer, list(optimizer.state))


def step(optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()`, whose equation is of each number by itself: part by part."""
    group = optimizer.param_groups[0]
    every = group["params"]
    try:
        for some in parts(every):
            group["params"] = some
            for parameter in some:
                entries = optimizer.state[parameter]
                for name in entries.keys() & set(MOMENTS):
                    entries[name] = entries[name].to(parameter.device, non_blocking=True)
            optimizer.step()
            _to_host(optimizer, some)
    finally:
        group["params"] = every


def parts(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """In order, of `PART` numbers at most where no tensor has more."""
    part: list[Tensor] = []
    for parameter in parameters:
        if part and sum(value.numel() for value in (*part, parameter)) > PART:
            yield part
            part = []
        part.append(parameter)
    if part:
        yield part


def _to_host(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
    devices = set()
    for parameter in parameters:
        entries = optimizer.state[parameter]
        for name in entries.keys() & set(MOMENTS):
            value = entries[name]
            if value.device.type != "cpu":
                # torch keeps pinned memory for the next that asks: the copy is as fast as the link is
                entries[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                entries[name].copy_(value, non_blocking=True)
                devices.add(value.device)
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
