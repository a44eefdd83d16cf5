r"""Root-mean-square norm and rotary embedding of queries or keys in one pass, in float32 between.

    n = w x / sqrt(mean x^2 + eps)                        (RMSNorm, arXiv:1910.07467, Eq. 4)
    y_2i = n_2i cos - n_2i+1 sin,   y_2i+1 = n_2i+1 cos + n_2i sin     (RoFormer, arXiv:2104.09864, Eq. 34)

Written out, each step reads and writes all queries, four of them in float32, and autograd keeps some of what is
between; here x alone is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import autocast, in_forward_ad
from .choice import REFERENCE, Op, load_triton


def normed_rotary(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """x: [B, S, H, D], D even. weight: [D]. cos, sin: [S, D], float32, of each channel's angle, which the two of a pair
    share. Returns [B, S, H, D] in x's dtype."""
    learnt = torch.is_grad_enabled() and any(value.requires_grad for value in (weight, cos, sin))
    if learnt or in_forward_ad() or autocast(x):
        return normed_rotary_reference(x, weight, cos, sin, eps)
    if not torch.compiler.is_compiling():
        return _NormedRotary.apply(x, weight, cos, sin, eps)
    plain = OP.choice(x.device, x.dtype) == REFERENCE  # a compiler fuses the plain form
    return (normed_rotary_reference if plain else _normed_rotary)(x, weight, cos, sin, eps)


def normed_rotary_reference(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """What `normed_rotary` computes, written out; every derivative of it works."""
    wide = torch.promote_types(x.dtype, torch.float32)
    value = x.to(wide)
    n = weight.to(wide) * value * (value.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (n * _angles(cos, wide) + _turned(n) * _angles(sin, wide)).to(x.dtype)


def _angles(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype)[:, None, :]


def _turned(n: Tensor) -> Tensor:
    """(-n_1, n_0, -n_3, n_2, ...)"""
    even, odd = n.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-odd, even), -1).flatten(-2)


class _NormedRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps = eps
        return OP.run("forward", x, x, weight, cos, sin, eps)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _went_back(ctx, gradients[0], lambda *given: OP.run("backward", gradients[0], *given)[0])


def _went_back(ctx: Any, gradient: Tensor, backward: Any) -> Any:
    x, weight, cos, sin = ctx.saved_tensors
    if torch.is_grad_enabled():  # somebody differentiates this backward
        again = normed_rotary_reference(x, weight, cos, sin, ctx.eps)
        return torch.autograd.grad(again, x, gradient, create_graph=True)[0], None, None, None, None
    return backward(gradient, x, weight, cos, sin, ctx.eps), None, None, None, None


@torch.library.custom_op(
    "onestep::normed_rotary",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps) -> Tensor",
)
def _normed_rotary(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    return OP.run("forward", x, x, weight, cos, sin, eps)[0]


@_normed_rotary.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "onestep::normed_rotary_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps) -> Tensor",
)
def _normed_rotary_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    return OP.run("backward", x, gradient, x, weight, cos, sin, eps)[0]


@_normed_rotary_backward.register_fake
def _(gradient: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.eps = inputs[4]


_normed_rotary.register_autograd(
    lambda ctx, gradient: _went_back(ctx, gradient, _normed_rotary_backward), setup_context=_keep
)


# -- plain torch -------------------------------------------------------------------------------------------------------


def forward(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor]:
    return (normed_rotary_reference(x, weight, cos, sin, eps).contiguous(),)


def backward(gradient: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor]:
    """With r = 1 / sqrt(mean x^2 + eps):  dn = dy cos - turned(dy sin),  dx = r w dn - x r^3 mean(x w dn)"""
    wide = torch.promote_types(x.dtype, torch.float32)
    dy, value = gradient.to(wide), x.to(wide)
    scaled = weight.to(wide) * (dy * _angles(cos, wide) - _turned(dy * _angles(sin, wide)))
    r = (value.square().mean(-1, keepdim=True) + eps).rsqrt()
    dx = r * (scaled - value * r.square() * (value * scaled).mean(-1, keepdim=True))
    return (dx.to(x.dtype).contiguous(),)


def example(device: torch.device, dtype: torch.dtype, large: bool) -> dict[str, tuple[Any, ...]]:
    """Flux' queries at 1024 pixels; or heads of 6 channels."""
    batch, length, heads, width = (1, 4608, 24, 128) if large else (2, 5, 3, 6)
    source = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    x, gradient = (drawn(batch, length, heads, width).to(device, dtype) for _ in range(2))
    weight, angle = 1 + 0.1 * drawn(width), drawn(length, width // 2).repeat_interleave(2, 1)
    rest = weight.to(device, dtype), angle.cos().to(device), angle.sin().to(device), 1e-6
    return {"forward": (x, *rest), "backward": (gradient, x, *rest)}


OP = Op(
    "normed_rotary",
    {"forward": forward, "backward": backward},
    {"triton": lambda: load_triton("triton_rotary")},
    example,
)
