"""A small evolution over the weights of a sum (LCSC, arXiv:2404.02241, Algorithm 1): children of the best so far, each
weight from one of two parents and moved a little, the first one what is left to 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ...core.randomness import generator

Weights = tuple[float, ...]
"""Of each student, 1 in all; the first student is the run's own result."""
PARENTS = 4
WIDE, NARROW = 0.3, 0.05
"""Deviation of a weight's move at the first evaluation and at the last; that falls geometrically between."""


def own(count: int) -> Weights:
    """The first student alone."""
    return (1.0, *(0.0 for _ in range(count - 1)))


def search(measure: Callable[[Weights], float], count: int, evaluations: int, seed: int) -> list[tuple[float, Weights]]:
    """(measure, weights) of ``evaluations`` combinations of ``count`` students, the least first; what is no number is
    last. The first to be measured is the own one, the second the mean of all. A function of the measures and of
    ``seed`` alone."""
    found: list[tuple[float, Weights]] = []
    for index in range(evaluations):
        weights = _next(found, count, index, evaluations, seed)
        found.append((measure(weights), weights))
    return sorted(found, key=_place)


def _place(one: tuple[float, Weights]) -> tuple[bool, float]:
    return not math.isfinite(one[0]), one[0] if math.isfinite(one[0]) else 0.0


def _next(found: Sequence[tuple[float, Weights]], count: int, index: int, evaluations: int, seed: int) -> Weights:
    if index == 0:
        return own(count)
    if index == 1:
        return _whole([1 / count] * (count - 1))
    draw = generator(seed, "combination", index)
    best = sorted(found, key=_place)[:PARENTS]
    mother, father = (best[int(torch.randint(len(best), (), generator=draw))][1] for _ in range(2))
    either = torch.rand(count - 1, generator=draw, dtype=torch.float64) < 0.5
    moved = (
        torch.randn(count - 1, generator=draw, dtype=torch.float64) * WIDE * (NARROW / WIDE) ** (index / evaluations)
    )
    crossed = torch.where(either, torch.tensor(mother[1:]).double(), torch.tensor(father[1:]).double())
    return _whole((crossed + moved).tolist())


def _whole(others: Sequence[float]) -> Weights:
    # w_1 = 1 - sum of the others (Eq. 3)
    return (1 - math.fsum(others), *others)
