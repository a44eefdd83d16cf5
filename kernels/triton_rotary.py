"""`normed_rotary` in Triton: a head of a token is a row, its channels in pairs; float32 between."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .choice import NotServedError

ROWS = 16
WIDEST = 512


@triton.jit
def _places(length, heads, pairs, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """Rows [ROWS, 1] of a program, their tokens, their first channels' places in a row, and what is inside."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    return row, (row // heads) % length, 2 * pair, pair < pairs


@triton.jit
def _pair(at, inside):
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(at + 1, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _forward(out, x, weight, cos, sin, rows, length, heads, width, eps, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    row, token, channel, known = _places(length, heads, width // 2, ROWS, PAIRS)
    inside = known & (row < rows)
    a, b = _pair(x + row * width + channel, inside)
    r = 1.0 / tl.sqrt(tl.sum(a * a + b * b, 1) / width + eps)[:, None]
    wa, wb = _pair(weight + channel, known)
    ca, cb = _pair(cos + token * width + channel, inside)
    sa, sb = _pair(sin + token * width + channel, inside)
    a, b = a * r * wa, b * r * wb
    to = out + row * width + channel
    tl.store(to, (a * ca - b * sa).to(out.dtype.element_ty), mask=inside)
    tl.store(to + 1, (b * cb + a * sb).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    found, gradient, x, weight, cos, sin, rows, length, heads, width, eps, ROWS: tl.constexpr, PAIRS: tl.constexpr
):
    row, token, channel, known = _places(length, heads, width // 2, ROWS, PAIRS)
    inside = known & (row < rows)
    a, b = _pair(x + row * width + channel, inside)
    da, db = _pair(gradient + row * width + channel, inside)
    r = 1.0 / tl.sqrt(tl.sum(a * a + b * b, 1) / width + eps)[:, None]
    wa, wb = _pair(weight + channel, known)
    ca, cb = _pair(cos + token * width + channel, inside)
    sa, sb = _pair(sin + token * width + channel, inside)
    na, nb = wa * (da * ca + db * sb), wb * (db * cb - da * sa)
    mean = (tl.sum(a * na + b * nb, 1) / width)[:, None] * r * r
    to = found + row * width + channel
    tl.store(to, (r * (na - a * mean)).to(found.dtype.element_ty), mask=inside)
    tl.store(to + 1, (r * (nb - b * mean)).to(found.dtype.element_ty), mask=inside)


def forward(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor]:
    """As in rotary.py."""
    out, given = x.new_empty(x.shape), x.contiguous()
    _launch(_forward, (out, given, *_dense(x, weight, cos, sin)), x, eps)
    return (out,)


def backward(gradient: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor]:
    """As in rotary.py."""
    found = x.new_empty(x.shape)
    _launch(_backward, (found, gradient.contiguous(), x.contiguous(), *_dense(x, weight, cos, sin)), x, eps)
    return (found,)


PARTS = {"forward": forward, "backward": backward}


def _dense(x: Tensor, *values: Tensor) -> list[Tensor]:
    """weight [D], cos and sin [S, D], as a kernel reads them."""
    weight, *angles = values
    if weight.shape != x.shape[-1:] or any(value.shape != (x.shape[1], x.shape[3]) for value in angles):
        raise NotServedError("weights or angles of another shape, which torch would spread")
    return [value.contiguous() for value in values]


def _launch(kernel: object, tensors: tuple[Tensor, ...], x: Tensor, eps: float) -> None:
    _, length, heads, width = x.shape
    if width % 2 or not 0 < width <= WIDEST:
        raise NotServedError("an odd head, or one that is too wide")
    if rows := x.numel() // width:
        pairs = triton.next_power_of_2(width // 2)
        grid = (triton.cdiv(rows, ROWS),)
        kernel[grid](*tensors, rows, length, heads, width, eps, ROWS=ROWS, PAIRS=pairs)  # type: ignore[index]
