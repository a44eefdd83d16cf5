"""Cross-attention to a positive and a negative text at once, NASA's or NAG's mix of the two included.

    Z+ = softmax(q k+^T / sqrt(D)) v+,   Z- = softmax(q k-^T / sqrt(D)) v-

NASA: Negative-Away Steer Attention (arXiv:2412.02687). NAG: Normalized Attention Guidance (arXiv:2505.21179). Texts are
short, so that a fused kernel saves passes over the picture's rows and launches, a few hundredths of a forward, and no
arithmetic: it is here as the smallest op that has every form an op can have.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention import attention, autocast, in_forward_ad
from .choice import REFERENCE, Op, load_cuda, load_triton
from .steering import nag, nasa


class Steer(NamedTuple):
    """NASA's scale a (nag False), or NAG's s >= 1 with tau >= 1, alpha and the order of its norm, 1 or 2."""

    scale: float
    nag: bool = False
    tau: float = 2.5
    alpha: float = 0.25
    order: float = 1


def steered_attention(q: Tensor, k: Tensor, v: Tensor, negative_k: Tensor, negative_v: Tensor, steer: Steer) -> Tensor:
    """q: [B, H, N, D]. k, v: [B, H, L, D]. negative_k, negative_v: [B, H, M, D]. Returns [B, H, N, D] in v's dtype.

    Backward goes by plain torch, through the two attentions' own kernels.
    """
    tensors = q, k, v, negative_k, negative_v
    graph = torch.is_grad_enabled() and any(value.requires_grad for value in tensors)
    if graph or in_forward_ad() or autocast(q) or not _alike(*tensors) or OP.choice(q.device, q.dtype) == REFERENCE:
        return steered_attention_reference(*tensors, steer)
    return _steered(*tensors, *steer)


def steered_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, negative_k: Tensor, negative_v: Tensor, steer: Steer
) -> Tensor:
    """What `steered_attention` computes, by two attentions; every derivative of it works."""
    positive, negative = attention(q, k, v), attention(q, negative_k, negative_v)
    if not steer.nag:
        return nasa(positive, negative, steer.scale)
    return nag(positive, negative, steer.scale, steer.tau, steer.alpha, steer.order)


def _alike(q: Tensor, *others: Tensor) -> bool:
    """Whether a kernel may be called: one dtype, device, batch, width; some keys of either text."""
    fit = all(o.shape[:2] == q.shape[:2] and o.shape[3] == q.shape[3] and o.dtype == q.dtype for o in others)
    short = others[0].shape == others[1].shape and others[2].shape == others[3].shape
    return fit and short and all(o.shape[2] > 0 and o.device == q.device for o in others) and q.numel() > 0


@torch.library.custom_op(
    "onestep::steered_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor negative_k, Tensor negative_v, float scale, bool nag, float tau, "
    "float alpha, float order) -> Tensor",
)
def _steered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    negative_k: Tensor,
    negative_v: Tensor,
    scale: float,
    nag: bool,
    tau: float,
    alpha: float,
    order: float,
) -> Tensor:
    return OP.run("forward", q, q, k, v, negative_k, negative_v, Steer(scale, nag, tau, alpha, order))[0]


@_steered.register_fake
def _(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.steer = Steer(*inputs[5:])


def _back(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, k2, v2 = leaves = [value.detach().requires_grad_(True) for value in ctx.saved_tensors]
    with torch.enable_grad():
        again = steered_attention_reference(q, k, v, k2, v2, ctx.steer)
    return *torch.autograd.grad(again, leaves, gradient), *(None for _ in ctx.steer)


_steered.register_autograd(_back, setup_context=_keep)


def forward(q: Tensor, k: Tensor, v: Tensor, negative_k: Tensor, negative_v: Tensor, steer: Steer) -> tuple[Tensor]:
    return (steered_attention_reference(q, k, v, negative_k, negative_v, steer),)


def example(device: torch.device, dtype: torch.dtype, large: bool) -> dict[str, tuple[Any, ...]]:
    """Two of a batch, a width that is no power of two; NASA and NAG, whose limit reaches some tokens alone."""
    heads, tokens, width, keys = (20, 1024, 64, 77) if large else (2, 19, 40, 21)
    source = torch.Generator().manual_seed(0)
    lengths = tokens, keys, keys, keys + 9, keys + 9
    drawn = [torch.randn(2, heads, length, width, generator=source).to(device, dtype) for length in lengths]
    return {"forward": (*drawn, Steer(3.0, True, 2.5, 0.5))}


OP = Op(
    "steered_attention",
    {"forward": forward},
    {"triton": lambda: load_triton("triton_steered"), "cuda": lambda: load_cuda("steered_attention")},
    example,
)
