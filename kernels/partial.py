"""Attention over a part of the keys: the output with the logarithm of its normaliser, by which parts merge exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import attention_with_lse, in_forward_ad, trial_error

Kernel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Partial(NamedTuple):
    """Attention over some of the keys. out: [B, H, Sq, Dv]. lse: [B, H, Sq], log of the sum of exp of the scores.

    Over no keys at all, out is 0 and lse is -inf.
    """

    out: Tensor
    lse: Tensor

    def shifted(self, bias: float) -> Partial:
        """As if ``bias`` were added to every score of this part."""
        return Partial(self.out, self.lse + bias)

    def scaled(self, factor: float) -> Partial:
        """As if every value of this part were multiplied by ``factor``."""
        return Partial(self.out * factor, self.lse)

    def joined(self, other: Partial) -> Partial:
        """Attention over the keys of both; one of the two must have some.

        The other's share has the precision of the outputs, so in half precision the larger part comes first.
        """
        # p = exp(lse_2) / (exp(lse_1) + exp(lse_2)),  o = o_1 + p (o_2 - o_1): one pass, rounded once
        share = torch.sigmoid(other.lse - self.lse).to(self.out.dtype).unsqueeze(-1)
        return Partial(torch.lerp(self.out, other.out, share), torch.logaddexp(self.lse, other.lse))


def merge(*parts: Partial) -> Tensor:
    """softmax over the union of the parts' keys: sum_i exp(lse_i - lse) out_i, lse = log sum_i exp(lse_i)."""
    return reduce(Partial.joined, parts).out


def partial_attention(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    """softmax(q k^T / sqrt(D)) v and its lse, by torch's fused kernel where it works and nobody differentiates.

    q: [B, H, Sq, D]. k: [B, H, Sk, D]. v: [B, H, Sk, Dv]; its dtype is the result's. Returns Partial; lse is float32 at
    least.
    """
    # As SDPA does under autocast, where rotary embedding and norms leave q and k in float32 beside a half v.
    q, k = q.to(v.dtype), k.to(v.dtype)
    if k.shape[2] == 0:
        return _over_nothing(q, v)
    differentiated = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    plain = differentiated or in_forward_ad() or not _alike(q, k, v)
    kernel = _KERNELS["plain" if plain else _choice(q.device, q.dtype, q.shape[3])]
    return Partial(*kernel(_dense(q), _dense(k), _dense(v)))


def _over_nothing(q: Tensor, v: Tensor) -> Partial:
    """What queries find where there are no keys."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return Partial(v.new_zeros(*q.shape[:3], v.shape[3]), q.new_full(q.shape[:3], -math.inf, dtype=wide))


def _alike(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a fused kernel may be called: it trusts its caller, and reads beside its tensors where shapes differ."""
    return k.shape == v.shape and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3] and q.numel() > 0


def _dense(part: Tensor) -> Tensor:
    """With a token's numbers side by side, which the fused kernels take for granted."""
    return part if part.stride(3) == 1 else part.contiguous()


def _flash_on_cpu(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, lse


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Serves half precision alone."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return out, lse


def _memory_efficient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Its lse has padded rows."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return out, lse[..., : q.shape[2]]


_KERNELS: dict[str, Kernel] = {
    "flash on the cpu": _flash_on_cpu,
    "flash": _flash,
    "memory-efficient": _memory_efficient,
    "plain": attention_with_lse,
}


@torch.compiler.assume_constant_result  # a compiler takes the answer; a trial is nothing to trace
def _choice(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """The name of the fastest kernel that is right for such tensors."""
    return _tried(device, dtype, width)


@lru_cache(maxsize=64)
def _tried(device: torch.device, dtype: torch.dtype, width: int) -> str:
    candidates = ["flash on the cpu"] if device.type == "cpu" else ["flash", "memory-efficient"]
    return next((name for name in candidates if _right(_KERNELS[name], device, dtype, width)), "plain")


def _right(kernel: Kernel, device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether a kernel gives the reference's numbers in a small trial."""
    try:
        return trial_error(kernel, attention_with_lse, device, dtype, width) < 0.05
    except Exception:  # whatever a device's kernel does must not end a person's run
        return False
