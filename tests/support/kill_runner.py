"""Kills whole runs at chosen instants and lets them go on; a program of its own, as it forks: torch is loaded once.

An instant is the n-th of the events that a run goes through: a forward, a poll, half a write, a whole one, a sync, a
rename, a deletion. The first run of each method, which nobody kills, says which there are. Prints one line of JSON for
each run.
"""

from __future__ import annotations

import builtins
import gc
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
POOLS = ("pairs", "anchors", "trajectories", "triples", "segments")
KILLS = {"dmd": 21, "cdm": 6, "agd": 4, "guidance-lora": 4, "nct": 4, "sun": 4, "dmd2": 4, "f-distill": 4, "ladd": 4}
KILLS["uni-instruct"] = 4
SAVING = tuple((kind, "save", 3) for kind in ("half a write", "a write", "fsync", "replace", "unlink"))
POOLING = (("half a write", "pool", 1), ("replace", "pool", 1), ("half a write", "save", 1), ("replace", "save", 1))
WORST = {True: SAVING, False: POOLING}
"""(kind, place, count): of dmd, and of the methods that make their data first."""


def _load() -> None:
    """The checkout as `onestep`, and these helpers, as pytest has them."""
    spec = importlib.util.spec_from_file_location("conftest", HERE.parent / "conftest.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    sys.path.insert(0, str(HERE))


class Clock:
    """Counts events; at the one told, this process dies as the kernel would kill it: no handler, no flush."""

    def __init__(self, deadly: int = 0) -> None:
        self.deadly, self.saving = deadly, False
        self.events: list[tuple[str, str]] = []

    def tick(self, kind: str, path: Any = "") -> None:
        """path: of a file that is of a method's pool where it lies in such a folder."""
        pool = "pool" if Path(str(path)).parent.name in POOLS else ""
        self.events.append((kind, "save" if self.saving else pool))
        if len(self.events) == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)


class Watched:
    """An open file whose every write is two events: half of it is on the disk, all of it is."""

    def __init__(self, file: Any, path: Any, clock: Clock) -> None:
        self._file, self._path, self._clock = file, path, clock

    def write(self, data: Any) -> int:
        middle = len(data) // 2
        for part, kind in ((data[:middle], "half a write"), (data[middle:], "a write")):
            self._file.write(part)
            self._file.flush()
            self._clock.tick(kind, self._path)
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._file.close()


