"""What an operation makes of operands of given shapes, found once by running it on the meta device, then known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from .trace import Cost

aten = torch.ops.aten
Spec = tuple[Any, Any, torch.dtype]
"""Shape, strides and dtype of a tensor."""
CALLED = "called"
"""In the place of specs: a view, which must be made of its base each time."""
ON_CPU = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
}


def key_of(func: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], Any]:
    """The tensors among the operands, and what a result's shapes depend on."""
    tensors: list[Tensor] = []
    key: list[Any] = [id(func)]
    for value in args:
        if isinstance(value, Tensor):
            tensors.append(value)
            key += value.shape, value.stride(), value.dtype, value.is_meta
        else:
            key.append(_described(value, tensors))
    for name, value in kwargs.items():
        key += name, _described(value, tensors)
    return tensors, tuple(key)


def _described(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.is_meta
    if isinstance(value, list | tuple):
        return tuple(_described(entry, tensors) for entry in value)
    # 1, 1.0 and True are equal, but not to an operation
    return type(value), value


@dataclass(frozen=True)
class Kernel:
    """specs: of the tensors that it makes; CALLED for views; None for what writes into its operands and answers the one
    at ``written``, or nothing. cost: None for views. crosses: its name where it takes something from the host,
    "sent" where that waits for nobody."""

    specs: Any
    written: int | None
    cost: Cost | None
    crosses: str = ""

    @property
    def fresh(self) -> bool:
        """Whether it makes storages of its own."""
        return self.specs is not None and self.specs is not CALLED

    def run(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """What ``func`` would answer, without running it."""
        if self.specs is CALLED:
            return func(*args, **kwargs)
        if self.specs is None:
            return None if self.written is None else tensors[self.written]
        return _made(self.specs)


def _made(specs: Any) -> Any:
    if isinstance(specs, _Several):
        return specs.kind(_made(spec) for spec in specs.parts)
    if isinstance(specs, _Tensor):
        shape, stride, dtype = specs.spec
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    return specs


@dataclass(frozen=True)
class _Tensor:
    spec: Spec


@dataclass(frozen=True)
class _Several:
    kind: Any
    parts: tuple[Any, ...]


def _specs(result: Any) -> Any:
    if isinstance(result, Tensor):
        return _Tensor((result.shape, result.stride(), result.dtype))
    if isinstance(result, tuple | list):
        return _Several(type(result), tuple(_specs(entry) for entry in result))
    return result


def kernel_of(func: Any, args: Any, kwargs: Any, tensors: list[Tensor], result: Any) -> Kernel:
    """By what running it once has made."""
    made = [entry for entry in (result if isinstance(result, tuple | list) else (result,)) if isinstance(entry, Tensor)]
    written = next((at for at, tensor in enumerate(tensors) if tensor is result), None)
    crosses = "" if all(tensor.is_meta for tensor in tensors) else "sent" if kwargs.get("non_blocking") else f"{func}"
    if written is not None or not made:
        return Kernel(None, written, _cost(func, args, kwargs, tensors, result), crosses)
    storages = [id(tensor.untyped_storage()) for tensor in made]
    shared = {id(tensor.untyped_storage()) for tensor in tensors}
    if shared.intersection(storages):
        return Kernel(CALLED, None, None)
    if len(set(storages)) < len(storages):
        return Kernel(CALLED, None, _cost(func, args, kwargs, tensors, result), crosses)
    return Kernel(_specs(result), None, _cost(func, args, kwargs, tensors, result), crosses)


def _cost(func: Any, args: Any, kwargs: Any, tensors: list[Tensor], result: Any) -> Cost:
    """Every operand is read and every result written once; what is given to be written, out=, is not read."""
    made = [entry for entry in (result if isinstance(result, tuple | list) else (result,)) if isinstance(entry, Tensor)]
    packet = ON_CPU.get(func.overloadpacket, func.overloadpacket)
    formula = flop_registry.get(packet)
    flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
    given = [id(value) for name, value in kwargs.items() if name in ("out", "grad_input")]
    read = [tensor for tensor in tensors if id(tensor) not in given]
    moved = [_bytes(tensor) for tensor in (*read, *made) if tensor.is_meta]
    width = min((tensor.element_size() for tensor in tensors if tensor.is_meta), default=4)
    return Cost(flops, tuple(moved), width)


def _bytes(tensor: Tensor) -> int:
    """That are read or written: what is repeated by a stride of 0 lies there once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
