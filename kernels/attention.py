"""Attention behind one function: torch's SDPA, or xformers where it is installed and a small trial of it succeeds.

The environment variable ONESTEP_ATTENTION (auto, sdpa, xformers or reference; auto when unset) forces the choice.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
WORKS = "works"


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v, by the fastest back end that works for these tensors.

    q: [B, H, Sq, D]. k: [B, H, Sk, D]. v: [B, H, Sk, Dv]. mask: broadcastable to [B, H, Sq, Sk]; bool (True = look) or
    added to the scores. Returns [B, H, Sq, Dv]. A query that may look nowhere gets zeros. ValueError for an unknown or
    failing back end in ONESTEP_ATTENTION.
    """
    if mask is not None:
        mask = _four_axes(mask, q.dtype)
    # Only plain operations carry a tangent: fused kernels refuse forward-mode AD, or drop it silently.
    if in_forward_ad():
        return attention_reference(q, k, v, mask)
    return _BACKENDS[_choice(q)](q, k, v, mask)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """What `attention` computes, in plain torch; every derivative of it works."""
    return attention_with_lse(q, k, v, mask)[0]


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention and the logarithm of its normaliser, with which attentions over disjoint keys merge exactly.

    Shapes as in `attention`. Returns the output [B, H, Sq, Dv] and lse [B, H, Sq], float32 at least; lse is -inf for a
    query that may look nowhere. Outputs o_i merge to sum_i exp(lse_i - lse) o_i, lse = log sum_i exp(lse_i).
    """
    if not autocast(q):
        return _in_float32(q, k, v, mask)
    with torch.autocast(q.device.type, enabled=False):  # or float32 would end at the products
        return _in_float32(q, k, v, mask)


def _in_float32(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).mT / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + _additive(mask, wide)
    # A row of -inf has no finite maximum to subtract; any finite one gives it weights of zero.
    peak = scores.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(wide).min)
    weights = (scores - peak).exp()
    total = weights.sum(-1, keepdim=True)
    out = weights @ v.to(wide) / total.clamp_min(torch.finfo(wide).tiny)
    return out.to(v.dtype), (total.log() + peak).squeeze(-1)


def backends(device: torch.device | str | None = None) -> dict[str, str]:
    """What each back end does on ``device`` (a GPU if there is one, else the CPU): "works", or why it does not."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float16 if where.type == "cuda" else torch.float32
    return {name: _trial(name, where, dtype, 64) for name in _BACKENDS}


def in_forward_ad() -> bool:
    """Inside torch.func.jvp or forward_ad.dual_level."""
    level: int = getattr(forward_ad, "_current_level", -1)
    return level >= 0


def autocast(like: Tensor) -> bool:
    """Whether autocast is on where ``like`` lies. Of a device that has none, torch would not say."""
    return like.device.type != "meta" and torch.is_autocast_enabled(like.device.type)


def _four_axes(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[B or 1, H or 1, Sq or 1, Sk], bool or in the queries' dtype, as SDPA wants it."""
    mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
    return mask if mask.dtype == torch.bool else mask.to(dtype)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores: bool becomes 0 and -inf."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """xformers lays tensors out as [B, S, H, D] and wants a mask written out for every head."""
    from xformers.ops import memory_efficient_attention

    bias = None if mask is None else _written_out(_additive(mask, q.dtype), q, k)
    out: Tensor = memory_efficient_attention(*(part.transpose(1, 2) for part in (q, k, v)), attn_bias=bias)
    return out.transpose(1, 2)


def _written_out(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The mask as [B, H, Sq, Sk], its rows at multiples of 8 entries, as the kernel loads them."""
    wanted = (*q.shape[:3], k.shape[2])
    room = mask.new_zeros(*wanted[:3], -(-wanted[3] // 8) * 8)
    return room[..., : wanted[3]].copy_(mask.expand(wanted))


_BACKENDS: dict[str, Attention] = {"sdpa": _sdpa, "xformers": _xformers, "reference": attention_reference}


def _choice(q: Tensor) -> str:
    """The name of the back end for tensors like ``q``."""
    wanted = os.environ.get("ONESTEP_ATTENTION", "auto").lower()
    if wanted == "auto":
        return "xformers" if q.is_cuda and _trial_of("xformers", q) == WORKS else "sdpa"
    if wanted not in _BACKENDS:
        raise ValueError(f"ONESTEP_ATTENTION is {wanted!r}: set it to auto, {', '.join(_BACKENDS)}")
    if q.is_meta:  # a run that is counted: nothing to try, and fused kernels keep what torch's keeps
        return "reference" if wanted == "reference" else "sdpa"
    state = _trial_of(wanted, q)
    if state != WORKS:
        raise ValueError(f"ONESTEP_ATTENTION asks for {wanted}, which fails here ({state[:200]}): set it to auto")
    return wanted


def _trial_of(name: str, q: Tensor) -> str:
    return _trial(name, q.device, q.dtype, q.shape[-1])


@lru_cache(maxsize=64)
def _trial(name: str, device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Whether a back end computes and differentiates a small masked attention rightly here: "works", or the reason."""
    if name == "xformers" and importlib.util.find_spec("xformers") is None:
        return "not installed"
    try:
        error = _error(_BACKENDS[name], device, dtype, width)
    except Exception as trouble:  # whatever a foreign library does must not end a person's run
        return str(trouble).strip().split("\n")[0] or type(trouble).__name__
    return WORKS if error < 0.05 else f"wrong by {error:.2g} in a trial"


@torch.inference_mode(False)  # the first call may come from a sampler, under inference mode
@torch.enable_grad()
def _error(backend: Attention, device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Largest difference from the reference, of the output and its gradients, at 5 seeded queries and 9 keys."""
    drawn = torch.randn(3, 1, 2, 9, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    mask = (torch.arange(9, device=device) < 7).expand(1, 2, 5, 9)
    found = []
    for run in (backend, attention_reference):
        q, k, v = (part.clone().requires_grad_(True) for part in drawn)
        out = run(q[:, :, :5], k, v, mask)
        found.append((out.detach(), *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    return _largest_gap(*found)


@torch.no_grad()
def trial_error(
    ours: Callable[..., tuple[Tensor, Tensor]],
    reference: Callable[..., tuple[Tensor, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    width: int,
) -> float:
    """Largest difference between two attentions with lse, of both results, at 37 seeded queries and 9 keys."""
    drawn = torch.randn(3, 1, 2, 37, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    q, k, v = drawn[0], drawn[1][:, :, :9], drawn[2][:, :, :9]
    return _largest_gap(ours(q, k, v), reference(q, k, v))


def _largest_gap(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    """NaN where any number is: Python's own max would pass over it."""
    gaps = [(a.float() - b.float()).abs().max() for a, b in zip(ours, theirs, strict=True)]
    return float(torch.stack(gaps).max())
