"""What a run says: of itself after each update, and of its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import OneStepError
from ..core.recipe import Recipe
from .trainer import Numbers


@dataclass(frozen=True)
class Progress:
    """What a run says of itself after each update. eta: seconds still to go. preview: a new picture, if there is
    one."""

    update: int
    total: int
    phase: str
    seconds: float
    eta: float
    numbers: Numbers = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    preview: Path | None = None


Report = Callable[[Progress], bool | None]
"""Called after each update; True asks the run to finish now."""


@dataclass(frozen=True)
class Result:
    """path: the LoRA. role: "ema" or "student", whichever the watch found nearer. check: what its load-back proved."""

    path: Path
    recipe: Recipe
    metrics: list[dict[str, Any]]
    run: Path
    role: str
    check: str
    updates: int
    seconds: float
    notes: tuple[str, ...] = ()


class Stopped(OneStepError):
    """The run stopped itself at its last good state; the message says why."""
