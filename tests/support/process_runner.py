"""One process of small runs, as torchrun starts it: RANK, WORLD_SIZE and where they meet are in the environment.

    process_runner.py RUN [RUN ...]
    process_runner.py forks

RUN: JSON. folder, method, steps; settings: changes to them; fault: {rank, where, after}, what befalls one process once
`where` has been passed `after` times. Runs follow one another in the same processes; each ends with a line of JSON on
standard output: what it came to, and a hash of the student's factors in this process.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
from kill_runner import _load


def settings_of(method: str, steps: int, changes: dict[str, Any]) -> Any:
    from small_host import small

    batch = changes.get("batch", 4)
    quiet = {"watch_every": 2, "preview_every": 0, "warm_up": 1, "batch": batch, "pairs": 2 * batch, "save_every": 1}
    if method in ("dmd", "vsd", "dmd2", "f-distill"):
        quiet |= {"warm_start": 2, "critic_warm_up": 1, "critic_updates": 1}
    return small(method=method, steps=steps, **quiet | changes)


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _out_of_memory(*_: Any) -> None:
    import torch

    raise torch.OutOfMemoryError("out of memory: injected")


def _cancel(*_: Any) -> None:
    raise KeyboardInterrupt


def _no_number(trainer: Any, turn: Any, *_: Any) -> None:
    trainer.host.denoiser.roles.parameters(turn.role)[0].grad.fill_(float("nan"))


def _counted(after: int, happen: Callable[..., None], also: Callable[..., Any], late: bool) -> Callable[..., Any]:
    """``also``, with what happens at its call number ``after``: before it, or where ``late`` after it."""
    calls = iter(range(10**9))

    def called(*args: Any, **named: Any) -> Any:
        now = next(calls) == after
        if now and not late:
            happen(*args)
        found = also(*args, **named)
        if now and late:
            happen(*args)
        return found

    return called


def befall(monkeypatch: Any, host: Any, where: str, after: int) -> None:
    """Arrange for what is to happen to this process."""
    from onestep.training.data.pairs import Blocks, Pairs
    from onestep.training.engine.trainer import Trainer
    from onestep.training.runs import run
    from onestep.training.watch.monitor import Monitor

    places: dict[str, tuple[Any, str, Callable[..., None]]] = {
        "update": (Trainer, "step", _die),
        "pairs": (Pairs, "_make", _die),
        "saving": (run, "write_tensors", _die),
        "end": (Monitor, "better", _die),
        "memory in pairs": (Blocks, "_sides", _out_of_memory),
        "memory": (Trainer, "batches", _out_of_memory),
        "nan": (Trainer, "_accumulated", _no_number),
        "cancel": (Trainer, "batches", _cancel),
    }
    if where == "full":
        calls = iter(range(10**9))
        monkeypatch.setattr(run, "room_at", lambda folder: 0 if next(calls) >= after else 10**12)
        return
    owner, name, happen = places[where]
    monkeypatch.setattr(owner, name, _counted(after, happen, getattr(owner, name), where == "nan"))


def one_run(run: dict[str, Any], rank: int) -> dict[str, Any]:
    import pytest
    import torch
    from small_host import SmallHost
    from whole_runs import run as distilled

    from onestep.training.engine import processes

    torch.manual_seed(0)
    fault = run.get("fault") or {}
    struck = fault.get("rank") == rank
    host = SmallHost(seed=int(struck and fault["where"] == "base"))
    changes = run.get("settings", {}) | ({"learning_rate": 0.5} if struck and fault["where"] == "settings" else {})
    settings, factors = settings_of(run["method"], run["steps"], changes), {}

    partial, seen = Path(run["folder"]) / "partial.safetensors", {"saved": []}

    def report(progress: Any) -> Any:
        from onestep.training.distil import Request

        shown = progress.preparing or progress.preview
        seen["saved"] += [progress.update] if partial.is_file() and not shown else []
        asked = {"finish": Request.FINISH, "save and draw": Request.SAVE | Request.SAMPLE}.get(fault.get("where"))
        return asked if progress.update == fault.get("after") and not shown else None

    forget = host.denoiser.roles.drop
    host.denoiser.roles.drop = lambda role: (factors.update({role: _hash(host, role)}), forget(role))  # type: ignore[method-assign, func-returns-value]
    with pytest.MonkeyPatch.context() as patch:
        if fault.get("where") == "one card":
            patch.setattr(processes, "_card", lambda device: "the one")
        elif struck and fault["where"] not in ("base", "settings", "finish", "save and draw"):
            befall(patch, host, fault["where"], fault["after"])
        try:
            result = distilled(Path(run["folder"]), settings, host=host, report=report, existing="continue")
            found = {"updates": result.updates, "notes": list(result.notes)} | seen
        except (Exception, KeyboardInterrupt) as error:
            found = {"error": type(error).__name__, "says": str(error)}
            if not fault:
                raise
    return found | {"factors": factors}


def _hash(host: Any, role: str) -> str:
    values = b"".join(value.detach().numpy().tobytes() for value in host.denoiser.roles.parameters(role))
    return hashlib.sha256(values).hexdigest()


def load() -> None:
    _load()
    import torch
    import whole_runs  # noqa: F401

    torch.set_num_threads(1)


def main(*runs: str) -> None:
    from onestep.training.engine import processes

    with processes.joined():
        for run in map(json.loads, runs):
            print(json.dumps(one_run(run, processes.rank())), flush=True)


if __name__ == "__main__":
    load()
    if sys.argv[1:] == ["forks"]:
        forks.serve(lambda runs: main(*runs))
    else:
        main(*sys.argv[1:])