def watch(clock: Clock, folder: Path) -> None:
    """Make every event under ``folder`` tick, after it has happened."""
    from onestep.training.runs.run import Run

    def after(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*args: Any, **more: Any) -> Any:
            result = real(*args, **more)
            clock.tick(name, args[-1])
            return result

        setattr(module, name, call)

    for name in ("fsync", "replace", "unlink", "rmdir"):
        after(os, name)
    opened = builtins.open

    def watched(file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        made = opened(file, mode, *args, **more)
        ours = isinstance(file, str | Path) and str(file).startswith(str(folder)) and not str(file).endswith(".lock")
        return Watched(made, file, clock) if ours and set(mode) & set("wa") else made

    builtins.open = watched  # type: ignore[assignment]
    save = Run.save

    def saving(*args: Any) -> None:
        clock.saving = True
        save(*args)
        clock.saving = False

    Run.save = saving  # type: ignore[method-assign, assignment]


def forked(work: Callable[[], Any]) -> Any:
    """What ``work`` gives in a process of its own, or None where that was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            with os.fdopen(writer, "w") as pipe:
                json.dump(work(), pipe)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    if status:
        raise RuntimeError(f"a run failed with status {status}")
    return json.loads(answer)


def host_for(method: str) -> Any:
    """agd and sun need the cross-attentions of a real U-Net."""
    import torch
    from small_host import SmallHost
    from tiny_pipelines import sd

    from onestep.pipelines.adapt import adapt

    torch.manual_seed(0)
    return adapt(sd(), device="cpu") if method in ("agd", "sun") else SmallHost()


def settings_for(method: str) -> Any:
    from small_host import small

    if method == "dmd":
        kept = {"candidate_every": 1, "candidates": 3, "choose_by": "distance"}
        return small(warm_start=2, critic_warm_up=1, steps=3, critic_updates=1, save_every=2, watch_every=2, **kept)
    quiet = {"watch_every": 0, "preview_every": 0, "warm_up": 1, "ema": 0.5, "sizes": "16x16", "batch": 2, "pairs": 4}
    theirs: dict[str, dict[str, Any]] = {
        "cdm": {
            **{"student_steps": 2, "step_loras": True, "warm_start": 2, "critic_warm_up": 1, "critic_updates": 2},
            **{"critic_pictures": "shared", "anchor": 0.5, "anchor_every": 2},
        },
        "dmd2": {
            **{"warm_start": 1, "critic_warm_up": 1, "critic_updates": 1, "head_updates": 2, "gan_start": 0.3},
            **{"gan_ramp": 0.0, "gan_weight": 1.0},
        },
        "f-distill": {
            **{"warm_start": 1, "critic_warm_up": 1, "critic_updates": 1, "gan_start": 0.0, "gan_weight": 1.0},
            **{"divergence": "kl", "head_learning_rate": 1e-2},
        },
        "uni-instruct": {"warm_start": 1, "critic_warm_up": 1, "gan_weight": 0.0, "head_learning_rate": 1e-2},
        "ladd": {"warm_start": 1, "head_warm_up": 1, "head_updates": 2, "head_blocks": 2},
        "agd": {"states": 2, "optimizer": "muon"},
        "guidance-lora": {"states": 2},
        "nct": {"control": "soft-edges", "control_width": 8, "noise_levels": 4},
        "sun": {"negatives": "people, blurry", "segment_steps": 2},
    }
    return small(method=method, steps=3, save_every=1, guidance=3.0, **quiet, **theirs[method])


def run_until(method: str, folder: Path, deadly: int) -> Any:
    """A run that starts or goes on in ``folder``, killed at its ``deadly``-th event (0: never)."""

    def work() -> Any:
        from whole_runs import left, run

        clock, host = Clock(deadly), host_for(method)
        host.on_poll = lambda: clock.tick("a poll")
        host.network.register_forward_hook(lambda *args: clock.tick("a forward"))
        first: list[int] = []
        watch(clock, folder)
        settings = settings_for(method)
        run(
            folder,
            settings,
            host=host,
            report=lambda now: now.preparing or first.append(now.update),
            existing="continue",
        )
        found = left(folder)
        # that a run was started anew is said in its notes, and is no part of what it learnt
        found["state"].pop("notes")
        return {"left": found, "events": clock.events, "updates": first}

    return forked(work)


def instants(events: list[tuple[str, str]], method: str, seed: int) -> list[int]:
    """Event numbers: those of the worst places first, the rest anywhere."""
    choose = random.Random(seed)
    chosen: set[int] = set()
    for kind, place, count in WORST[method == "dmd"]:
        there = [number for number, event in enumerate(events, 1) if event == [kind, place]]
        chosen |= set(choose.sample(there, count))
    others = [number for number in range(1, len(events) + 1) if number not in chosen]
    return sorted(chosen | set(choose.sample(others, KILLS[method] - len(chosen))))


def kill(base: Path, method: str) -> None:
    """One whole run of ``method``, then one for each kill."""
    whole = run_until(method, base / method / "whole" / "run", 0)
    print(json.dumps({"method": method, "left": whole["left"], "updates": whole["updates"]}), flush=True)
    for count, instant in enumerate(instants(whole["events"], method, seed=7)):
        folder = base / method / str(count) / "run"
        deaths = 0
        # every third run is killed once more while it goes on
        for deadly in (instant, *([3 + 5 * count] if count % 3 == 0 else []), 0):
            end = run_until(method, folder, deadly)
            deaths += end is None
            if end is not None:
                break
        record = {"method": method, "instant": instant, "event": whole["events"][instant - 1], "deaths": deaths}
        print(json.dumps({**record, "left": end["left"], "updates": end["updates"]}), flush=True)


def main() -> None:
    _load()
    import torch
    import torch._dynamo  # noqa: F401  (checkpointing reads its settings, and it takes seconds to load)
    from PIL import Image
    from whole_runs import run  # noqa: F401  (loaded before the forks)

    methods = sys.argv[1:] or list(KILLS)
    Image.init()
    for method in methods:
        host_for(method), settings_for(method)
    torch.set_num_threads(1)
    gc.freeze()  # else each fork's first collection copies every page of what was loaded
    # in memory where there is such a place: a kill loses nothing that was written, and syncing a disk takes its time
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as base:
        for method in methods:
            kill(Path(base), method)


if __name__ == "__main__":
    main()
