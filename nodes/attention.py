"""The attention of a network that ComfyUI has loaded and that is trained, whatever ComfyUI was started with."""

from __future__ import annotations

import os
from typing import Any

import comfy.ldm.modules.attention
from torch import Tensor

from ..kernels import attention


def differentiable_attention(kernel: Any, *args: Any, **kwargs: Any) -> Tensor:
    """An ``optimized_attention_override``: torch's own attention, as some fast kernels have no backward; or what
    ONESTEP_ATTENTION names, whose backward was tried."""
    wanted = os.environ.get("ONESTEP_ATTENTION", "auto").lower()
    if wanted in ("auto", "sdpa") or kwargs.get("scale") is not None or kwargs.get("enable_gqa"):
        return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)
    return _chosen(*args, **kwargs)


def _chosen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **more: Any,
) -> Tensor:
    """q, k, v: [B, S, H D], or [B, H, S, D] where they skip_reshape; and so is the answer. mask: [Sq, Sk], [B, Sq, Sk]
    or [B, H, Sq, Sk]."""
    if not skip_reshape:
        q, k, v = (value.unflatten(-1, (heads, -1)).transpose(1, 2) for value in (q, k, v))
    if mask is not None and mask.ndim == 3:
        mask = mask[:, None]
    out = attention(q, k, v, mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)
