"""What a network's weights are known again by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn


def hash_of(modules: Sequence[nn.Module]) -> str:
    """Of all weights of ``modules``, by name."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            value = value.detach().cpu().contiguous()
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
