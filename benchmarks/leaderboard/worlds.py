"""Where methods are compared: a model, its prompts, and how far off a student of it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from mixture_world import MixtureWorld
from tiny_world import TinyWorld


class World(Protocol):
    """title: of its page. about: what is trained and measured, in a paragraph. measures: what a row has and its head in
    the table. ranked_by: what the order is by. notes: what was found about rows, below the tables. batch, forwards: of
    a run by default, the latter of one sample for a batch."""

    title: str
    ranked_by: str
    notes: tuple[str, ...]
    about: str
    measures: dict[str, str]
    prompts: list[str]
    batch: int
    forwards: int
    samples: int

    def host(self) -> Any:
        """The model, without a student."""

    def told(self) -> dict[str, Any]:
        """Settings of every method here."""

    def scores(self, path: Path, recipe: Any) -> dict[str, float]:
        """Of the student in the file."""

    def floors(self) -> dict[str, dict[str, float]]:
        """What a student is compared with."""

    def rank(self, scores: dict[str, Any]) -> float:
        """Low is good."""


def world_of(args: Any) -> World:
    """The world of ``args``.world."""
    if args.world == "mixture":
        return MixtureWorld(args.prediction, args.runs, args.samples or 5000)
    return TinyWorld(args.world, args.runs, args.samples or 512, args.reference)
