"""`add_lora` in Triton: one launch for all roles' rows; A x stays in registers, sums in float32 are rounded once.

Forward and the gradient of x are one kernel, the factors swapped; the factors' own gradients are products of the usual
kind, which torch's library does at the card's rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .add_lora import Place, in_tokens, scaled, tokens
from .choice import NotServedError
from .triton_types import TYPES, operands

ROWS, INNER, COLUMNS = 64, 32, 64
FIELDS = 9
WIDEST = 128
"""The highest rank whose A x fits into registers."""


@triton.jit
def _product(
    out, x, hidden, table, scales, count, width, out_stride, x_stride,
    ALIGNED: tl.constexpr, BACK: tl.constexpr, ADD: tl.constexpr, FACTORS: tl.constexpr, OPERANDS: tl.constexpr,
    RANK: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """hidden = A x, out (+)= s B hidden; BACK: hidden = B^T x, out (+)= s A^T hidden. One tile of one entry's rows, and
    each so many'th tile of the columns. ``table``: an entry's first tile, first row, rows, first and
    last feature, rank, addresses of A and B, first row of hidden."""
    tile = tl.program_id(0)
    which = 0
    for other in range(1, count):
        which += (tile >= tl.load(table + other * FIELDS)).to(tl.int32)
    at = table + which * FIELDS
    first_row, rows = tl.load(at + 1), tl.load(at + 2)
    start, stop = tl.load(at + 3).to(tl.int32), tl.load(at + 4).to(tl.int32)
    rank = tl.load(at + 5).to(tl.int32)
    a = tl.load(at + 6).to(tl.pointer_type(FACTORS))
    b = tl.load(at + 7).to(tl.pointer_type(FACTORS))
    if ALIGNED:  # addresses out of a table are nothing a compiler knows
        start, stop, rank = tl.multiple_of(start, 16), tl.multiple_of(stop, 16), tl.multiple_of(rank, 16)
        a, b = tl.multiple_of(a, 16), tl.multiple_of(b, 16)
    row = (tile - tl.load(at)) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    j = tl.arange(0, RANK)
    first, last = (0, width) if BACK else (start, stop)
    inner = stop - start if BACK else width
    x += start if BACK else 0
    from_x = x + (first_row + row)[:, None] * x_stride
    h = tl.zeros((ROWS, RANK), tl.float32)
    for begin in range(0, inner, INNER):
        k = begin + tl.arange(0, INNER)
        near = b + k[:, None] * rank + j[None, :] if BACK else a + j[None, :] * width + k[:, None]
        left = tl.load(from_x + k[None, :], mask=inside & (k < inner)[None, :], other=0.0)
        right = tl.load(near, mask=(j < rank)[None, :] & (k < inner)[:, None], other=0.0)
        h = tl.dot(left.to(OPERANDS), right.to(OPERANDS), h, input_precision="ieee")
    if tl.program_id(1) == 0:
        kept = hidden + (tl.load(at + 8) + row)[:, None] * RANK + j[None, :]
        tl.store(kept, h.to(hidden.dtype.element_ty), mask=inside)
    h *= tl.load(scales + which)
    to = out + (first_row + row)[:, None] * out_stride
    for begin in range(first + tl.program_id(1) * COLUMNS, last, tl.num_programs(1) * COLUMNS):
        n = begin + tl.arange(0, COLUMNS)
        far = a + j[:, None] * width + n[None, :] if BACK else b + (n - start)[None, :] * rank + j[:, None]
        right = tl.load(far, mask=(j < rank)[:, None] & (n < last)[None, :], other=0.0)
        found = tl.dot(h.to(OPERANDS), right.to(OPERANDS), input_precision="ieee")
        some = inside & (n < last)[None, :]
        if ADD:
            found += tl.load(to + n[None, :], mask=some, other=0.0).to(tl.float32)
        tl.store(to + n[None, :], found.to(out.dtype.element_ty), mask=some)


class _Entry(NamedTuple):
    """One adapter in a launch: its rows among the tokens, its features, its factors."""

    rows: slice
    features: slice
    a: Tensor
    b: Tensor
    scale: float


def forward(out: Tensor, x: Tensor, places: Sequence[Place], factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """As in add_lora.py."""
    hidden = _launch(tokens(out), tokens(x), _entries(out, places, factors), x.shape[-1], back=False, add=True)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # which torch's own operations do
    return out, *hidden


def backward(
    gradient: Tensor,
    x: Tensor,
    places: Sequence[Place],
    factors: Sequence[Tensor],
    hidden: Sequence[Tensor],
    wants_x: bool = True,
    wants_factors: bool = True,
) -> tuple[Tensor, ...]:
    """As in add_lora.py."""
    entries, gradients, inputs = _entries(gradient, places, factors), tokens(gradient), tokens(x)
    of_x = x.new_zeros(x.shape) if wants_x else x.new_empty(0)
    of_hidden: dict[int, Tensor] = {}
    for turn, group in enumerate(_apart(entries) if wants_x else []):
        some = [entries[index] for index in group]
        found = _launch(tokens(of_x), gradients, some, x.shape[-1], back=True, add=turn > 0)
        of_hidden |= dict(zip(group, found, strict=True))
    result = [of_x] if wants_x else []
    for index, ((rows, features, a, b, scale), h) in enumerate(zip(entries, hidden, strict=True)):
        if wants_factors:
            g = gradients[rows, features]
            dh = scaled(of_hidden[index] if wants_x else torch.mm(g, b.to(x.dtype)), scale)
            result += [torch.mm(dh.t(), inputs[rows]).to(a.dtype), scaled(torch.mm(g.t(), h), scale).to(b.dtype)]
    return tuple(result)


PARTS = {"forward": forward, "backward": backward}


def _entries(value: Tensor, places: Sequence[Place], factors: Sequence[Tensor]) -> list[_Entry]:
    """NotServedError where the kernel has no form for them."""
    if len({factor.dtype for factor in factors}) > 1 or not all(factor.is_contiguous() for factor in factors):
        raise NotServedError("factors of several dtypes, or strided")
    if any(factor.device != value.device for factor in factors):
        raise NotServedError("factors in the host's memory")
    if max(len(a) for a in factors[::2]) > WIDEST:
        raise NotServedError(f"a rank above {WIDEST}")
    entries = []
    for (rows, features, scale), a, b in zip(places, factors[::2], factors[1::2], strict=True):
        start, stop, _ = features.indices(value.shape[-1])
        entries.append(_Entry(in_tokens(rows, value), slice(start, stop), a, b, scale))
    return entries


def _apart(entries: Sequence[_Entry]) -> list[list[int]]:
    """Their indices in groups within which no row is served twice: a fused layer's q, k and v all reach x."""
    groups: list[list[int]] = []
    for index, entry in enumerate(entries):
        free = (group for group in groups if not any(_overlap(entry.rows, entries[other].rows) for other in group))
        group = next(free, None)
        if group is None:
            groups.append([index])
        else:
            group.append(index)
    return groups


