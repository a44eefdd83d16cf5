"""A run's directory: killed at any instant, it goes on from its last whole state.

config.json            what the run is; a run of another config is refused, but for what may be adjusted
state-N/               roles, optimisers and counters after N updates; whole once it holds `complete`
metrics.jsonl          the untrained student's measures, then one line an update
embeddings/ pairs/ anchors/ trajectories/ triples/ segments/   caches; deleting them costs time, nothing else
candidates/            students that the end chooses from, in bfloat16; choice.json, choice.png: which, and why
previews/              what the student is to draw above what it draws, same prompts and noise
result.safetensors     the LoRA; partial.safetensors where the run was cancelled
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...core.errors import OneStepError
from ...core.tensor_file import read_tensors, write_tensors
from ..settings import Settings, nearest
from . import candidates
from .files import CONTENT, content_of, in_gb, read_json, read_rows, room_at, write_bytes, write_json
from .lock import locked

CONTINUE, RESTART, STOP = "continue", "restart", "stop"
KEPT = 2
FREE = ("save_every", "licenses", "streaming", "candidate_every", "candidates", "choose_by", "combine")
"""Settings that change nothing of what is learnt: a run goes on with others."""
KINDS = ("pairs", "anchors", "trajectories", "triples", "segments")
"""Folders of what a teacher or a generator made."""
TEXTS = "embeddings"
Changes = dict[str, tuple[Any, Any]]
"""(there, now) of settings, by name."""


class NotSaved(OneStepError):
    """A state could not be written; the message says what is intact."""


class Run:
    """An open, locked run directory. Make one with :func:`opened`. changes: of its settings, with which it goes on."""

    def __init__(self, folder: Path, changes: Changes | None = None) -> None:
        self.folder, self.changes = folder, changes or {}

    def adjust(self) -> str:
        """The config tells the changes from here on. What they are, in words."""
        path = self.folder / "config.json"
        config = read_json(path)
        write_json(
            path, config | {"settings": config["settings"] | {name: new for name, (_, new) in self.changes.items()}}
        )
        return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in self.changes.items())

    def as_begun(self, settings: Settings) -> Settings:
        """``settings`` with what a run keeps from its beginning: one of before it was recorded has steps of first
        order."""
        return replace(settings, second_order=self.recorded("second_order") is True)

    def recorded(self, name: str) -> Any:
        """What the config tells under ``name``; None where it does not."""
        return read_json(self.folder / "config.json").get(name)

    def record(self, name: str, value: Any) -> None:
        """The config tells ``value`` from here on."""
        config = read_json(self.folder / "config.json")
        if config.get(name) != value:
            write_json(self.folder / "config.json", config | {name: value})

    # -- states -------------------------------------------------------------------------------------------------------

    def states(self) -> list[int]:
        """Updates after which a whole state was saved, oldest first."""
        found = [path for path in self.folder.glob("state-*") if (path / "complete").is_file()]
        numbers = (path.name.removeprefix("state-") for path in found)
        return sorted(int(number) for number in numbers if number.isdecimal())

    def save(self, update: int, tensors: dict[str, Tensor], notes: dict[str, Any], best: int | None) -> None:
        """Write the state after ``update`` whole in a temporary folder, sync, rename, mark; then drop what is old."""
        final, beside = self.folder / f"state-{update}", self.folder / f".state-{update}.part"
        try:
            shutil.rmtree(beside, ignore_errors=True)
            self._make_room(update, sum(value.nbytes for value in tensors.values()), best)
            beside.mkdir()
            write_tensors(beside / "state.safetensors", tensors)
            write_json(beside / "state.json", notes)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(beside, final)
            write_bytes(final / "complete", b"")
        except (OSError, OneStepError) as error:
            why = (getattr(error, "strerror", None) or str(error)).rstrip(".")
            raise NotSaved(
                f"state {update} could not be saved in {self.folder}: {why}. The last state is intact: once there is "
                "room, continue the run"
            ) from None
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        self._prune(best)

    def short_of_room(self, size: int, beside: int = 0) -> list[str]:
        """A note where the disk has no room for the states of ``size`` bytes that a run keeps, one more that is being
        written, and ``beside`` for what the teacher makes."""
        here = sum(path.stat().st_size for kind in (*KINDS, TEXTS) for path in (self.folder / kind).glob("*"))
        free, wanted = room_at(self.folder), (KEPT + 1) * size + max(0, beside - here)
        if free >= wanted:
            return []
        also = " and its teacher's data" if beside > here else ""
        return [f"little room on the disk: {in_gb(free)} are free, {in_gb(wanted)} are wanted for its states{also}"]

    def _make_room(self, update: int, size: int, best: int | None) -> None:
        """For a state of ``size`` bytes: where there is none, all others go but the newest and the best."""
        if room_at(self.folder) < size:
            self._drop([other for other in self.states() if other != update][:-1], best)
        free = room_at(self.folder)
        if free < size:
            raise OneStepError(f"it takes {in_gb(size)}, and {in_gb(free)} are free on the disk")

    def load_last(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The newest state that can be read; a damaged one is passed over."""
        for update in reversed(self.states()):
            try:
                return self.load(update)
            except OneStepError:
                continue
        raise OneStepError(f"no saved state in {self.folder} can be read: restart the run")

    def load(self, update: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and notes of the state after ``update``."""
        folder = self.folder / f"state-{update}"
        return read_tensors(folder / "state.safetensors"), read_json(folder / "state.json")

    def _prune(self, best: int | None) -> None:
        self._drop(self.states()[:-KEPT], best)

    def _drop(self, states: list[int], best: int | None) -> None:
        for update in states:
            if update != best:
                # unmarked first: half a deletion must not look like a state
                (self.folder / f"state-{update}" / "complete").unlink(missing_ok=True)
                shutil.rmtree(self.folder / f"state-{update}", ignore_errors=True)

    # -- metrics ------------------------------------------------------------------------------------------------------

    def log(self, line: dict[str, Any]) -> None:
        """Append a line. What is no number is written as null: NaN is not JSON, and browsers refuse it."""
        known = {key: value if _is_json(value) else None for key, value in line.items()}
        try:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(known) + "\n")
        except OSError as error:
            raise OneStepError(
                f"metrics.jsonl in {self.folder} could not be written: {error.strerror}. Free some space, then continue"
            ) from None

    def metrics(self) -> list[dict[str, Any]]:
        """Every whole line of metrics.jsonl."""
        return read_rows(self.folder / "metrics.jsonl")

    def forget_after(self, update: int) -> None:
        """Drop the metrics of updates that the state after ``update`` does not know."""
        kept = [line for line in self.metrics() if line["update"] <= update]
        write_bytes(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept).encode())
        candidates.forget_after(self.folder, update)


def leave(error: BaseException, save: Callable[[], None], write: Callable[[], Any]) -> None:
    """``save`` the state, if it is not that which failed with ``error``, and ``write`` what was learnt in any case.
    Raises what went wrong first, and nothing in place of an ``error`` that is a NotSaved already."""
    failed: OneStepError | None = None
    for attempt in [write] if isinstance(error, NotSaved) else [save, write]:
        try:
            attempt()
        except OneStepError as found:
            failed = failed or found
    if failed is not None and not isinstance(error, NotSaved):
        raise failed


@contextmanager
def opened(
    folder: Path, config: dict[str, Any], existing: str, adjustable: tuple[str, ...] = ()
) -> Iterator[tuple[Run, bool]]:
    """The run at ``folder`` and whether it goes on from a state; made where it is absent.

    existing: what to do with a run that is already there: "continue", "restart" (its files are deleted) or "stop".
    adjustable: settings, numbers, that may be others than the run's when it goes on; see `Run.adjust`.
    Raises OneStepError where another process holds it, where "stop" finds one, or where "continue" finds one of
    another config.
    """
    if existing not in (CONTINUE, RESTART, STOP):
        raise OneStepError(f"an existing run is to be {existing!r:.60}{nearest(existing, (CONTINUE, RESTART, STOP))}")
    changes = _check_existing(folder, config, existing, adjustable)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OneStepError(f"the run's folder {folder} cannot be made: {error.strerror}. Choose another one") from None
    with locked(folder / "run.lock"):
        if existing == RESTART and (folder / "config.json").is_file():
            _clear(folder)
        for leftover in folder.glob(".state-*.part"):
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in folder.rglob(".*.tmp"):  # of a file that was being written when the run was killed
            leftover.unlink(missing_ok=True)
        run = Run(folder, changes)
        goes_on = bool(run.states())
        if not goes_on:
            write_json(folder / "config.json", config)
        yield run, goes_on


def _check_existing(folder: Path, config: dict[str, Any], existing: str, adjustable: tuple[str, ...]) -> Changes:
    """The settings in which ``config`` is another than the run's that goes on with it."""
    known = folder / "config.json"
    if not known.is_file() or existing == RESTART:
        return {}
    if existing == STOP:
        raise OneStepError(f"a run is already in {folder}: continue it, restart it, or give another name")
    before = read_json(known)
    keys = [key for key in ("settings", "prompts", "base") if before.get(key) != config[key]]
    there, now = before.get("settings"), config["settings"]
    there = _as_known_now(there) | {name: now[name] for name in FREE} if isinstance(there, dict) else {}
    changes = {name: (there.get(name), value) for name, value in now.items() if there.get(name) != value}
    adjusted = {name: pair for name, pair in changes.items() if name in adjustable and isinstance(pair[0], int)}
    if there | {name: new for name, (_, new) in adjusted.items()} == now:
        keys = [key for key in keys if key != "settings"]
    if keys:
        other = {name: pair for name, pair in changes.items() if there and name not in adjusted}
        raise OneStepError(f"the run in {folder} has other {_in_words(keys, other)}: restart it, or give another name")
    if before.get("recipe", config.get("recipe")) != config.get("recipe"):
        raise OneStepError(
            f"the run in {folder} draws by another recipe: where its initial LoRA has none in its header, the file's "
            "name decides. Give it the name that it had, restart the run, or give another name"
        )
    return adjusted


def _as_known_now(settings: dict[str, Any]) -> dict[str, Any]:
    """A run's settings; of an earlier version's, the initial LoRA by its content, where it still lies in its place."""
    path = settings.get("initial_lora")
    if isinstance(path, str) and path and not path.startswith(CONTENT) and Path(path).is_file():
        return settings | {"initial_lora": content_of(path)}
    return settings


def _in_words(keys: list[str], changes: Changes) -> str:
    if keys != ["settings"] or not changes:
        return " and ".join(keys)
    shown = {name: ["none" if value in ("", None) else value for value in pair] for name, pair in changes.items()}
    return "settings, " + ", ".join([f"{name} ({old} there, {new} now)" for name, (old, new) in shown.items()][:3])


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _clear(folder: Path) -> None:
    """Delete what a run made; its config last, so that a clearing that was killed is known and done again. Embeddings
    stay: they are named by what they are of."""
    made = (folder / name for name in ("previews", candidates.FOLDER, *KINDS))
    for path in [*folder.glob("state-[0-9]*"), *made]:
        (path / "complete").unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    for name in (
        "metrics.jsonl",
        "result*.safetensors",
        "partial*.safetensors",
        "reference.*",
        "choice.*",
        "config.json",
    ):
        for path in folder.glob(name):
            path.unlink(missing_ok=True)
