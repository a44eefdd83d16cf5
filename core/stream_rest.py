"""What a streamed network has beside its streamed weights, on the device for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .packed import Weight

Move = Callable[[torch.device], Any]


@contextmanager
def moved(network: nn.Module, streamed: set[int], device: torch.device) -> Iterator[None]:
    """Within, all tensors of ``network`` lie on ``device``, but for the parameters whose ids are ``streamed``: other
    parameters, buffers, what a layer holds as a plain attribute, and what quantised weights are read with."""
    back: list[tuple[Move, torch.device]] = []
    try:
        for module in network.modules():
            for before, move in _movable(module, streamed):
                if before != device:
                    back.append((move, before))
                    move(device)
        yield
    finally:
        for move, before in reversed(back):
            move(before)


def _movable(module: Any, streamed: set[int]) -> Iterator[tuple[torch.device, Move]]:
    """(where it is, how it is moved) of each tensor."""
    for parameter in module.parameters(recurse=False):
        if id(parameter) not in streamed:
            yield parameter.device, partial(_move_parameter, parameter)
        state = getattr(parameter, "quant_state", None)  # bitsandbytes' of a 4-bit weight
        if state is not None:
            yield state.absmax.device, state.to
    tensors = [(module, name) for name, value in module._buffers.items() if value is not None]
    tensors += [(module, name) for name, value in vars(module).items() if isinstance(value, Tensor)]
    if isinstance(getattr(getattr(module, "state", None), "SCB", None), Tensor):  # of an 8-bit one
        tensors.append((module.state, "SCB"))
    for owner, name in tensors:
        yield getattr(owner, name).device, partial(_move_attribute, owner, name)


def _move_parameter(parameter: Tensor, device: torch.device) -> None:
    weight = Weight(parameter)
    weight.put([part.to(device) for _, part in weight.parts])


def _move_attribute(owner: Any, name: str, device: torch.device) -> None:
    setattr(owner, name, getattr(owner, name).to(device))
