"""The command line, called in this process, and what it said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

SHORT = ("--method", "regression", "--steps", "1", "--set", "rank=2", "--set", "batch=2", "--set", "teacher_steps=2")
SHORT += ("--set", "start=1", "--set", "watch_every=1", "--set", "watch_samples=4", "--set", "preview_every=0")


@dataclass(frozen=True)
class Said:
    """code: the exit code. message: the one line of an error, without the program's name; "" where there was none."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        told = [line for line in self.err.splitlines() if line.startswith("onestep: ")]
        assert len(told) <= 1, told
        return told[0].removeprefix("onestep: ") if told else ""


Command = Callable[..., Said]
