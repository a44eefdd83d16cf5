"""`steered_attention` in Triton. A norm is over all heads of a token: one launch finds each head's share of the norms,
the next finds the same attention again and mixes. Texts are short: twice is less than writing Z+ and Z- out."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .choice import NotServedError
from .steered import Steer
from .triton_types import operands

ROWS, KEYS = 64, 32
WIDEST = 256


@triton.jit
def _attend(
    q,
    k,
    v,
    length,
    k_row,
    v_row,
    SCALE: tl.constexpr,
    OPERANDS: tl.constexpr,
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
):
    """softmax(q k^T / sqrt(D)) v over all keys, q: [ROWS, WIDE] in OPERANDS."""
    column = tl.arange(0, WIDE)
    peak = tl.full((q.shape[0],), -float("inf"), tl.float32)
    total = tl.zeros((q.shape[0],), tl.float32)
    z = tl.zeros((q.shape[0], WIDE), tl.float32)
    for start in range(0, length, KEYS):
        key = start + tl.arange(0, KEYS)
        some = (key < length)[:, None] & (column < WIDTH)[None, :]
        near = tl.load(k + key[:, None] * k_row + column[None, :], mask=some, other=0.0).to(OPERANDS)
        scores = tl.dot(q, tl.trans(near), input_precision="ieee") * SCALE
        scores = tl.where((key < length)[None, :], scores, -float("inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights, fade = tl.exp(scores - higher[:, None]), tl.exp(peak - higher)
        found = tl.load(v + key[:, None] * v_row + column[None, :], mask=some, other=0.0).to(OPERANDS)
        z = z * fade[:, None] + tl.dot(weights.to(OPERANDS), found, input_precision="ieee")
        total = total * fade + tl.sum(weights, 1)
        peak = higher
    return z / total[:, None]


@triton.jit
def _steer(
    out, norms, q, k, v, k2, v2, tokens, length, length2, heads,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    k2_batch, k2_head, k2_row, v2_batch, v2_head, v2_row, o_batch, o_head, o_row,
    scale, tau, alpha, SCALE: tl.constexpr,
    NAG: tl.constexpr, MEASURE: tl.constexpr, SQUARE: tl.constexpr, OPERANDS: tl.constexpr,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One head's block of rows. MEASURE: write its share of |Z+| and |G| into norms [2, B, N, H]; else mix."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    column = tl.arange(0, WIDE)
    some = (row < tokens)[:, None] & (column < WIDTH)[None, :]
    at = q + b * q_batch + h * q_head + row[:, None].to(tl.int64) * q_row + column[None, :]
    query = tl.load(at, mask=some, other=0.0).to(OPERANDS)
    first, second = k + b * k_batch + h * k_head, v + b * v_batch + h * v_head
    z = _attend(query, first, second, length, k_row, v_row, SCALE, OPERANDS, WIDE, WIDTH, KEYS)
    first, second = k2 + b * k2_batch + h * k2_head, v2 + b * v2_batch + h * v2_head
    away = _attend(query, first, second, length2, k2_row, v2_row, SCALE, OPERANDS, WIDE, WIDTH, KEYS)
    # NASA: Z = Z+ - a Z-.  NAG: G = Z+ - (s - 1) / s Z-
    g = z - ((scale - 1.0) / scale if NAG else scale) * away
    batches = tl.num_programs(1) // heads
    share = norms + (b * tokens + row) * heads
    if MEASURE:
        tl.store(share + h, tl.sum(z * z if SQUARE else tl.abs(z), 1), mask=row < tokens)
        share += batches * tokens * heads
        tl.store(share + h, tl.sum(g * g if SQUARE else tl.abs(g), 1), mask=row < tokens)
    else:
        if NAG:
            each = tl.arange(0, HEADS)
            held = (row < tokens)[:, None] & (each < heads)[None, :]
            plus = tl.sum(tl.load(share[:, None] + each[None, :], mask=held, other=0.0), 1)
            share += batches * tokens * heads
            norm = tl.sum(tl.load(share[:, None] + each[None, :], mask=held, other=0.0), 1)
            plus, norm = (tl.sqrt(plus), tl.sqrt(norm)) if SQUARE else (plus, norm)
            # Z = alpha min(s, tau |Z+| / |G|) G + (1 - alpha) Z+
            reach = tl.minimum(scale, tau * tl.maximum(plus, 1.1754944e-38) / tl.maximum(norm, 1.1754944e-38))
            g = z + alpha * (g * reach[:, None] - z)
        to = out + b * o_batch + h * o_head + row[:, None].to(tl.int64) * o_row + column[None, :]
        tl.store(to, g.to(out.dtype.element_ty), mask=some)


def forward(q: Tensor, k: Tensor, v: Tensor, negative_k: Tensor, negative_v: Tensor, steer: Steer) -> tuple[Tensor]:
    """As in steered.py."""
    tensors = q, k, v, negative_k, negative_v
    if any(value.stride(3) != 1 for value in tensors) or q.shape[3] > WIDEST or steer.order not in (1, 2):
        raise NotServedError("strided rows, a wide head or another norm")
    batch, heads, tokens, width = q.shape
    out = torch.empty_like(q)
    out = out if out.stride(3) == 1 else q.new_empty(q.shape)
    norms = q.new_empty(2, batch, tokens, heads, dtype=torch.float32)
    strides = [stride for value in (*tensors, out) for stride in value.stride()[:3]]
    numbers = tokens, k.shape[2], negative_k.shape[2], heads, *strides, steer.scale, steer.tau, steer.alpha
    for measure in (True, False) if steer.nag else (False,):
        _steer[(triton.cdiv(tokens, ROWS), batch * heads)](
            *(out, norms, *tensors, *numbers),
            SCALE=width**-0.5,
            NAG=steer.nag,
            MEASURE=measure,
            SQUARE=steer.order == 2,
            OPERANDS=operands(q.dtype),
            WIDTH=width,
            WIDE=max(16, triton.next_power_of_2(width)),
            ROWS=ROWS if width <= 128 else ROWS // 2,
            KEYS=KEYS,
            HEADS=triton.next_power_of_2(heads),
        )
    return (out,)


PARTS = {"forward": forward}
