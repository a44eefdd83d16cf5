"""Every random number of a run, drawn on the CPU from (seed, stream, step, sample): nothing else draws.

So resuming, accumulation, halved micro-batches and either host see the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator that depends on ``key`` alone."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def normal(shape: Sequence[int], seed: int, stream: str, step: int, samples: Iterable[int]) -> Tensor:
    """[B, *shape] standard normal numbers, float32; row b depends on (seed, stream, step, samples[b]) alone."""
    return torch.stack([torch.randn(*shape, generator=generator(seed, stream, step, index)) for index in samples])


def uniform(seed: int, stream: str, step: int, samples: Iterable[int]) -> Tensor:
    """[B] uniform numbers in [0, 1), float64; one for each sample."""
    draws = [torch.rand((), dtype=torch.float64, generator=generator(seed, stream, step, index)) for index in samples]
    return torch.stack(draws)


def integers(high: int, seed: int, stream: str, step: int, samples: Iterable[int]) -> Tensor:
    """[B] integers in 0 .. high - 1; one for each sample."""
    draws = [torch.randint(high, (), generator=generator(seed, stream, step, index)) for index in samples]
    return torch.stack(draws)
