"""A named part of a run, what it is given, and the table that it gives."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class Run(NamedTuple):
    """device: where to measure. tiny: a rehearsal, at sizes that take seconds on a CPU."""

    device: torch.device
    tiny: bool


@dataclass
class Table:
    """columns: their titles. rows: a text or a number each. good: whether all is as it must be."""

    columns: Sequence[str]
    rows: list[tuple[Any, ...]]
    good: bool = True

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


class Part(NamedTuple):
    name: str
    title: str
    measure: Callable[[Run], Table]


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def milliseconds(run: Run, function: Callable[[], Any]) -> float:
    """The median of twenty calls after five, each with the card's own clock; one of three in a rehearsal."""
    warm, rounds = (1, 3) if run.tiny else (5, 20)
    for _ in range(warm):
        function()
    times = [_once(run.device, function) for _ in range(rounds)]
    return statistics.median(times)


def _once(device: torch.device, function: Callable[[], Any]) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - began)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    function()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def peak_bytes(device: torch.device, function: Callable[[], Any]) -> float:
    """Of tensors during one call, beyond what was there; not a number on a CPU."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    return torch.cuda.max_memory_allocated(device) - before
