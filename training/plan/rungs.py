"""One rung: how a run may lie on a card, what it then needs at the most, and the least time of an update."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...core.recomputed import BLOCKS, FEED_FORWARDS, NOTHING
from ..engine import host_moments
from ..engine.spacing import KEPT_AS, number
from ..engine.student import STUDENT
from ..engine.trainer import EMA
from ..host import Host, Shells
from ..methods.distribution_matching import CRITIC
from ..settings import Settings
from .cards import Card
from .counted import counted
from .rehearse import DECODE, FORWARD, MOMENTS, OPTIMIZER, PROMPTS, Rehearsed
from .storage import AS_IT_IS, Stored, stored, streamed
from .trace import Peak
from .whole import LAUNCH, Whole, whole_of

UNSEEN = (FORWARD, MOMENTS)
"""Parts that a run does not have."""
YIELDING = (PROMPTS, DECODE)
"""Parts that do with less where there is less: the network leaves the card for the encoders, and a picture is decoded
in tiles."""
ROLES = (STUDENT, CRITIC, EMA)
EIGHT_BIT = 0.25 * (1 + 4 / 256)
"""Of float32's bytes: a byte a number, and a float32 for each 256 of them."""
STATE, CANDIDATES = "states", "candidates"
STATES = 3
"""That a run keeps, the one among them that is being written."""
LINK = 12e9
"""Bytes a second between host and card: a PCIe link of 16 lanes of version 3, or 8 of version 4."""
WORDS = {BLOCKS: "checkpointing", FEED_FORWARDS: "checkpointing of feed-forwards", NOTHING: "no checkpointing"}


@dataclass(frozen=True)
class Way:
    """micro: samples of a micro-batch. recompute: a grade of core.recomputed. moments_on_host, mean_on_host: where they
    lie. streamed: whether the base's blocks pass through the card. storage: of the base's weights, "" as it is.
    changes: settings that are not the run's own, as they are given; these two a run never takes by itself.
    """

    micro: int
    recompute: str = BLOCKS
    moments_on_host: bool = False
    mean_on_host: bool = False
    streamed: bool = False
    storage: str = AS_IT_IS
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """What it is, in words."""
        places = ["moments on the host"] if self.moments_on_host else []
        base = ["base streamed"] if self.streamed else []
        base += [f"base in {self.storage}"] if self.storage else []
        changes = [f"{name}={value}" for name, value in self.changes.items()]
        return ", ".join([f"micro-batch {self.micro}", WORDS[self.recompute], *places, *base, *changes])


@dataclass(frozen=True)
class Rung:
    """part: where the most is alive, which is ``peak``. forwards: of a sample in an update, of work. seconds: of an
    update, at the least. whole: of the whole run."""

    way: Way
    peak: Peak
    part: str
    forwards: float
    seconds: float
    parts: dict[str, Peak] = field(default_factory=dict)
    whole: Whole = field(default_factory=Whole)

    def fits(self, card: Card) -> bool:
        return self.peak.bytes <= card.usable


def rung_of(shells: Shells, settings: Settings, card: Card | None, way: Way) -> Rung:
    """What a run of ``settings`` needs in this way."""
    chosen = settings.with_texts({name: str(value) for name, value in way.changes.items()})
    host = shells(chosen.targets)
    played = counted(host, chosen, way.recompute)
    base = stored(host, way.storage)
    base = streamed(host, base) if way.streamed else base
    peaks = peaks_of(played, chosen, way, base)
    part = max((name for name in peaks if name not in YIELDING), key=lambda name: peaks[name].bytes)
    last = next(phase for phase in reversed(played.phases) if phase.updates)
    seconds = _seconds(played, last.parts, chosen, way, card, base) if card else 0.0
    kept = {STATE: STATES * _state(played, chosen, way), CANDIDATES: _candidates(played, chosen, way)}
    whole = whole_of(played, chosen, way.micro, card, kept)
    return Rung(way, peaks[part], part, whole.costs[last.name], seconds, peaks, whole)


