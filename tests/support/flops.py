"""FLOPs of real work on the CPU, by torch's own formulas, and a card on which seconds are FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from onestep.training.plan.cards import OF_FLOPS, Card
from onestep.training.plan.kernels import ON_CPU

ONE_FLOP_A_SECOND = Card("made for a test", 2**40, 1e-12 / OF_FLOPS, 1e-12 / OF_FLOPS, 1e12)
"""Seconds on it are FLOPs: nothing else counts beside them."""


class Flops(TorchDispatchMode):
    """Of whatever runs within, by torch's own formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(ON_CPU.get(func.overloadpacket, func.overloadpacket))
        self.total += 0 if formula is None else int(formula(*args, **(kwargs or {}), out_val=result))
        return result


def flops_of(work: Callable[[], object]) -> int:
    with Flops() as counted:
        work()
    return counted.total
