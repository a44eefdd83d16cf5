"""What a run sees of its student as it learns: the watch's measures, whether they still fall, and previews."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from ...core.memory import attempt, notice
from ...core.tensor_file import read_tensors, write_tensors
from ..engine import processes
from ..engine.prompts import Tick, silent
from ..engine.setup import Setup
from ..engine.student import STUDENT
from ..engine.trainer import EMA
from ..engine.turns import Numbers
from ..runs import candidates
from .measures import EACH, Watch
from .previews import write_grid
from .reference import Reference, by_teacher


class Monitor:
    """The student beside what it is compared with, on the same prompts and noise, as often as the settings ask.

    shown: the role that is shown. watch: None where the settings ask for nothing. best: the least distance so far, and
    the updates after which it was found; 0 updates are the untrained student.
    """

    def __init__(self, setup: Setup) -> None:
        self.host, self.settings, self.recipe, self.folder = setup.host, setup.settings, setup.recipe, setup.folder
        self.shown = EMA if setup.settings.ema else STUDENT
        self.watch: Watch | None = None
        self.best: dict[str, float] | None = None
        self._prepared: Callable[[str, Tick, bool], Watch]

    def prepare(self, setup: Setup, reference: Callable[[Setup], Reference] = by_teacher, tick: Tick = silent) -> None:
        """Have the pictures that the student is compared with: made once in a run, and kept."""
        if not (self.settings.watch_every or self.settings.preview_every):
            return
        self._prepared = lambda name, tick, held_out: _kept_watch(setup, reference, self.folder / name, tick, held_out)
        self.watch = self._prepared("reference.safetensors", tick, False)

    def held_out(self, tick: Tick = silent) -> Watch:
        """As the watch, on prompts and noise that it has not: made where it is first asked for, and kept."""
        return self._prepared("held-out.safetensors", tick, True)

    def __call__(self, update: int, last: bool, learns: bool = True) -> tuple[Numbers, Path | None]:
        """Measures and preview after ``update`` updates, where they are due: before the first and after the last too.

        Without measures the numbers are empty; without a preview its path is None. learns: whether the student did, as
        in a critic's warm-up it does not: nothing is said of a gain then.
        """
        if self.watch is None:
            return {}, None
        measured = _due(self.settings.watch_every, update, last)
        drawn = _due(self.settings.preview_every, update, last)
        numbers = self._measure(self.watch, update) if measured else {}
        if not learns:
            numbers = {name: value for name, value in numbers.items() if name != "no_gain"}
        return numbers, self._draw(self.watch, update) if drawn else None

    def preview(self, update: int) -> Path | None:
        """The preview after ``update``, drawn here where none was due; None where the run watches nothing."""
        if self.watch is None:
            return None
        path = self._path(update)
        return path if path.is_file() else self._draw(self.watch, update)

    def keep(self, update: int) -> None:
        """Keep the student as a candidate, where one is due; nothing of one that nobody looks at."""
        if self.watch is not None:
            candidates.keep(self.folder, update, self.host.denoiser.roles, self.shown, self.settings)

    def preview_of(self, name: str) -> Path | None:
        """A preview under a name of its own of what the role that is shown holds now."""
        watch = self.watch
        return None if watch is None or not self.settings.preview_every else self._draw(watch, name)

    def gain(self, update: int, distance: float) -> float:
        """Updates since the distance last fell; one that is no number neither falls nor is ever the best."""
        if math.isfinite(distance) and (self.best is None or distance < self.best["distance"]):
            self.best = {"distance": distance, "update": float(update)}
        return update - (0.0 if self.best is None else self.best["update"])

    def better(self) -> str:
        """The role for the file: the running mean, unless the student itself is nearer to the teacher."""
        if not self.settings.ema or self.watch is None:
            return self.shown
        distances = {role: self.watch(self.host, self.recipe, role)["distance"] for role in (EMA, STUDENT)}
        # min takes NaN for the least where it comes first
        return min((EMA, STUDENT), key=lambda role: (math.isnan(distances[role]), distances[role]))

    def _measure(self, watch: Watch, update: int) -> Numbers:
        measured = watch(self.host, self.recipe, self.shown)
        return measured | {"no_gain": self.gain(update, measured["distance"])} | peak(self.host.device)

    def _draw(self, watch: Watch, update: int | str) -> Path | None:
        """None where there is no memory to decode it in: a run goes on without a picture of itself."""
        found, why = attempt(lambda: self._drawn(watch, update))
        if found is None:
            notice(f"out of memory: previews that could not be decoded are left out ({why})")
        return found

    def _drawn(self, watch: Watch, update: int | str) -> Path:
        rows = torch.arange(0, len(watch.noise), min(EACH, len(watch.noise)))[: self.settings.preview_samples]
        student = watch.student(self.host, self.recipe, self.shown)
        above = watch.reference.above(self.host, watch.latents, rows)
        write_grid(self._path(update), [*above, self.host.decode(student[rows])])
        return self._path(update)

    def _path(self, update: int | str) -> Path:
        """Of the preview after ``update``, or of that name."""
        return self.folder / "previews" / f"{update if isinstance(update, str) else f'{update:06d}'}.png"


def _kept_watch(setup: Setup, reference: Callable[[Setup], Reference], path: Path, tick: Tick, held_out: bool) -> Watch:
    """A watch whose pictures to compare with lie at ``path``, or will."""
    latents = read_tensors(path) if path.is_file() else None
    watch = Watch.prepare(setup, reference(setup), latents, tick, held_out=held_out)
    if latents is None:
        write_tensors(path, watch.latents)
    return watch


def peak(device: torch.device) -> Numbers:
    """Bytes of tensors that a card has held at once in this process; nothing of a CPU."""
    return {"peak_bytes": float(torch.cuda.max_memory_allocated(device))} if device.type == "cuda" else {}


def _due(every: int, update: int, last: bool) -> bool:
    return bool(every) and (last or update % every == 0)


class Unwatched(Monitor):
    """Of a process that is not the first: the first one watches."""

    def prepare(self, setup: Setup, reference: Callable[[Setup], Reference] = by_teacher, tick: Tick = silent) -> None:
        pass


def watching(setup: Setup) -> Monitor:
    """What sees the student of this process."""
    return Monitor(setup) if processes.is_first() else Unwatched(setup)
