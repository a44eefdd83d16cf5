"""AdamW over one role's factors, its step size as a function of the update, and its state as plain tensors."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from ..core.errors import OneStepError
from .settings import Settings


def rate(update: int, updates: int, height: float, settings: Settings) -> float:
    """Step size at ``update`` of ``updates``: a linear rise over ``warm_up``, then a cosine to ``final_rate`` of
    ``height``."""
    rise = min(1.0, (update + 1) / max(1, settings.warm_up))
    along = min(1.0, update / max(1, updates))
    fall = settings.final_rate + (1 - settings.final_rate) * (1 + math.cos(math.pi * along)) / 2
    return height * rise * fall


def eight_bit() -> Any:
    """bitsandbytes' AdamW8bit where it can be imported, else None."""
    try:
        return importlib.import_module("bitsandbytes").optim.AdamW8bit
    except Exception:  # a broken build of bitsandbytes raises anything from ImportError to OSError
        return None


def refuse_missing(settings: Settings) -> None:
    """Raises OneStepError where the optimiser that ``settings`` ask for is not there."""
    if settings.optimizer == "adamw8bit" and eight_bit() is None:
        raise OneStepError(
            "optimizer is 'adamw8bit', but bitsandbytes cannot be imported here: install it, or set optimizer=adamw"
        )


def make(parameters: list[Tensor], settings: Settings) -> torch.optim.Optimizer:
    """AdamW, with 8-bit moments where asked or, under "auto", where bitsandbytes works and the factors are on a GPU."""
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (0.9, 0.99),
        "weight_decay": settings.weight_decay,
    }
    on_gpu = bool(parameters) and parameters[0].is_cuda
    small = eight_bit() if settings.optimizer == "adamw8bit" or (settings.optimizer == "auto" and on_gpu) else None
    return (small or torch.optim.AdamW)(parameters, **options)  # type: ignore[no-any-return]


def pack(optimizer: torch.optim.Optimizer, prefix: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The optimiser's moments as named tensors, and its plain numbers."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            where: Any = tensors if isinstance(value, Tensor) else numbers
            where[f"{prefix}.{index}.{name}"] = value
    return tensors, numbers


def unpack(
    optimizer: torch.optim.Optimizer, prefix: str, tensors: dict[str, Tensor], numbers: dict[str, float]
) -> None:
    """Restore what :func:`pack` gave, each tensor in its own dtype."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **numbers}.items():
        owner, index, name = key.rsplit(".", 2)
        if owner == prefix:
            state.setdefault(int(index), {})[name] = value.clone() if isinstance(value, Tensor) else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
