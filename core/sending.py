"""What goes from the host's memory to a card, without waiting for the card."""

from __future__ import annotations

import torch
from torch import Tensor

STAGED = ("cuda", "meta")
"""Devices to which a copy returns as soon as its source has been read; meta stands for a card in a plan. MPS and XPU
may read the source later, when it is another's."""


def sent(value: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``value`` of the host, on ``device``."""
    return value.to(device, dtype, non_blocking=device.type in STAGED)
