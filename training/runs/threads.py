"""In how many threads a run computes on a CPU: the number it was begun with, which a timing of its own network chose.

Tiny tensors lose by threads, and on a busy machine lose much: each operation waits for the last of its threads.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..engine import processes
from ..engine.setup import Setup
from .run import Run

ROUNDS = 5
ENOUGH = 1.0
"""Seconds of a forward from which on threads are worth having, so that none is spent in one thread."""
WORTH_A_NOTE = 1.25


@contextmanager
def threads_of(run: Run, setup: Setup, goes_on: bool) -> Iterator[list[str]]:
    """Within, the run computes in its number of threads, which its config tells; afterwards it is what it was. Yields
    what a person should know of it.

    A run that goes on keeps its number, for sums are rounded otherwise in another one: resuming is exact to the bit at
    one number of threads. Of several processes, all take the first one's. OMP_NUM_THREADS, where it is set, is a
    person's choice and kept.
    """
    before = torch.get_num_threads()
    number, notes = _number(run, setup, goes_on or not processes.is_first(), before)
    torch.set_num_threads(number)
    run.record("threads", number)
    try:
        yield notes
    finally:
        torch.set_num_threads(before)


def _number(run: Run, setup: Setup, goes_on: bool, before: int) -> tuple[int, list[str]]:
    if setup.host.device.type != "cpu":
        return before, []
    recorded = run.recorded("threads") if goes_on else None
    if isinstance(recorded, int) and 1 <= recorded <= (os.cpu_count() or 1):
        return recorded, []
    if recorded is not None and recorded != before:
        return before, [
            f"the run was begun in {recorded!r:.20} threads and goes on in {before}: its numbers differ in the last "
            "digits from those it would have had"
        ]
    if before == 1 or "OMP_NUM_THREADS" in os.environ:
        return before, []
    return faster(_forward(setup), before)


def _forward(setup: Setup) -> Callable[[], object]:
    """One forward of the run's own network, of a micro-batch."""
    settings = setup.settings
    batch = setup.prompts.batch(0, range(-(-settings.batch // settings.accumulation)))
    x, sigma = batch.normal("threads"), torch.full((len(batch),), 0.5)

    def forward() -> object:
        with torch.no_grad():
            return setup.denoise(x, sigma, batch.cond)

    return forward


def faster(forward: Callable[[], object], most: int) -> tuple[int, list[str]]:
    """1 or ``most`` threads, in whichever ``forward`` takes less time; and a note where few are much faster."""
    seconds: dict[int, list[float]] = {1: [], most: []}
    if _timed(forward, most) > ENOUGH:
        return most, []
    for _ in range(ROUNDS):
        for number, found in seconds.items():
            found.append(_timed(forward, number))
    one, many = (statistics.median(found) for found in seconds.values())
    if many < one:
        return most, []
    note = f"computes in 1 thread, {many / one:.1f}x as fast here as in {most}: OMP_NUM_THREADS sets another number"
    return 1, [note] if many / one >= WORTH_A_NOTE else []


def _timed(forward: Callable[[], object], number: int) -> float:
    torch.set_num_threads(number)
    began = time.perf_counter()
    forward()
    return time.perf_counter() - began
