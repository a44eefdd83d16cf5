"""Rungs for a budget: how a run may be laid out so that it fits, the fastest first; what it takes and what it proposes.

By itself a run takes what leaves its result alone: smaller micro-batches, checkpointing, where the mean lies. What
changes the result is proposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..engine.student import LARGE
from ..host import Shells
from ..settings import Settings
from .cards import Card
from .counted import counted
from .rehearse import DECODE, FORWARD, MOMENTS, PROMPTS, Rehearsed
from .trace import Peak

UNSEEN = (FORWARD, MOMENTS)
"""Parts that a run does not have."""
YIELDING = (PROMPTS, DECODE)
"""Parts that do with less where there is less: the network leaves the card for the encoders, and a picture is decoded
in tiles."""
WITHOUT = 3
"""Times the activations of a checkpointed sample below which one that is not checkpointed is not tried."""
EIGHT_BIT = 0.25 * (1 + 4 / 256)
"""Of float32's bytes: a byte a number, and a float32 for each 256 of them."""


@dataclass(frozen=True)
class Rung:
    """micro: samples of a micro-batch. checkpointing: whether blocks are computed again. changes: settings that are
    not the run's own, as they are given; none where the run takes the rung by itself. part: where the most is alive,
    which is ``peak``. forwards: of a sample in an update, of work. seconds: of an update, at the least.
    """

    micro: int
    checkpointing: bool
    changes: dict[str, Any]
    peak: Peak
    part: str
    forwards: float
    seconds: float
    parts: dict[str, Peak] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """What it is, in words."""
        kept = "checkpointing" if self.checkpointing else "no checkpointing"
        changes = [f"{name}={value}" for name, value in self.changes.items() if name != "checkpointing"]
        return ", ".join([f"micro-batch {self.micro}", kept, *changes])


@dataclass(frozen=True)
class Planned:
    """What a run needs. rungs: tried, in order; those with changes are proposed. taken: the rung that the run goes on;
    None where none fits that leaves its result alone."""

    name: str
    settings: Settings
    card: Card | None
    rungs: tuple[Rung, ...]
    taken: Rung | None

    @property
    def faster(self) -> Rung | None:
        """The fastest that fits, where that is not the one taken: without checkpointing, which the run leaves to be
        set, as it could not go back where memory runs out all the same."""
        if self.taken is None or self.card is None:
            return None
        fitting = [rung for rung in self.rungs if rung.peak.bytes <= self.card.usable]
        best = min(fitting, key=lambda rung: rung.seconds)
        return best if best.seconds < self.taken.seconds else None

    @property
    def proposed(self) -> Rung | None:
        """The first that fits where the run cannot take one."""
        return None if self.taken or not self.card else _first(self.rungs, self.card)


def planned(name: str, shells: Shells, settings: Settings, card: Card | None) -> Planned:
    """The rungs of ``settings`` on ``card``, down to the first that fits. Without a card: the run as it is set.

    name: of the model.
    """
    host_mean = card is not None and card.size < LARGE
    rungs: list[Rung] = []
    for micro, changes in _safe(settings):
        rungs.append(rung_of(shells, settings, card, micro, changes, host_mean))
        if card is None or rungs[-1].peak.bytes <= card.usable:
            taken = rungs[-1]
            more = _uncheckpointed(shells, settings, card, host_mean, taken) if card else ()
            return Planned(name, settings, card, (*rungs, *more), taken)
    assert card is not None
    return Planned(name, settings, card, _proposed(shells, settings, card, host_mean, rungs), None)


def _safe(settings: Settings) -> Iterator[tuple[int, dict[str, Any]]]:
    """Micro-batches, and changes that leave the result alone, from the run as it is set on."""
    for changes in ({},) if settings.checkpointing else ({}, {"checkpointing": True}):
        for micro in _micros(settings):
            yield micro, changes


def _first(rungs: tuple[Rung, ...], card: Card) -> Rung | None:
    return next((rung for rung in rungs if rung.peak.bytes <= card.usable), None)


