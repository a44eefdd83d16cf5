"""The two factors of a low-rank adapter: how they start, what they add, and how two of them are blended."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .randomness import generator
from .targets import Target

State = dict[str, tuple[Tensor, Tensor]]
"""(A, B) by target name; A [r, in, ...], B [out, r, ...]."""


@torch.inference_mode(False)
def leaf(value: Tensor, device: torch.device | str) -> Tensor:
    """A float32 copy of ``value`` on ``device`` that an optimiser may own, wherever it is made."""
    return value.detach().to(device, torch.float32, copy=True).contiguous().requires_grad_(True)


@torch.inference_mode(False)
def initial_b(target: Target, rank: int, device: torch.device | str) -> Tensor:
    """B = 0, a leaf as `leaf` makes it, where it will lie."""
    return torch.zeros(target.shape_b(rank), dtype=torch.float32, device=device, requires_grad=True)


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
    return truncated(a, b)[0]


def truncated(a: Tensor, b: Tensor, rank: int | None = None) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The factors of ``rank`` (of all that B A has, where None) whose product is nearest to B A, and B A's singular
    values, float64 (Eckart and Young, 1936), without ever making B A:

    B A = Q_B R_B (Q_A R_A)^T,  R_B R_A^T = U S V^T,   B' = Q_B U_r S_r^1/2,  A' = S_r^1/2 V_r^T Q_A^T
    """
    q_b, r_b = torch.linalg.qr(b.double().flatten(1))
    q_a, r_a = torch.linalg.qr(a.double().flatten(1).T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    whole = max(1, int((s > s[0] * 1e-12).sum()))
    r = whole if rank is None else min(rank, len(s))
    root = s[:r].sqrt()
    new_a = (root[:, None] * (v[:r] @ q_a.T)).reshape(r, *a.shape[1:])
    new_b = (q_b @ u[:, :r] * root).reshape(len(b), r, *b.shape[2:])
    return (new_a.float(), new_b.float()), s


def named(state: State) -> dict[str, Tensor]:
    """The factors of each target as "target/a" and "target/b": as a file keeps them."""
    return {f"{name}/{side}": factor for name, pair in state.items() for side, factor in zip("ab", pair, strict=True)}
