"""A whole run: its least seconds on a card, what is done in them, and what it leaves on the disk."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..data.pairs import MADE
from ..engine.spacing import spacing
from ..settings import LAST, Settings
from ..watch.measures import EACH
from .cards import Card
from .rehearse import DECODE, FORWARD, LOOK, REFERENCE, WATCH, Rehearsed

LAUNCH = 10e-6
"""Seconds in which a fast processor hands the card an operation: it may not be quicker than that."""
TEACHER, WATCHING = "teacher's data", "watch and previews"


@dataclass(frozen=True)
class Whole:
    """seconds: by what is done, at the least; empty without a card. disk: bytes, by what is kept. text: bytes that the
    embedding of one prompt takes besides. costs: forwards of a sample in an update, by phase. fresh: forwards of a
    sample's data. forward: seconds of one."""

    seconds: dict[str, float] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)
    text: int = 0
    costs: dict[str, float] = field(default_factory=dict)
    fresh: float = 0.0
    forward: float = 0.0


def whole_of(played: Rehearsed, settings: Settings, micro: int, card: Card | None, kept: dict[str, float]) -> Whole:
    """Of a run of ``settings`` in micro-batches of ``micro``. kept: bytes of its states and candidates."""
    once = _Once(played, settings, micro, card)
    forward = once.work(FORWARD)
    costs = {phase.name: once.update(phase.parts) / forward for phase in played.phases}
    fresh = once.data() / forward
    seconds = {}
    if card is not None:
        timed = _Once(played, settings, micro, card, timed=True)
        seconds = {name: value for name, value in _seconds(timed).items() if value}
    samples = _samples(played, settings)
    every = kept | {name: bytes * samples for name, bytes in played.beside.kept.items()}
    disk = {name: round(bytes) for name, bytes in every.items() if bytes}
    size = timed.work(FORWARD) if card is not None else 0.0
    return Whole(seconds, disk, played.beside.text, costs, fresh, size)


@dataclass(frozen=True)
class _Once:
    """Work of one sample: FLOPs, or seconds where it is ``timed``."""

    played: Rehearsed
    settings: Settings
    micro: int
    card: Card | None
    timed: bool = False

    def work(self, part: str) -> float:
        """Of a part, each time that it is done."""
        count, rank = self.played.count, self.settings.rank
        times = self.micro * (self.played.entered(part) if part in (MADE, DECODE) else 1)
        if self.timed and self.card is not None:
            on_card = count.seconds(part, self.micro, rank, self.card.seconds)
            return max(on_card, LAUNCH * count.operations(part)) / times
        return count.flops(part, self.micro, rank) / times

    def decode(self) -> float:
        """Of one picture's decoding, whatever the micro-batch."""
        return self.work(DECODE) * self.micro if DECODE in self.played.count.names else 0.0

    def update(self, parts: dict[str, float]) -> float:
        return sum(times * self.work(part) for part, times in parts.items() if part != DECODE)

    def data(self) -> float:
        """Of a sample's data."""
        if MADE not in self.played.count.names:
            return 0.0
        decoded = self.decode() if (DECODE, MADE) in self.played.count.entered else 0.0
        return self.played.beside.making * self.work(MADE) + decoded


HELD_OUT = 2
"""Students of a search that are drawn on what it has not seen."""


def _seconds(once: _Once) -> dict[str, float]:
    played, settings, found = once.played, once.settings, {}
    for phase in played.phases:
        found[phase.name] = phase.updates * settings.batch * once.update(phase.parts)
    found[TEACHER] = _samples(played, settings) * once.data()
    beside, samples = played.beside, settings.watch_samples
    if REFERENCE in played.count.names:
        found[WATCHING] = samples * beside.reference * once.work(REFERENCE)
    if WATCH in played.count.names:
        drawn = _times(settings.watch_every, played) + 2 + _times(settings.preview_every, played)
        drawn += _compared(played, settings) + settings.combine + HELD_OUT * bool(settings.combine)
        found[WATCHING] += bool(settings.combine) * samples * beside.reference * once.work(REFERENCE)
        shown = min(settings.preview_samples, -(-samples // EACH))
        previews = 2 * shown * once.decode() * _times(settings.preview_every, played)
        found[WATCHING] += samples * beside.watch * once.work(WATCH) * drawn + previews
        if settings.choose_by != LAST:  # pictures of each, both of the end's too, beside what they are to draw
            found[WATCHING] += (_compared(played, settings) + 3) * shown * once.decode()
    if LOOK in played.count.names:
        # the teacher's pictures are looked at once, and at the end both of those that may be the result
        looked = _times(settings.watch_every, played) + 3 + _compared(played, settings)
        looked += settings.combine + (HELD_OUT + 1) * bool(settings.combine)
        found[WATCHING] += samples * once.work(LOOK) * looked
    return found


def _times(every: int, played: Rehearsed) -> int:
    """How often what is due each so many updates is done, before the first and after the last too."""
    return 1 + math.ceil(sum(phase.updates for phase in played.phases) / every) if every else 0


def _compared(played: Rehearsed, settings: Settings) -> int:
    """Kept students that are drawn and looked at where the run's end chooses among them."""
    updates = sum(phase.updates for phase in played.phases)
    every = spacing(updates, settings)
    return (updates - 1) // every if every and settings.choose_by != LAST else 0


def _samples(played: Rehearsed, settings: Settings) -> int:
    """Whose data is made in the whole run, at the most: all that are kept, where there are as many updates."""
    drawing = math.ceil(sum(phase.updates * phase.draws for phase in played.phases))
    blocks = max(-(-settings.pairs // settings.batch), len(settings.size_list))
    return min(blocks, drawing) * settings.batch
