"""Windows' drivers give a full card the host's memory, many times slower, and say nothing: a program that owns its
card sets a limit below that, so that memory runs out instead, and work goes on in smaller slices."""

from __future__ import annotations

import os
import platform

import torch

SPARED = 0.02
"""Share of a card that is left to what else draws on it."""


def spills() -> bool:
    """Whether the driver here does that: on Windows, and in Linux under it."""
    return os.name == "nt" or "microsoft" in platform.release().lower()


def share(free: int, total: int, own: int = 0) -> float:
    """The largest share of a card's ``total`` bytes that a process may take where ``free`` are free: those, and its
    ``own`` already taken, less a little. Between 0.05 and 1."""
    return min(1.0, max(0.05, (free + own) / total - SPARED))


def limit(device: torch.device) -> float | None:
    """Keep this process, whose card it is, within the card's own memory. The share that it may take; None where
    nothing is limited. Never inside a program that shares its card out itself, as ComfyUI does."""
    if device.type != "cuda" or not spills():
        return None
    free, total = torch.cuda.mem_get_info(device)
    allowed = share(free, total, torch.cuda.memory_reserved(device))
    torch.cuda.set_per_process_memory_fraction(allowed, device)
    return allowed
