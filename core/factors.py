"""The two factors of a low-rank adapter: how they start, what they add, and how two of them are blended."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .randomness import generator
from .targets import Target

State = dict[str, tuple[Tensor, Tensor]]
"""(A, B) by target name; A [r, in, ...], B [out, r, ...]."""


def leaf(value: Tensor, device: torch.device | str) -> Tensor:
    """A float32 copy of ``value`` on ``device`` that an optimiser may own."""
    return value.detach().to(device, torch.float32, copy=True).contiguous().requires_grad_(True)


def initial(target: Target, rank: int, seed: int) -> Tensor:
    """A ~ U(-1, 1) / sqrt(fan in), drawn from (seed, target name) alone."""
    shape = target.shape_a(rank)
    uniform = torch.rand(shape, generator=generator(seed, target.name))
    return (2 * uniform - 1) / math.sqrt(math.prod(shape[1:]))


@torch.no_grad()
def lerp(mine: list[Tensor], towards: list[Tensor], weight: float) -> None:
    """Each of ``mine`` <- (1 - weight) mine + weight towards, in place; in as few kernels as its device has, or one
    tensor after the other where ``towards`` lies on another device."""
    if not mine:
        return
    if all(a.device == b.device and a.dtype == b.dtype for a, b in zip(mine, towards, strict=True)):
        # torch.optim's own multi-tensor lerp: rounded as Tensor.lerp_
        torch.ops.aten._foreach_lerp_.Scalar(mine, [b.detach() for b in towards], weight)
        return
    for factor, other in zip(mine, towards, strict=True):
        factor.lerp_(other.detach().to(factor), weight)


def blended(
    mine: tuple[Tensor, Tensor] | None, theirs: tuple[Tensor, Tensor] | None, weight: float
) -> tuple[Tensor, Tensor]:
    """Factors of (1 - w) B1 A1 + w B2 A2, as few as its rank needs, by SVD in float64."""
    terms = [(pair, share) for pair, share in ((mine, 1 - weight), (theirs, weight)) if pair is not None]
    a = torch.cat([pair[0].double() for pair, _ in terms])
    b = torch.cat([share * pair[1].double() for pair, share in terms], 1)
    u, s, v = torch.linalg.svd(b.flatten(1) @ a.flatten(1), full_matrices=False)
    rank = max(1, int((s > s[0] * 1e-12).sum()))
    rank = min(rank, a.shape[0])
    root = s[:rank].sqrt()
    new_a = (root[:, None] * v[:rank]).reshape(rank, *a.shape[1:])
    new_b = (u[:, :rank] * root).reshape(b.shape[0], rank, *b.shape[2:])
    return new_a.float(), new_b.float()
