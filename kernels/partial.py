"""Attention over a part of the keys: the output with the logarithm of its normaliser, by which parts merge exactly."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import WORKS, attention_with_lse, in_forward_ad, trial_error

_OPS = torch.ops.aten


class Partial(NamedTuple):
    """Attention over some of the keys. out: [B, H, Sq, Dv]. lse: [B, H, Sq], log of the sum of exp of the scores."""

    out: Tensor
    lse: Tensor

    def shifted(self, bias: float) -> Partial:
        """As if ``bias`` were added to every score of this part."""
        return Partial(self.out, self.lse + bias)

    def scaled(self, factor: float) -> Partial:
        """As if every value of this part were multiplied by ``factor``."""
        return Partial(self.out * factor, self.lse)


def partial_attention(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    """softmax(q k^T / sqrt(D)) v and its lse, by torch's fused kernel where it works and nobody differentiates.

    q: [B, H, Sq, D]. k: [B, H, Sk, D]. v: [B, H, Sk, Dv]. Returns Partial; lse is float32 at least.
    """
    differentiated = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if differentiated or in_forward_ad() or _trial(q.device, q.dtype, q.shape[-1], v.shape[-1]) != WORKS:
        return Partial(*attention_with_lse(q, k, v))
    return _fused(q, k, v)


def merge(*parts: Partial) -> Tensor:
    """softmax over the union of the parts' keys: sum_i exp(lse_i - lse) out_i, lse = log sum_i exp(lse_i)."""
    lse = torch.stack([part.lse for part in parts])
    weights = lse.softmax(0).unsqueeze(-1).to(parts[0].out.dtype)
    total = parts[0].out * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total = torch.addcmul(total, part.out, weight)
    return total


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    """torch's flash attention of a CPU, its memory-efficient attention elsewhere (whose lse has padded rows)."""
    if q.device.type == "cpu":
        out, lse = _OPS._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    else:
        out, lse, *_ = _OPS._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return Partial(out, lse[..., : q.shape[2]])


@lru_cache(maxsize=64)
def _trial(device: torch.device, dtype: torch.dtype, width: int, value_width: int) -> str:
    """Whether the fused kernel is right here: "works", or the reason why the plain one is used."""
    if width != value_width:
        return "keys and values differ in width"
    try:
        error = trial_error(_fused, attention_with_lse, device, dtype, width)
    except Exception as trouble:  # whatever a device's kernel does must not end a person's run
        return str(trouble).strip().split("\n")[0] or type(trouble).__name__
    return WORKS if error < 0.05 else f"wrong by {error:.2g} in a trial"
