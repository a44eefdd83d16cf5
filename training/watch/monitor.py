"""What a run sees of its student as it learns: the watch's measures, whether they still fall, and previews."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from ...core.controls import visible
from ...core.recipe import Recipe
from ...core.tensor_file import read_tensors, write_tensors
from ..engine.prompts import Prompts
from ..engine.student import STUDENT
from ..engine.trainer import EMA, Numbers
from ..host import Host
from ..settings import Settings
from .measures import EACH, Referee, Watch, by_teacher
from .previews import write_grid


class Looks:
    """The student beside the teacher, on the same prompts and noise, as often as the settings ask.

    referee: makes what the student is compared with, of the run's prompts. shown: the role that is looked at.
    watch: None where the settings ask for nothing. best: the least distance to the
    teacher so far, and the updates after which it was found; 0 updates are the untrained student.
    """

    def __init__(
        self, host: Host, settings: Settings, recipe: Recipe, folder: Path, referee: Referee = by_teacher
    ) -> None:
        self.host, self.settings, self.recipe, self.folder = host, settings, recipe, folder
        self.referee = referee
        self.shown = EMA if settings.ema else STUDENT
        self.watch: Watch | None = None
        self.best: dict[str, float] | None = None

    def prepare(self, prompts: Prompts) -> None:
        """Have the teacher's pictures: made once in a run, and kept."""
        if not (self.settings.watch_every or self.settings.preview_every):
            return
        path = self.folder / "reference.safetensors"
        kept = read_tensors(path) if path.is_file() else None
        reference = self.referee(self.host, self.settings, prompts, self.folder)
        if reference.negatives is not None and kept is not None and "plain" not in kept:
            kept = None  # of an earlier version, which was not told its negatives
        self.watch = Watch.prepare(self.host, self.settings, prompts, kept, reference)
        if kept is None:
            write_tensors(path, self.watch.kept)

    def __call__(self, update: int, last: bool) -> tuple[Numbers, Path | None]:
        """Measures and preview after ``update`` updates, where they are due: before the first and after the last too.

        Without measures the numbers are empty; without a preview its path is None.
        """
        if self.watch is None:
            return {}, None
        measured = _due(self.settings.watch_every, update, last)
        drawn = _due(self.settings.preview_every, update, last)
        return self._measure(self.watch, update) if measured else {}, self._draw(self.watch, update) if drawn else None

    def last_preview(self, update: int) -> Path | None:
        """The preview after ``update``, the run's last one: drawn here where the run was finished between two."""
        if self.watch is None or not self.settings.preview_every:
            return None
        path = self._path(update)
        return path if path.is_file() else self._draw(self.watch, update)

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
        return min((EMA, STUDENT), key=lambda role: distances[role])

    def _measure(self, watch: Watch, update: int) -> Numbers:
        measured = watch(self.host, self.recipe, self.shown)
        return measured | {"no_gain": self.gain(update, measured["distance"])}

    def _draw(self, watch: Watch, update: int) -> Path:
        rows = torch.arange(0, len(watch.noise), min(EACH, len(watch.noise)))[: self.settings.preview_samples]
        student = watch.student(self.host, self.recipe, self.shown)
        path = self._path(update)
        write_grid(path, [*self._beside(watch, rows), self.host.decode(student[rows])])
        return path

    def _beside(self, watch: Watch, rows: Tensor) -> list[Tensor]:
        """What is shown above the student: the teacher; its controls, and what it draws without them; or what it draws
        without its negatives, and what it is to draw with them."""
        teacher = [] if watch.control else [self.host.decode(watch.teacher[rows])]
        control = [visible(watch.kept["control"][rows])] if watch.control else []
        plain = [self.host.decode(watch.kept["plain"][rows])] if "plain" in watch.kept else []
        return [*control, *plain, *teacher]

    def _path(self, update: int) -> Path:
        return self.folder / "previews" / f"{update:06d}.png"


def _due(every: int, update: int, last: bool) -> bool:
    return bool(every) and (last or update % every == 0)
