"""What a run says: of itself after each update, and of its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.errors import OneStepError
from ...core.recipe import Recipe
from ..engine.trainer import Numbers


@dataclass(frozen=True)
class Progress:
    """What a run says of itself after ``update`` updates, 0 where it shows its untrained student.

    eta: seconds still to go, NaN before the first update. preview: a new picture, if there is one.
    """

    update: int
    total: int
    phase: str
    seconds: float
    eta: float
    numbers: Numbers = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    preview: Path | None = None


Report = Callable[[Progress], bool | None]
"""Called once before the first update, where the untrained student is measured or shown, and after each update; True
after an update asks the run to finish now."""


@dataclass(frozen=True)
class Result:
    """What a run has made.

    path: the LoRA. role: "ema" or "student", whichever the watch found nearer. check: what its load-back proved.
    metrics: of each update, the untrained student's first. preview: the student under what it is compared with,
    after the last update; None where previews are off.
    """

    path: Path
    recipe: Recipe
    metrics: list[dict[str, Any]]
    run: Path
    role: str
    check: str
    updates: int
    seconds: float
    notes: tuple[str, ...] = ()
    preview: Path | None = None


class Stopped(OneStepError):
    """The run stopped itself at its last good state; the message says why."""
