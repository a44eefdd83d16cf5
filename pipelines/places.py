"""Where the parts of a pipeline lie: moved to a device for as long as they work there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def on_device(device: torch.device, *modules: Any) -> Iterator[None]:
    """Within, ``modules`` lie on ``device``; afterwards again where they were."""
    places = [(module, module.device) for module in modules]
    for module, _ in places:
        place(module, device)
    try:
        yield
    finally:
        for module, before in places:
            place(module, before)


def place(module: Any, device: torch.device) -> None:
    """Move a module, but not one that offload moves by itself."""
    if module.device != device and not is_offloaded(module):
        module.to(device)


@contextmanager
def channels_last(network: nn.Module, wanted: bool) -> Iterator[None]:
    """Within, where ``wanted``, the weights of convolutions lie as a card's convolutions read them, channels last;
    afterwards as they lay."""
    weights = [w for w in network.parameters() if wanted and w.ndim == 4 and not _is_last(w)]
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for weight in weights:
            weight.data = weight.data.contiguous(memory_format=torch.contiguous_format)


def _is_last(weight: torch.Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last)


def is_quantized(module: Any) -> bool:
    """Whether a quantiser made its weights, which may not be moved."""
    return getattr(module, "hf_quantizer", None) is not None


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate's hooks (CPU offload) or diffusers' own (group offload) move this module."""
    if hasattr(module, "_hf_hook"):
        return True
    hooks = (getattr(part, "_diffusers_hook", None) for part in module.modules())
    return any(hook is not None and hook.get_hook("group_offloading") is not None for hook in hooks)
