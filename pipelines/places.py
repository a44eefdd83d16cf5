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


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate's hooks (CPU offload) or diffusers' own (group offload) move this module."""
    if hasattr(module, "_hf_hook"):
        return True
    hooks = (getattr(part, "_diffusers_hook", None) for part in module.modules())
    return any(hook is not None and hook.get_hook("group_offloading") is not None for hook in hooks)
