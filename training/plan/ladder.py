"""Rungs for a budget: how a run may be laid out so that it fits, the fastest first; what it takes and what it proposes.

By itself a run takes what leaves its result alone: micro-batches, what is computed again in backward, where moments and
mean lie. What changes the result is proposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ...core.recomputed import BLOCKS, FEED_FORWARDS, NOTHING
from ..engine.student import LARGE
from ..host import Shells
from ..settings import Settings
from .cards import Card
from .rungs import Rung, Way, may_lie_on_host, rung_of
from .storage import AS_IT_IS, FP8, NF4, may_be_stored

STREAMING = "streaming"
"""The setting by which a run's base may be streamed, and then is where it does not fit otherwise."""
LIGHTER = {FEED_FORWARDS: 2.0, NOTHING: 1.2}
"""Times the activations of a sample of the grade before that one takes at the least: no larger card than that is left
out, and a card that is smaller need not have the grade counted."""


@dataclass(frozen=True)
class Planned:
    """What a run needs. as_set: how it would lie by its settings. rungs: tried, in order; those with changes are
    proposed. taken: the rung that the run goes on, the fastest that fits; None where none does that leaves its result
    alone."""

    name: str
    settings: Settings
    card: Card | None
    as_set: Way
    rungs: tuple[Rung, ...]
    taken: Rung | None

    @property
    def proposed(self) -> Rung | None:
        """The first that fits where the run cannot take one."""
        if self.taken or not self.card:
            return None
        return next((rung for rung in self.rungs if rung.fits(self.card)), None)


def planned(name: str, shells: Shells, settings: Settings, card: Card | None) -> Planned:
    """The rungs of ``settings`` on ``card``, down to the first that fits. Without a card: the run as it is set.

    name: of the model.
    """
    streamed = settings.streaming == "on"
    grade = BLOCKS if settings.checkpointing or streamed else NOTHING
    as_set = Way(-(-settings.batch // settings.accumulation), grade, streamed=streamed)
    if card is None:
        rung = rung_of(shells, settings, None, as_set)
        return Planned(name, settings, None, as_set, (rung,), rung)
    as_set = replace(as_set, mean_on_host=card.size < LARGE)
    rungs: list[Rung] = []
    grades = (BLOCKS, FEED_FORWARDS, NOTHING) if settings.checkpointing else (NOTHING, FEED_FORWARDS, BLOCKS)
    for grade in (BLOCKS,) if streamed else grades:
        if rungs and settings.checkpointing and not _may_fit(rungs[-1], grade, card):
            break
        rungs += _down_to_fitting(shells, settings, card, replace(as_set, recompute=grade))
        if rungs[-1].fits(card) and not settings.checkpointing:
            break
    if not any(rung.fits(card) for rung in rungs) and settings.flat().get(STREAMING, "off") != "off":
        rungs += _down_to_fitting(shells, settings, card, replace(as_set, recompute=BLOCKS, streamed=True))
    fitting = [rung for rung in rungs if rung.fits(card)]
    if fitting:
        return Planned(name, settings, card, as_set, tuple(rungs), min(fitting, key=lambda rung: rung.seconds))
    least = min(rungs, key=lambda rung: rung.peak.bytes).way
    more = _proposed(shells, settings, card, least)
    return Planned(name, settings, card, as_set, (*rungs, *more), None)


def _down_to_fitting(shells: Shells, settings: Settings, card: Card, first: Way) -> Iterator[Rung]:
    """Rungs of one grade, the fastest first, down to the first that fits: smaller micro-batches, moments on the host;
    both at the last."""
    places = (False, True) if may_lie_on_host(shells(settings.targets), settings) else (False,)
    ways = [replace(first, micro=micro, moments_on_host=place) for micro in _micros(first.micro) for place in places]
    rungs = [rung_of(shells, settings, card, way) for way in ways]
    for rung in sorted(rungs, key=lambda rung: (rung.seconds, -rung.peak.bytes)):
        yield rung
        if rung.fits(card):
            return


def _may_fit(last: Rung, grade: str, card: Card) -> bool:
    """Whether one sample of ``grade``, of which less is computed again than of ``last``, may fit."""
    activations = last.peak.made_of.get("activations", 0)
    least = last.peak.bytes - activations + LIGHTER[grade] * activations / last.way.micro
    return last.fits(card) and least <= card.usable


def _micros(most: int) -> list[int]:
    """From ``most`` down to 1, each half of the one before."""
    micros = [most]
    while micros[-1] > 1:
        micros.append(-(-micros[-1] // 2))
    return micros


def _proposed(shells: Shells, settings: Settings, card: Card, least: Way) -> Iterator[Rung]:
    """Rungs that change the result, one more change each, down to the first that fits. least: the way that takes least
    of those that leave it alone."""
    for storage, changes in _changes(settings, may_be_stored(shells(settings.targets))):
        yield (rung := rung_of(shells, settings, card, replace(least, storage=storage, changes=changes)))
        if rung.fits(card):
            return


def _changes(settings: Settings, storable: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(storage of the base, settings)."""
    storages = (FP8, NF4) if storable else (AS_IT_IS,)
    changes: dict[str, Any] = {}
    for storage in storages if storable else ():
        yield storage, changes
    for rank in (32, 16):
        if rank < settings.rank:
            changes = changes | {"rank": rank}
            for storage in storages:
                yield storage, changes
    for targets in ("attention+mlp", "attention"):
        if settings.targets in ("all", "attention+mlp") and targets != settings.targets:
            yield storages[-1], (changes := changes | {"targets": targets})
    width, height = settings.size_list[0]
    while min(width, height) >= 512:
        width, height = (side * 3 // 4 // 64 * 64 for side in (width, height))
        yield storages[-1], (changes := changes | {"sizes": f"{width}x{height}"})
