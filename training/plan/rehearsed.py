"""What a rehearsal gives."""

from __future__ import annotations

from dataclasses import dataclass

from .trace import Count


@dataclass(frozen=True)
class PhaseWork:
    """parts: how often each is done in an update. draws: in which share of its updates it learns of data that is made
    once and kept."""

    name: str
    updates: int
    parts: dict[str, float]
    draws: float


@dataclass(frozen=True)
class Beside:
    """What the run has beside its updates, in multiples of what was played: the making of a sample's data, a picture to
    compare with, a student's picture. kept: bytes of a sample's data on the disk, by the name of their folder. text: of
    a prompt's embedding."""

    making: float
    reference: float
    watch: float
    kept: dict[str, float]
    text: int


@dataclass(frozen=True)
class Rehearsed:
    """count: of what was played. phases: of the whole run. gradients: by part, the label of the gradients that it
    makes. passes: by part, forwards of the network and, of those with a graph, backwards: how often each weight is
    read, in the mean."""

    count: Count
    phases: tuple[PhaseWork, ...]
    gradients: dict[str, str]
    passes: dict[str, float]
    beside: Beside

    def entered(self, part: str) -> int:
        """How often ``part`` was played."""
        return sum(times for (name, _), times in self.count.entered.items() if name == part)