def _uncheckpointed(shells: Shells, settings: Settings, card: Card, host_mean: bool, fitting: Rung) -> Iterator[Rung]:
    """Without the computing again, which takes a fifth of the time: down to the first that fits, where the card is so
    large that one may."""
    kept = fitting.peak.bytes - fitting.peak.made_of.get("activations", 0)
    one = fitting.peak.made_of.get("activations", 0) / fitting.micro
    if not settings.checkpointing or card.usable - kept < WITHOUT * one:
        return
    for micro in _micros(settings):
        yield (rung := rung_of(shells, settings, card, micro, {"checkpointing": False}, host_mean))
        if rung.peak.bytes <= card.usable:
            return


def _micros(settings: Settings) -> list[int]:
    """From the run's own micro-batch down to 1, each half of the one before."""
    micros = [-(-settings.batch // settings.accumulation)]
    while micros[-1] > 1:
        micros.append(-(-micros[-1] // 2))
    return micros


def _proposed(shells: Shells, settings: Settings, card: Card, host_mean: bool, rungs: list[Rung]) -> tuple[Rung, ...]:
    """``rungs``, and those with one more change each, at micro-batch 1, down to the first that fits."""
    changes: dict[str, Any] = {} if settings.checkpointing else {"checkpointing": True}
    for change in _changes(settings):
        changes = changes | change
        rungs.append(rung_of(shells, settings, card, 1, changes, host_mean))
        if rungs[-1].peak.bytes <= card.usable:
            break
    return tuple(rungs)


def _changes(settings: Settings) -> Iterator[dict[str, Any]]:
    if settings.optimizer in ("auto", "adamw"):
        yield {"optimizer": "adamw8bit"}
    for rank in (32, 16):
        if rank < settings.rank:
            yield {"rank": rank}
    for targets in ("attention+mlp", "attention"):
        if settings.targets in ("all", "attention+mlp") and targets != settings.targets:
            yield {"targets": targets}
    width, height = settings.size_list[0]
    while min(width, height) >= 512:
        width, height = (side * 3 // 4 // 64 * 64 for side in (width, height))
        yield {"sizes": f"{width}x{height}"}


def rung_of(
    shells: Shells, settings: Settings, card: Card | None, micro: int, changes: dict[str, Any], host_mean: bool
) -> Rung:
    """What a run of ``settings`` with ``changes`` needs in micro-batches of ``micro``."""
    chosen = settings.with_texts({name: str(value) for name, value in changes.items()})
    played = counted(shells(chosen.targets), chosen)
    peaks = peaks_of(played, chosen, micro, host_mean)
    part = max((name for name in peaks if name not in YIELDING), key=lambda name: peaks[name].bytes)
    turns = next(times for updates, times in reversed(played.phases) if updates)
    forward = played.count.flops(FORWARD, 1, chosen.rank)
    flops = sum(times * played.count.flops(name, micro, chosen.rank) for name, times in turns.items())
    seconds = _seconds(played, turns, chosen, micro, card) if card else 0.0
    return Rung(micro, chosen.checkpointing, changes, peaks[part], part, flops / micro / forward, seconds, peaks)


def peaks_of(played: Rehearsed, settings: Settings, micro: int, host_mean: bool = False) -> dict[str, Peak]:
    """The peak of each part; where a batch has several micro-batches, with the gradients of those before."""
    shares = {"ema": 0.0} if host_mean else {}
    if settings.optimizer == "adamw8bit":
        shares |= {label: EIGHT_BIT for label in played.count.labels if label.endswith(" moments")}
    there = played.gradients if micro < settings.batch else None
    peaks = played.count.peaks(micro, settings.rank, shares, there)
    return {name: peak for name, peak in peaks.items() if name not in UNSEEN}


def _seconds(played: Rehearsed, turns: dict[str, float], settings: Settings, micro: int, card: Card) -> float:
    """Of an update, at the least: of its micro-batches, and of a step of the optimiser for each turn."""
    count, rank = played.count, settings.rank
    once = sum(times * count.seconds(name, micro, rank, card.seconds) for name, times in turns.items())
    return once * -(-settings.batch // micro)