def _overlap(one: slice, other: slice) -> bool:
    return one.start < other.stop and other.start < one.stop


def _launch(out: Tensor, x: Tensor, entries: Sequence[_Entry], width: int, back: bool, add: bool) -> list[Tensor]:
    """Each entry's A x, or B^T x, in x's dtype."""
    if out.stride(-1) != 1 or x.stride(-1) != 1:
        raise NotServedError("strided rows")
    lengths = [entry.rows.stop - entry.rows.start for entry in entries]
    tiles = [triton.cdiv(length, ROWS) for length in lengths]
    padded = max(16, triton.next_power_of_2(max(len(entry.a) for entry in entries)))
    hidden = x.new_empty(sum(lengths), padded)
    fields, at = [], 0
    for index, entry in enumerate(entries):
        fields += [sum(tiles[:index]), entry.rows.start, lengths[index], *_numbers(entry), at]
        at += lengths[index]
    table, scales = _table(tuple(fields), tuple(entry.scale for entry in entries), x.device)
    columns = width if back else max(entry.features.stop - entry.features.start for entry in entries)
    grid = max(1, sum(tiles)), min(triton.cdiv(columns, COLUMNS), -(-_programs(x.device) // max(1, sum(tiles))))
    if sum(tiles):
        _product[grid](
            *(out, x, hidden, table, scales, len(entries), width, out.stride(0), x.stride(0)),
            ALIGNED=all(number % 16 == 0 for entry in entries for number in _numbers(entry)),
            BACK=back,
            ADD=add,
            FACTORS=TYPES[entries[0].a.dtype],
            OPERANDS=operands(x.dtype),
            RANK=padded,
            ROWS=ROWS,
            INNER=INNER,
            COLUMNS=COLUMNS,
            FIELDS=FIELDS,
        )
    parts = zip(hidden.split(lengths), entries, strict=True)
    return [part[:, : len(entry.a)] for part, entry in parts]


def _numbers(entry: _Entry) -> tuple[int, ...]:
    """First and last feature, rank, addresses of A and B."""
    return entry.features.start, entry.features.stop, len(entry.a), entry.a.data_ptr(), entry.b.data_ptr()


@lru_cache(maxsize=16384)
def _table(fields: tuple[int, ...], scales: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Adapters stay where they are from step to step, so what a launch is told crosses to the card once."""
    return torch.tensor(fields, dtype=torch.int64, device=device), torch.tensor(scales, device=device)


@lru_cache
def _programs(device: torch.device) -> int:
    """So many keep a card busy."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
