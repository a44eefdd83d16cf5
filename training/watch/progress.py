"""What a run says of itself as it goes, what it may be asked for meanwhile, and what it has made at its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Flag, auto
from pathlib import Path
from typing import Any

from ...core.errors import OneStepError
from ...core.recipe import Recipe
from ..engine.turns import Numbers


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    update, total: of the run's updates; 0 before the first. phase: what is being done, in words. done, of: how much of
    the phase; of the run's updates while it trains. seconds: since the run began, earlier parts included. eta: seconds
    still to go, NaN while that is being measured. numbers: of this update. preview: a new picture, if there is one.
    """

    update: int
    total: int
    phase: str
    done: int
    of: int
    seconds: float
    eta: float
    numbers: Numbers = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    preview: Path | None = None

    @property
    def preparing(self) -> bool:
        """Whether this is of work before the updates: ``done`` and ``of`` count its own parts."""
        return (self.done, self.of) != (self.update, self.total)


class Request(Flag):
    """What a report may ask of its run: to finish now, to draw a preview, to save its state and what it has learnt."""

    NONE = 0
    FINISH = auto()
    SAMPLE = auto()
    SAVE = auto()


Report = Callable[[Progress], "Request | bool | None"]
"""Called from the first second on: as prompts are encoded and the teacher's pictures drawn, once where the untrained
student is measured or shown, and after each update. What it answers after an update is done; True is FINISH."""


def requested(answer: Request | bool | None) -> Request:
    """A report's answer as a request."""
    if isinstance(answer, Request):
        return answer
    return Request.FINISH if answer else Request.NONE


@dataclass(frozen=True)
class Result:
    """What a run has made.

    path: the LoRA or the adapter. role: "ema" or "student", whichever the watch found nearer. check: what its load-back
    proved. metrics: of each update, the untrained student's first. preview: the student under what it is compared with,
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
