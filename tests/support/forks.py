"""Scripts of the tests, each in a fork of one process that has loaded torch and what else they need: that takes longer
than most of them.

In the process that is forked: `serve(work)`. In the tests: `Forks(command).run(...)`, one after another. Only where
forking is safe (`POSSIBLE`): nothing but imports has happened in the parent, so it has no threads of its own.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POSSIBLE = sys.platform == "linux"


@dataclass(frozen=True)
class Ended:
    """How a script ended. returncode: as `subprocess` has it, negative for a signal."""

    returncode: int
    stdout: str
    stderr: str


class Forks:
    """A process that forks. command: starts it, and ends in `serve`."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, arguments: list[str], environments: list[dict[str, str]], seconds: float) -> list[Ended]:
        """One process for each of ``environments``, all at once, and how they ended."""
        with tempfile.TemporaryDirectory(prefix="onestep-forks-") as folder:
            places = [str(Path(folder) / str(index)) for index in range(len(environments))]
            asked = {"arguments": arguments, "environments": environments, "places": places, "seconds": seconds}
            assert self.process.stdin is not None and self.process.stdout is not None
            print(json.dumps(asked), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
            if not answer:
                raise AssertionError(f"the process that forks has ended with {self.process.wait()}")
            return [
                Ended(code, *(Path(place + end).read_text("utf-8", "replace") for end in (".out", ".err")))
                for code, place in zip(json.loads(answer), places, strict=True)
            ]


def serve(work: Callable[[list[str]], Any]) -> None:
    """Answer requests until standard input ends; in a fork, do ``work(arguments)`` and return."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the parent prints is no answer
    gc.freeze()  # else each fork's first collection copies every page of what was loaded
    for line in sys.stdin:
        asked = json.loads(line)
        children = []
        for environment, place in zip(asked["environments"], asked["places"], strict=True):
            if not (child := os.fork()):
                _become(environment, place, asked["seconds"])
                work(asked["arguments"])
                return
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), file=answers, flush=True)


def _become(environment: dict[str, str], place: str, seconds: float) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((0, os.devnull), (1, place + ".out"), (2, place + ".err")):
        file = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    signal.alarm(max(1, round(seconds)))  # its default ends the process
