"""The gate of a gated feed-forward, which keeps its projection alone and computes the rest again on the way back.

    GEGLU:  y = h gelu(g),    SwiGLU:  y = h silu(g),    [h, g] = W x        (arXiv:2002.05202, Eq. 6)

Written out, autograd keeps h and g, which are the projection, and gelu(g), half as much again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import in_forward_ad
from .choice import REFERENCE, Op, load_triton

KINDS = ("geglu", "swiglu")


def gated(projected: Tensor, kind: str = "geglu") -> Tensor:
    """h gelu(g) or h silu(g). projected: [..., 2 d], h in the first half and g in the second, as diffusers and ComfyUI
    lay them. kind: "geglu" (gelu by the error function) or "swiglu". Returns [..., d]."""
    if kind not in KINDS or projected.shape[-1] % 2:
        raise ValueError(
            f"kind is {kind!r:.40} and the width {projected.shape[-1]}: {' or '.join(KINDS)}, of two halves"
        )
    if in_forward_ad():
        return gated_reference(projected, kind)
    if not torch.compiler.is_compiling():
        return _Gated.apply(projected, kind)  # an operator's detours are dear at a small size
    plain = OP.choice(projected.device, projected.dtype) == REFERENCE
    return gated_reference(projected, kind) if plain else _gated(projected, kind)  # a compiler fuses the plain form


def gated_reference(projected: Tensor, kind: str = "geglu") -> Tensor:
    """What `gated` computes, written out; every derivative of it works."""
    h, g = projected.chunk(2, -1)
    return h * (F.gelu(g) if kind == "geglu" else F.silu(g))


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, kind: str) -> Tensor:
        _keep(ctx, (projected, kind), None)
        return OP.run("forward", projected, projected, kind)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _back(ctx, gradients[0], partial(OP.run, "backward", gradients[0]))


@torch.library.custom_op("onestep::gated", mutates_args=(), schema="(Tensor projected, str kind) -> Tensor")
def _gated(projected: Tensor, kind: str) -> Tensor:
    return OP.run("forward", projected, projected, kind)[0]


@_gated.register_fake
def _(projected: Tensor, kind: str) -> Tensor:
    return projected.new_empty(*projected.shape[:-1], projected.shape[-1] // 2)


@torch.library.custom_op(
    "onestep::gated_backward", mutates_args=(), schema="(Tensor gradient, Tensor projected, str kind) -> Tensor"
)
def _gated_backward(gradient: Tensor, projected: Tensor, kind: str) -> Tensor:
    return OP.run("backward", projected, gradient, projected, kind)[0]


@_gated_backward.register_fake
def _(gradient: Tensor, projected: Tensor, kind: str) -> Tensor:
    return projected.new_empty(projected.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, str], output: Any) -> None:
    projected, ctx.kind = inputs
    ctx.save_for_backward(projected)


def _back(ctx: Any, gradient: Tensor, backward: Callable[..., Any]) -> tuple[Tensor, None]:
    (projected,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # somebody differentiates this backward
        again = gated_reference(projected, ctx.kind)
        return torch.autograd.grad(again, projected, gradient, create_graph=True)[0], None
    found = backward(gradient, projected, ctx.kind)
    return found if isinstance(found, Tensor) else found[0], None


_gated.register_autograd(partial(_back, backward=_gated_backward), setup_context=_keep)


# -- plain torch -------------------------------------------------------------------------------------------------------


def forward(projected: Tensor, kind: str) -> tuple[Tensor]:
    return (gated_reference(projected, kind),)


def backward(gradient: Tensor, projected: Tensor, kind: str) -> tuple[Tensor]:
    """dh = dy gelu(g),  dg = dy h gelu'(g)"""
    h, g = projected.chunk(2, -1)
    found = projected.new_empty(projected.shape)
    of_h, of_g = found.chunk(2, -1)
    aten, geglu = torch.ops.aten, kind == "geglu"
    # each product is written where it will lie, and nothing is held beside it
    (aten.gelu if geglu else aten.silu).out(g, out=of_h)
    of_h.mul_(gradient)
    torch.mul(gradient, h, out=of_g)
    (aten.gelu_backward if geglu else aten.silu_backward).grad_input(of_g, g, grad_input=of_g)
    return (found,)


def example(device: torch.device, dtype: torch.dtype, large: bool) -> dict[str, tuple[Any, ...]]:
    rows, width = (4096, 5120) if large else (5, 37)
    drawn = torch.randn(rows, 3 * width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    projected, gradient = drawn[:, : 2 * width].contiguous(), drawn[:, 2 * width :].contiguous()
    return {"forward": (projected, "geglu"), "backward": (gradient, projected, "geglu")}


OP = Op("gated", {"forward": forward, "backward": backward}, {"triton": lambda: load_triton("triton_gated")}, example)
