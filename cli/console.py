"""What a command says, and where: results on standard output, all else on standard error; with --json, JSON alone."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, TextIO

from ..core.errors import OneStepError
from ..core.words import duration as duration

LONGEST = 399
EVERY = 30.0
"""Seconds between two lines where there is no terminal for a bar."""


class RunFailed(OneStepError):
    """Not the input was bad: a run went wrong that had begun."""


@dataclass
class Console:
    """out: where results go. as_json: results are one JSON document, and nothing else goes to ``out``."""

    out: TextIO
    as_json: bool = False

    def result(self, text: str, value: Any) -> None:
        """The command's answer: ``text`` for a person, ``value`` for a program."""
        shown = json.dumps(value, indent=1, default=str) if self.as_json else text
        print(shown, file=self.out, flush=True)

    def note(self, text: str) -> None:
        """A line on standard error; above the progress bar where one is drawn."""
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)

    @property
    def terminal(self) -> bool:
        """Whether a progress bar is drawn."""
        return sys.stderr.isatty()

    def bar(self, total: int, title: str) -> Any:
        """A progress bar on standard error; none where that is no terminal."""
        from tqdm import tqdm

        shape = "{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}"
        return tqdm(total=total, desc=title, file=sys.stderr, disable=None, dynamic_ncols=True, bar_format=shape)

    @contextmanager
    def counted(self, total: int, title: str) -> Iterator[Callable[[int], None]]:
        """Within, a function that is told how many more are done, and shows it: a bar, or where there is no terminal a
        line every half a minute with the time still to go."""
        began, done, said_at = time.monotonic(), 0, time.monotonic()
        with self.bar(total, title) as bar:

            def more(count: int) -> None:
                nonlocal done, said_at
                done += count
                bar.update(count)
                now = time.monotonic()
                if not self.terminal and now - said_at >= EVERY:
                    said_at = now
                    left = (now - began) / done * (total - done) if done else math.nan
                    self.note(f"{title}: {done} of {total}; {to_go(left)}")

            yield more


class Silent(Console):
    """Of a process that is not the first of several: the first one speaks."""

    def result(self, text: str, value: Any) -> None:
        pass

    def note(self, text: str) -> None:
        pass


@contextmanager
def console(as_json: bool) -> Iterator[Console]:
    """A console; within, what libraries print goes to standard error."""
    out = sys.stdout
    with redirect_stdout(sys.stderr):
        yield Console(out, as_json)


def complain(message: str) -> None:
    """One message on standard error, in one line, of less than 400 characters."""
    line = " ".join(f"onestep: {message}".split())
    print(line if len(line) <= LONGEST else line[: LONGEST - 3] + "...", file=sys.stderr, flush=True)


def to_go(eta: float) -> str:
    """ "5 min to go"."""
    return f"{duration(eta)} to go" if math.isfinite(eta) else "measuring the time to go"
