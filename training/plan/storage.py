"""The base stored in fewer bits: what its weights would take, and what a cast of one of them takes meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core.streaming import footprint
from ..host import Host

AS_IT_IS, FP8, NF4 = "", "fp8", "nf4"
FROM_SIXTEEN = 2
"""Bytes of a number that may be stored in fewer: a base that is so already is as it is."""


@dataclass(frozen=True)
class Stored:
    """share: of the base's bytes that are there. cast: bytes of the largest weight in the dtype that it computes in,
    which is there while its product is made; 0 where nothing is cast. crossing: bytes that come from the host in each
    forward and again in each backward."""

    share: float = 1.0
    cast: int = 0
    crossing: int = 0


def streamed(host: Host, base: Stored) -> Stored:
    """``base`` with its blocks' weights in the host's memory, but for the ring that they pass through."""
    found = footprint(host.network, host.blocks)
    whole = sum(_bytes(value) for value in (*host.network.parameters(), *host.network.buffers()))
    return Stored(base.share * found.device / whole, base.cast, round(base.share * found.streamed))


def may_be_stored(host: Host) -> bool:
    """Whether the base is in 16 bits, and has blocks whose weights may be in fewer."""
    weights = [layer.weight for layer in _layers(host, FP8)]
    return bool(weights) and all(weight.dtype.itemsize == FROM_SIXTEEN for weight in weights)


def stored(host: Host, kind: str) -> Stored:
    """kind: "fp8" (a byte a number and a float32 for each row, of linear and convolution layers, as core.stored has
    them), "nf4" (half a byte, and a float32 for each 64, of linear layers alone, as bitsandbytes has them); the blocks'
    weights, all else stays."""
    if kind == AS_IT_IS:
        return Stored()
    tensors = [*host.network.parameters(), *host.network.buffers()]
    whole = saved = most = 0
    whole = sum(_bytes(value) for value in tensors)
    for layer in _layers(host, kind):
        weight, numbers = layer.weight, layer.weight.numel()
        small = numbers + 4 * len(weight) if kind == FP8 else numbers / 2 + 4 * -(-numbers // 64)
        saved += _bytes(weight) - small
        most = max(most, _bytes(weight))
    return Stored(1 - saved / whole, most)


def _layers(host: Host, kind: str) -> list[Any]:
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d) if kind == FP8 else (nn.Linear,)
    within = [layer for block in host.blocks for layer in block.modules() if isinstance(layer, kinds)]
    return list(dict.fromkeys(within))


def _bytes(value: torch.Tensor) -> int:
    return value.numel() * value.element_size()
