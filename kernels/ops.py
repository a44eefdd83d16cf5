"""All ops that have more than one implementation, and which one serves here."""

from __future__ import annotations

import torch

from .add_lora import OP as ADD_LORA
from .choice import REFERENCE, WORKS, Op
from .gated import OP as GATED
from .rotary import OP as ROTARY
from .steered import OP as STEERED

OPS: tuple[Op, ...] = (ADD_LORA, GATED, ROTARY, STEERED)


def states(device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> dict[str, str]:
    """By op, which implementation serves on ``device`` (a GPU if there is one, else the CPU), and what the others do.

    dtype: float16 on a GPU and float32 on a CPU where it is None.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    wide = dtype or (torch.float16 if where.type == "cuda" else torch.float32)
    return {op.name: _state(op, where, wide) for op in OPS}


def _state(op: Op, device: torch.device, dtype: torch.dtype) -> str:
    chosen = op.choice(device, dtype)
    others = "; ".join(f"{name}: {_other(op, name, device, dtype)}" for name in op.loaders)
    return f"{'plain torch' if chosen == REFERENCE else chosen} serves ({others})"


def _other(op: Op, name: str, device: torch.device, dtype: torch.dtype) -> str:
    state = op.state(name, device, dtype)
    if state != WORKS or device.type != "cuda":
        return state
    return f"works, {op.speed(name, device, dtype):.2f} times as fast as plain torch"
