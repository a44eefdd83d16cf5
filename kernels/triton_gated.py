"""`gated` in Triton: one pass over the projection forward, one back; float32 between."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .choice import NotServedError

BLOCK = 1024


@triton.jit
def _gate(g, GELU: tl.constexpr):
    """gelu(g) and gelu'(g) = Phi(g) + g phi(g), or silu's."""
    if GELU:
        share = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        slope = share + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    else:
        share = tl.sigmoid(g)
        slope = share + g * share * (1.0 - share)
    return g * share, slope


@triton.jit
def _forward(out, projected, width, stride, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = projected + row * stride + column
    h = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    opened, _ = _gate(tl.load(at + width, mask=inside, other=0.0).to(tl.float32), GELU)
    tl.store(out + row * width + column, (h * opened).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(found, gradient, projected, width, stride, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = projected + row * stride + column
    h = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    opened, slope = _gate(tl.load(at + width, mask=inside, other=0.0).to(tl.float32), GELU)
    dy = tl.load(gradient + row * width + column, mask=inside, other=0.0).to(tl.float32)
    to = found + row * 2 * width + column
    tl.store(to, (dy * opened).to(found.dtype.element_ty), mask=inside)
    tl.store(to + width, (dy * h * slope).to(found.dtype.element_ty), mask=inside)


def forward(projected: Tensor, kind: str) -> tuple[Tensor]:
    """As in gated.py."""
    rows, width = _rows(projected)
    out = projected.new_empty(*projected.shape[:-1], width)
    if out.numel():
        _forward[_grid(rows)](out, rows, width, rows.stride(0), GELU=kind == "geglu", BLOCK=BLOCK)
    return (out,)


def backward(gradient: Tensor, projected: Tensor, kind: str) -> tuple[Tensor]:
    """As in gated.py."""
    rows, width = _rows(projected)
    found = projected.new_empty(projected.shape)
    if found.numel():
        given = gradient.contiguous()
        _backward[_grid(rows)](found, given, rows, width, rows.stride(0), GELU=kind == "geglu", BLOCK=BLOCK)
    return (found,)


PARTS = {"forward": forward, "backward": backward}


def _rows(projected: Tensor) -> tuple[Tensor, int]:
    if projected.ndim < 2 or projected.stride(-1) != 1:
        raise NotServedError("a vector, or strided rows")
    return projected.reshape(-1, projected.shape[-1]), projected.shape[-1] // 2


def _grid(rows: Tensor) -> tuple[int, int]:
    return len(rows), triton.cdiv(rows.shape[1] // 2, BLOCK)
