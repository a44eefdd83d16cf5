"""Whole runs on the small host, and what they leave: to compare two of them to the last bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_host import PROMPTS, SmallHost, small

from onestep.core.lora_file import load_lora
from onestep.core.tensor_file import read_tensors
from onestep.training.distil import Progress, Report, Result, distil
from onestep.training.settings import Settings

CLOCKS = ("seconds", "elapsed")


def run(
    folder: Path,
    settings: Settings | None = None,
    *,
    host: SmallHost | None = None,
    report: Report | None = None,
    **how: Any,
) -> Result:
    return distil(host or SmallHost(), PROMPTS, settings or small(), folder, report=report, **how)


def newest(folder: Path) -> Path:
    """The last state's folder."""
    states = [path for path in folder.glob("state-*") if (path / "complete").is_file()]
    return max(states, key=lambda path: int(path.name.removeprefix("state-")))


def left(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves, but for its clocks: the LoRA's bytes, state, metrics, pictures."""
    state = newest(folder)
    notes = json.loads((state / "state.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in (
            "result*.safetensors",
            "previews/*",
            "pairs/*",
            "anchors/*",
            "trajectories/*",
            "triples/*",
            "segments/*",
            "candidates/*",
            "choice.*",
            "state-*/state.safetensors",
        )
        for path in sorted(folder.glob(pattern))
        if path.parent == folder or not path.parent.name.startswith("state-") or path.parent == state
    }
    return {
        "files": files,
        "state": {key: value for key, value in notes.items() if key not in CLOCKS},
        "metrics": [{key: value for key, value in line.items() if key not in CLOCKS} for line in metrics],
    }


def factors(path: Path) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in read_tensors(path).items()}


def seen_under(host: SmallHost, file: Path) -> Report:
    """A report that holds the student's factors against those of ``file``, to the bit, whenever it is called."""
    wanted = load_lora(file).state

    def compare(progress: Progress) -> None:
        if progress.preparing:
            return
        found = host.denoiser.roles.state("student")
        for name, (a, b) in wanted.items():
            assert torch.equal(found[name][0], a) and torch.equal(found[name][1], b), (progress.update, name)

    return compare


class Cancelled(Exception):
    """What a host raises where a person cancels."""


def at_call(number: int, error: BaseException) -> Callable[[], None]:
    """Raises ``error`` at its ``number``-th call, and never again."""
    calls = iter(range(1, 10**9))

    def poll() -> None:
        if next(calls) == number:
            raise error

    return poll


def cancelled_and_whole(folder: Path, settings: Settings, poll: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is left of a run that is cancelled at its ``poll``-th poll and goes on, and of one that nobody stops."""
    run(folder / "whole" / "run", settings)
    with pytest.raises(Cancelled):
        run(folder / "cut" / "run", settings, host=SmallHost(on_poll=at_call(poll, Cancelled())))
    run(folder / "cut" / "run", settings, existing="continue")
    return left(folder / "cut" / "run"), left(folder / "whole" / "run")
