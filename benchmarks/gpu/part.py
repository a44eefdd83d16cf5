"""A named part of a run, what it is given, and the table that it gives."""

from __future__ import annotations

import gc
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class Run(NamedTuple):
    """device: where to measure. tiny: a rehearsal, at sizes that take seconds on a CPU. until: by `time.monotonic`,
    when the part's time is over."""

    device: torch.device
    tiny: bool
    until: float = math.inf

    @property
    def left(self) -> float:
        """Seconds of the part's time."""
        return self.until - time.monotonic()


@dataclass
class Table:
    """columns: their titles. rows: a text or a number each. good: whether all is as it must be. note: a line below."""

    columns: Sequence[str]
    rows: list[tuple[Any, ...]]
    good: bool = True
    note: str = ""

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        table = "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)
        return f"{table}\n\n{self.note}" if self.note else table


class Part(NamedTuple):
    """seconds: its share of the eight minutes; what a part leaves of its own goes to those after it."""

    name: str
    title: str
    measure: Callable[[Run], Table]
    seconds: float = 60


class Case(NamedTuple):
    """A row that is measured by itself. seconds: that it takes, about; where fewer are left, it is left out."""

    title: str
    measure: Callable[[], Sequence[Any]]
    seconds: float = 5


def table_of(run: Run, columns: Sequence[str], cases: Iterable[Case], note: str = "") -> Table:
    """A row for each case, its title first. One that fails, or for which no time is left, is a row that says so, and
    the others are measured."""
    found = Table(columns, [], note=note)
    for case in cases:
        if run.left < (0 if run.tiny else case.seconds):
            told: Sequence[Any] = [f"not measured: {max(run.left, 0):.0f} s were left of {case.seconds:.0f}"]
            found.good = False
        else:
            told, right = attempted(case.measure)
            found.good &= right
        empty = [""] * (len(columns) - 1 - len(told))
        found.rows.append((case.title, *told, *empty))
        release()
    return found


def attempted(measure: Callable[[], Sequence[Any]]) -> tuple[Sequence[Any], bool]:
    """What ``measure`` gives, or in a cell why it fails; and whether it did not."""
    try:
        return measure(), True
    except torch.OutOfMemoryError:
        return ["out of memory"], False
    except Exception as trouble:  # the other rows are worth their numbers
        traceback.print_exc()
        return [sentence(trouble)], False


def sentence(trouble: BaseException) -> str:
    return f"{type(trouble).__name__}: {(str(trouble).strip().splitlines() or [''])[0][:200]}".replace("|", "/")


def release() -> None:
    """Give back what the last row has taken."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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


def seconds(device: torch.device, function: Callable[[], Any]) -> float:
    """Of one call, the card's work with it."""
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def peak_bytes(device: torch.device, function: Callable[[], Any]) -> float:
    """Of tensors during one call, beyond what was there; not a number on a CPU."""
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return whole_peak(device, function) - before


def whole_peak(device: torch.device, function: Callable[[], Any]) -> float:
    """Of tensors during one call, what was there with them; not a number on a CPU."""
    if device.type != "cuda":
        function()
        return float("nan")
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return float(torch.cuda.max_memory_allocated(device))
