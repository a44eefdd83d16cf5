"""What was counted, and how it scales: one count, at an odd batch and rank, is the count at every other.

The count is made at a batch p and a rank r that are primes and divide no size of the network. A number of bytes or of
FLOPs that p divides grows with the batch, one that r divides with the rank, and one that neither divides with nothing;
so the bytes alive at every instant are known for any batch and rank, and their peak with them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

DECODE = "decode"
"""The part in which one picture is decoded; a shell's decoder names it."""


@dataclass(frozen=True, eq=False)  # one of a kind of operation: its hash is asked for at each call
class Cost:
    """Of one operation. flops: its products and sums in matrix products, convolutions and attention. moved: bytes of
    each operand that it reads and of each result that it writes. width: bytes of a number that it computes in."""

    flops: int
    moved: tuple[int, ...]
    width: int


@dataclass
class Trace:
    """Events in order: at each, so many bytes come alive (or die, below 0) under a label within a part.

    within: the part around a part, where there is one. entered: how often a part was, from which other. times: how
    often what runs is counted: as often as it is done in the mean, where that differs. counts: how often each operation
    ran in each part, so counted.
    """

    within: dict[str, str] = field(default_factory=dict)
    part: str = ""
    times: float = 1
    parts: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    deltas: list[int] = field(default_factory=list)
    counts: dict[tuple[str, Cost], float] = field(default_factory=lambda: defaultdict(int))
    entered: Counter[tuple[str, str]] = field(default_factory=Counter)

    def enter(self, part: str) -> None:
        """`begin` a part from the one that is."""
        self.entered[part, self.part] += 1
        self.begin(part, within=self.part)

    def begin(self, part: str, within: str = "") -> None:
        """What is counted from here on belongs to ``part``."""
        self.part = part
        self.within.setdefault(part, within)
        self.changed("", 0)

    def changed(self, label: str, bytes: int) -> None:
        self.parts.append(self.part)
        self.labels.append(label)
        self.deltas.append(bytes)

    def ran(self, cost: Cost) -> None:
        self.counts[self.part, cost] += self.times


@dataclass(frozen=True)
class Scale:
    """From the batch and rank that were counted, (p, r), to others."""

    p: int
    r: int
    batch: int
    rank: int

    def __call__(self, number: int) -> int:
        """``number`` of bytes or FLOPs, counted at (p, r), at (batch, rank)."""
        if self.p != self.batch and number % self.p == 0:
            number = number // self.p * self.batch
        if self.r != self.rank and number % self.r == 0:
            number = number // self.r * self.rank
        return number

    def array(self, numbers: np.ndarray) -> np.ndarray:
        """The same of many."""
        by_batch, by_rank = numbers % self.p == 0, numbers % self.r == 0
        scaled = np.where(by_batch, numbers // self.p * self.batch, numbers)
        return np.where(by_rank, scaled // self.r * self.rank, scaled)


@dataclass(frozen=True)
class Peak:
    """The most bytes alive within a part, and what they were then, by label."""

    bytes: int
    made_of: dict[str, int]


@dataclass(frozen=True)
class Count:
    """A trace counted at batch p and rank r, in arrays. within, entered: as in the trace."""

    p: int
    r: int
    names: tuple[str, ...]
    parts: np.ndarray
    labels: tuple[str, ...]
    label: np.ndarray
    deltas: np.ndarray
    counts: dict[str, dict[Cost, float]]
    within: dict[str, str]
    entered: dict[tuple[str, str], int]

    @classmethod
    def of(cls, trace: Trace, p: int, r: int) -> Count:
        names, parts = np.unique(np.array(trace.parts), return_inverse=True)
        labels, label = np.unique(np.array(trace.labels), return_inverse=True)
        counts: dict[str, dict[Cost, float]] = {}
        for (part, cost), times in trace.counts.items():
            counts.setdefault(part, {})[cost] = times
        deltas, around = np.array(trace.deltas, dtype=np.int64), (dict(trace.within), dict(trace.entered))
        return cls(p, r, tuple(map(str, names)), parts, tuple(map(str, labels)), label, deltas, counts, *around)

    def peaks(
        self, batch: int, rank: int, shares: dict[str, float] | None = None, there: dict[str, str] | None = None
    ) -> dict[str, Peak]:
        """The peak of each part at ``batch`` samples a micro-batch and ``rank``.

        shares: of the bytes of a label that are there, as 0 of what lies on the host; 1 where it is not named. there:
        by part, a label of which all that it ever has is there from the part's beginning, as the gradients of earlier
        micro-batches.
        """
        bytes = Scale(self.p, self.r, batch, rank).array(self.deltas)
        if shares:
            share = np.array([shares.get(label, 1.0) for label in self.labels])[self.label]
            bytes = np.rint(bytes * share).astype(np.int64)
        alive = np.cumsum(bytes)
        running = {label: self._running(bytes, label) for label in set((there or {}).values())}
        return {
            name: self._peak(bytes, alive, number, (there or {}).get(name), running)
            for number, name in enumerate(self.names)
            if name
        }

    def most(self, batch: int, rank: int, *labels: str) -> int:
        """The most bytes alive at once under all of ``labels``, of whatever part; 0 for those that there are not."""
        bytes = Scale(self.p, self.r, batch, rank).array(self.deltas)
        numbers = [self.labels.index(label) for label in labels if label in self.labels]
        return int(np.cumsum(np.where(np.isin(self.label, numbers), bytes, 0)).max())

    def _running(self, bytes: np.ndarray, label: str) -> np.ndarray:
        """Bytes alive under a label at each instant."""
        return np.cumsum(np.where(self.label == self.labels.index(label), bytes, 0))

    def _peak(
        self, bytes: np.ndarray, alive: np.ndarray, number: int, there: str | None, running: dict[str, np.ndarray]
    ) -> Peak:
        if there is not None:
            alive = alive - running[there] + running[there].max()
        where = np.flatnonzero(self.parts == number)
        at = int(where[np.argmax(alive[where])])
        sums = np.bincount(self.label[: at + 1], bytes[: at + 1], len(self.labels))
        made_of = {label: round(value) for label, value in zip(self.labels, sums, strict=True) if value}
        if there is not None:
            made_of[there] = int(running[there].max())
        return Peak(int(alive[at]), made_of)

    def flops(self, part: str, batch: int, rank: int) -> float:
        """FLOPs of ``part`` at ``batch`` samples a micro-batch, once: in the mean."""
        scale = Scale(self.p, self.r, batch, rank)
        return sum(scale(cost.flops) * times for cost, times in self.counts.get(part, {}).items())

    def moved(self, part: str, batch: int, rank: int) -> float:
        """Bytes read and written."""
        scale = Scale(self.p, self.r, batch, rank)
        return sum(sum(map(scale, cost.moved)) * times for cost, times in self.counts.get(part, {}).items())

    def seconds(self, part: str, batch: int, rank: int, of: Callable[[int, int, int], float]) -> float:
        """of: seconds of an operation by its FLOPs, the bytes that it moves and those of a number."""
        scale, whole = Scale(self.p, self.r, batch, rank), 0.0
        for cost, times in self.counts.get(part, {}).items():
            whole += times * of(scale(cost.flops), sum(map(scale, cost.moved)), cost.width)
        return whole

    def operations(self, part: str) -> float:
        """Operations that are more than a view."""
        return sum(self.counts.get(part, {}).values())