def _state(played: Rehearsed, settings: Settings, way: Way) -> float:
    """Bytes of a state where there is most in one: what learns, the mean of it, and the moments that are there at
    once, for first moments go as their phase ends."""
    small, most = EIGHT_BIT if settings.optimizer == "adamw8bit" else 1.0, played.count.most
    roles, moments = most(way.micro, settings.rank, *ROLES), [f"{role} moments" for role in ROLES]
    return roles + small * most(way.micro, settings.rank, *moments)


def _candidates(played: Rehearsed, settings: Settings, way: Way) -> float:
    """Bytes of all that are kept at the end: the running mean, or the student, in fewer bytes than float32's."""
    updates = sum(phase.updates for phase in played.phases)
    return number(updates, settings) * KEPT_AS.itemsize / 4 * played.count.most(way.micro, settings.rank, STUDENT)


def peaks_of(played: Rehearsed, settings: Settings, way: Way, base: Stored | None = None) -> dict[str, Peak]:
    """The peak of each part; where a batch has several micro-batches, with the gradients of those before."""
    base = base or Stored()
    shares = {"ema": 0.0} if way.mean_on_host else {}
    small = EIGHT_BIT if settings.optimizer == "adamw8bit" else 1.0
    of_moments = 0.0 if way.moments_on_host else small
    shares |= {"base": base.share} | {label: of_moments for label in played.count.labels if label.endswith(" moments")}
    there = played.gradients if way.micro < settings.batch else None
    peaks = played.count.peaks(way.micro, settings.rank, shares, there)
    in_step = _in_step(played, settings, way, small) if way.moments_on_host else 0
    more = {name: {"cast weight": base.cast, "moments": in_step if name == OPTIMIZER else 0} for name in peaks}
    return {name: _with(peak, more[name]) for name, peak in peaks.items() if name not in UNSEEN}


def _with(peak: Peak, more: dict[str, int]) -> Peak:
    there = {label: bytes for label, bytes in more.items() if bytes}
    return Peak(peak.bytes + sum(there.values()), peak.made_of | there)


def _in_step(played: Rehearsed, settings: Settings, way: Way, small: float) -> int:
    """Of the moments on the host, what a step has on the card: both of AdamW's for a part of the tensors at most."""
    labels = [label for label in played.count.labels if label.endswith(" moments")]
    every = max((played.count.most(way.micro, settings.rank, label) for label in labels), default=0)
    return int(small * min(every, 2 * 4 * host_moments.PART))


def may_lie_on_host(host: Host, settings: Settings) -> bool:
    """Whether this run's moments may."""
    return host_moments.serves(settings)


def _seconds(
    played: Rehearsed, turns: dict[str, float], settings: Settings, way: Way, card: Card, base: Stored
) -> float:
    """Of an update, at the least: of its micro-batches, on the card, by what the processor hands it or by the weights
    that come from the host meanwhile; and of the moments that cross."""
    count, rank = played.count, settings.rank
    on_card = sum(times * count.seconds(name, way.micro, rank, card.seconds) for name, times in turns.items())
    handed = LAUNCH * sum(times * count.operations(name) for name, times in turns.items())
    comes = base.crossing / LINK * sum(times * played.passes.get(name, 0) for name, times in turns.items())
    return max(on_card, handed, comes) * -(-settings.batch // way.micro) + _crossing(played, turns, settings, way)


def _crossing(played: Rehearsed, turns: dict[str, float], settings: Settings, way: Way) -> float:
    """Of the second moments, as large as their role, once each way for each step."""
    if not way.moments_on_host:
        return 0.0
    steps = {name.rpartition(", ")[2]: times for name, times in turns.items() if ", " in name}
    small = EIGHT_BIT if settings.optimizer == "adamw8bit" else 1.0
    moved = sum(times * played.count.most(way.micro, settings.rank, role) for role, times in steps.items())
    return 2 * small * moved / LINK
