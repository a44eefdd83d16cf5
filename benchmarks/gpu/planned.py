"""Updates of a run as `onestep plan` counted them, and as the card does them: whole, and with a part of its memory.

A smaller card is the same one with its allocator kept from the rest: what a card of 8, 12 or 16 GB has for tensors. The
run is laid out as the plan says, its proposals taken; its speed is this card's.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from part import Case, Run, Table, seconds, table_of, whole_peak
from random_host import host_of, shells_of
from updates import direct, trainer_of

from onestep.training.engine.student import LARGE
from onestep.training.plan.cards import GIB, Card, found_card
from onestep.training.plan.ladder import planned
from onestep.training.plan.rehearse import LOOK, REFERENCE, WATCH
from onestep.training.plan.rungs import YIELDING, Rung, Way, rung_of
from onestep.training.plan.storage import FP8, NF4
from onestep.training.settings import Settings

COLUMNS = ("run", "laid out", "planned GiB", "measured GiB", "off by", "s an update", "ms a forward", "note")
CARDS = (16, 12, 8)
BATCHES = (1, 4)
TIMED = 3
STORED_AS = {FP8: "float8", NF4: "nf4"}


def measure(run: Run) -> Table:
    name, size = ("tiny", "32x32") if run.tiny else ("sdxl", "1024x1024")
    rank = 8 if run.tiny else 64
    whole = [
        Case(f"{name} {size}, rank {rank}, batch {batch}", partial(as_set, run, name, _settings(size, rank, batch)), 30)
        for batch in (BATCHES[-1:] if run.tiny else BATCHES)
    ]
    parts = [
        Case(f"the same, batch 4, of {gb} GB", partial(on_part, run, name, _settings(size, rank, 4), gb), 30)
        for gb in (CARDS[-1:] if run.tiny else CARDS)
    ]
    return table_of(run, COLUMNS, [*whole, *parts], NOTE)


NOTE = "A forward: of one sample, an update divided by the forwards that the plan counts in it."


def _settings(size: str, rank: int, batch: int) -> Settings:
    return direct(sizes=size, rank=rank, batch=batch, optimizer="adamw")


def as_set(run: Run, name: str, settings: Settings) -> Sequence[Any]:
    host = host_of(name, run.device)
    card = found_card(run.device)
    way = Way(settings.batch, mean_on_host=card is not None and card.size < LARGE)
    return _row(run, host, settings, rung_of(shells_of(host), settings, card, way))


def on_part(run: Run, name: str, settings: Settings, gb: int) -> Sequence[Any]:
    """On ``gb`` of the card, by the plan's own rung."""
    like = found_card(run.device) or Card("no card", 141 * GIB, 989, 66.9, 4800)
    host = host_of(name, run.device)
    card = replace(like, name=f"{gb} GB", size=gb * GIB, taken=0)
    plan = planned(name, shells_of(host), settings, card)
    rung = plan.taken or plan.proposed
    if rung is None:
        return ["nothing that was tried fits"]
    if rung.way.streamed:
        return [rung.way.words, rung.peak.bytes / GIB, "a streamed base is not measured here"]
    if rung.way.storage:
        host = host_of(name, run.device, STORED_AS[rung.way.storage])
    chosen = settings.with_texts({key: str(value) for key, value in rung.way.changes.items()})
    with only(run.device, card.usable):
        return _row(run, host, chosen, rung)


def _row(run: Run, host: Any, settings: Settings, rung: Rung) -> tuple[Any, ...]:
    """Moments are there from the second update on, which is measured; then the time of three."""
    others = (*YIELDING, REFERENCE, WATCH, LOOK)
    update = max(peak.bytes for part, peak in rung.parts.items() if part not in others) / GIB
    with trainer_of(host, settings, rung.way) as trainer:
        trainer.step(0)
        found = whole_peak(run.device, lambda: trainer.step(1)) / GIB
        times = [seconds(run.device, lambda at=at: trainer.step(at)) for at in range(2, 3 if run.tiny else 2 + TIMED)]
    second = statistics.median(times)
    forwards, off = 1000 * second / rung.forwards / settings.batch, f"{100 * (found / update - 1):+.1f} %"
    return rung.way.words, update, found, off, second, forwards, "; ".join(trainer.notes)


@contextmanager
def only(device: torch.device, size: int) -> Iterator[None]:
    """Within, torch takes no more than ``size`` bytes of a card."""
    if device.type != "cuda":
        yield
        return
    whole = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / whole), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
