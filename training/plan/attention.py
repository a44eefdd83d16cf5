"""Attention as a machine does it that is not here: the fused kernels that torch would choose there.

On the meta device torch knows no choice and writes the scores out. Within `as_on`, scaled_dot_product_attention goes,
in this thread, to the operators of a graphics card (or of the CPU), whose shapes are known everywhere. No mode of torch
serves: one for functions is off in backward, where checkpointed blocks are computed again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
FLASH_WIDEST = 256
"""Numbers of a head that flash attention takes at most."""
Attend = Callable[..., Tensor]

_torchs: Attend = F.scaled_dot_product_attention
_here = threading.local()
_lock, _entered = threading.Lock(), [0]


@contextmanager
def as_on(machine: str) -> Iterator[None]:
    """machine: "cuda" or "cpu"."""
    before, _here.attend = getattr(_here, "attend", None), {"cuda": _on_cuda, "cpu": _on_cpu}[machine]
    _count(1)
    try:
        yield
    finally:
        _count(-1)
        _here.attend = before


def _count(by: int) -> None:
    """torch's own function is back when the last has left."""
    with _lock:
        _entered[0] += by
        F.scaled_dot_product_attention = _attend if _entered[0] else _torchs


def _attend(*args: Any, **kwargs: Any) -> Tensor:
    """Other threads than those within are served by torch."""
    return (getattr(_here, "attend", None) or _torchs)(*args, **kwargs)


def _on_cpu(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    mask = None if attn_mask is None else _added(attn_mask, query)
    out = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale
    )
    return out[0]  # type: ignore[no-any-return]


def _on_cuda(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    width = query.shape[-1]
    half = query.dtype in (torch.float16, torch.bfloat16)
    if attn_mask is None and half and width <= FLASH_WIDEST:
        odd = -width % 8
        if odd:
            scale = scale or width**-0.5
            query, key, value = (torch.nn.functional.pad(part, (0, odd)) for part in (query, key, value))
        out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return out[..., :width] if odd else out  # type: ignore[no-any-return]
    bias = None
    if attn_mask is not None:
        bias = _added(attn_mask, query).expand(*query.shape[:-1], key.shape[-2])
    wanted = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
        query, key, value, bias, wanted, dropout_p, is_causal, scale=scale
    )[0]


def _added(mask: Tensor, query: Tensor) -> Tensor:
    """A mask as torch adds it to the scores."""
    return torch.zeros_like(mask, dtype=query.dtype) if mask.dtype is torch.bool else mask
