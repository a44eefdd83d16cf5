"""Which of a run's students becomes its result: the last, or the best of those that were kept, by a measure of the
watch on its fixed prompts and noise; and a picture of all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...core.errors import OneStepError
from ...core.memory import OutOfMemory, attempt, notice
from ..engine.prompts import Tick, silent
from ..engine.student import STUDENT
from ..engine.turns import Numbers
from ..runs import candidates
from ..runs.files import content_of, read_json, write_json
from ..settings import LAST, Settings
from .measures import EACH, Watch
from .monitor import Monitor
from .previews import write_labelled

FILE, PICTURE, HEADER = "choice.json", "choice.png", "onestep.chosen"
SIDE = 256
"""Pixels of a picture in the grid, at most."""


@dataclass(frozen=True)
class Student:
    """One that may be the result. role: that holds it, once what ``path`` keeps is in its place; without a path it is
    what the run ends with. key: of its measures, in the choice that a run remembers."""

    update: int
    role: str
    key: str
    path: Path | None = None
    numbers: Numbers = field(default_factory=dict)
    pictures: Tensor | None = None

    @property
    def title(self) -> str:
        return f"update {self.update:,}" + (f", {self.role}" if self.path is None else "")


@dataclass(frozen=True)
class Choice:
    """role, update: of what goes into the file. told: for its header. note: why it is this one, in words; "" where
    nothing was chosen. preview: of it, where it is none of the run's own."""

    role: str
    update: int
    told: dict[str, str] = field(default_factory=dict)
    note: str = ""
    preview: Path | None = None


def ranked(students: list[Student], measure: str) -> list[Student]:
    """The best first: the least ``measure`` that is a number, then the later one."""

    def place(student: Student) -> tuple[bool, float, int]:
        value = student.numbers.get(measure, math.nan)
        return not math.isfinite(value), value if math.isfinite(value) else 0.0, -student.update

    return sorted(students, key=place)


@contextmanager
def chosen(monitor: Monitor, settings: Settings, update: int, tick: Tick = silent) -> Iterator[Choice]:
    """Within, the choice's role holds what becomes the result of a run that has done ``update``."""
    watch = monitor.watch
    if settings.choose_by == LAST or watch is None:
        yield Choice(monitor.better(), update)
        return
    with ExitStack() as stack:
        try:
            choice = _choice(monitor, watch, settings, update, tick, stack)
        except OutOfMemory as error:
            notice(f"nothing was chosen, the result is the last student: {error}")
            choice = Choice(monitor.shown, update)
        yield choice


def _choice(monitor: Monitor, watch: Watch, settings: Settings, update: int, tick: Tick, stack: ExitStack) -> Choice:
    students = _measured(monitor, watch, settings.choose_by, update, tick)
    best, *others = order = ranked(students, settings.choose_by)
    _draw(monitor, watch, order, settings.choose_by)
    _remember(monitor.folder, order, settings.choose_by)
    if not others:
        return Choice(best.role, update)
    last = min((student for student in order if student.path is None), key=order.index)
    if best.path is None:
        return Choice(best.role, update, _told(order, settings.choose_by, last), _why(order, settings.choose_by, last))
    values = candidates.read(best.path, monitor.host.denoiser.roles, best.role)
    stack.enter_context(candidates.in_place_of(monitor.host.denoiser.roles, best.role, values))
    told, why = _told(order, settings.choose_by, last), _why(order, settings.choose_by, last)
    return Choice(best.role, best.update, told, why, monitor.preview_of("chosen"))


# -- measures ---------------------------------------------------------------------------------------------------------


def _students(monitor: Monitor, update: int) -> list[Student]:
    """What the run ends with, and what it has kept from before."""
    ends = dict.fromkeys((monitor.shown, STUDENT))
    last = [Student(update, role, f"{update} {role}") for role in ends]
    files = {at: path for at, path in candidates.kept(monitor.folder).items() if at < update}
    try:
        return [*(Student(at, monitor.shown, content_of(path), path) for at, path in files.items()), *last]
    except OSError as error:
        notice(f"the kept candidates cannot be read ({error.strerror}): the last student alone can be the result")
        return last


def _measured(monitor: Monitor, watch: Watch, measure: str, update: int, tick: Tick) -> list[Student]:
    """The students with their measures: what the run remembers of an earlier choice is not drawn again. One whose file
    cannot be read is left out, with a word."""
    known, found = _remembered(monitor.folder, measure), []
    students = _students(monitor, update)
    complete = all(student.key in known for student in students) and (monitor.folder / PICTURE).is_file()
    for done, student in enumerate(students, 1):
        if complete:
            found.append(_with(student, known[student.key], None))
        else:
            try:
                found.append(_drawn(monitor, watch, student))
            except OutOfMemory:
                raise
            except OneStepError as error:
                notice(f"the candidate after update {student.update} is left out: {error}")
        tick("choosing among the students", done, len(students))
    return found


def _with(student: Student, numbers: Numbers, pictures: Tensor | None) -> Student:
    return Student(student.update, student.role, student.key, student.path, numbers, pictures)


def _drawn(monitor: Monitor, watch: Watch, student: Student) -> Student:
    roles, host, recipe = monitor.host.denoiser.roles, monitor.host, monitor.recipe
    with ExitStack() as stack:
        if student.path is not None:
            values = candidates.read(student.path, roles, student.role)
            stack.enter_context(candidates.in_place_of(roles, student.role, values))
        latents = watch.student(host, recipe, student.role)
    pictures, _ = attempt(lambda: _small(host.decode(latents[_rows(monitor, watch)])))
    return _with(student, watch.measured(host, latents), pictures)


# -- what is left of it -----------------------------------------------------------------------------------------------


def _rows(monitor: Monitor, watch: Watch) -> Tensor:
    """One picture of each of the first prompts."""
    every = min(EACH, len(watch.noise))
    return torch.arange(0, len(watch.noise), every)[: monitor.settings.preview_samples]


def _small(pictures: Tensor) -> Tensor:
    """[N, 3, H, W], no larger than the grid shows them: a run may have many."""
    share = SIDE / max(pictures.shape[-2:])
    return interpolate(pictures, scale_factor=share, mode="area") if share < 1 else pictures


def _draw(monitor: Monitor, watch: Watch, order: list[Student], measure: str) -> None:
    """The grid: what the students are to draw, then their pictures, the best first; where there is memory for it."""
    rows = [(f"{at}. {one.title}\n{measure} {one.numbers[measure]:.4f}", one) for at, one in enumerate(order, 1)]
    shown = [(title, one.pictures) for title, one in rows if one.pictures is not None]
    if not shown:
        return
    above, _ = attempt(lambda: watch.reference.above(monitor.host, watch.latents, _rows(monitor, watch)))
    targets = [("", _small(row)) for row in above or []]
    if targets:
        targets[-1] = ("to be drawn", targets[-1][1])
    write_labelled(monitor.folder / PICTURE, [*targets, *shown])


def _remember(folder: Path, order: list[Student], measure: str) -> None:
    lines = [
        {
            **{"update": one.update, "role": one.role, "file": one.path and one.path.name, "key": one.key},
            "numbers": {name: _json(value) for name, value in one.numbers.items()},
        }
        for one in order
    ]
    write_json(folder / FILE, {"by": measure, "students": lines})


def _remembered(folder: Path, measure: str) -> dict[str, Numbers]:
    """Measures by the students' keys; of a choice that cannot be read, or by a measure it has not, none."""
    try:
        lines = read_json(folder / FILE)["students"]
        known = {line["key"]: {name: _number(value) for name, value in line["numbers"].items()} for line in lines}
    except (OneStepError, KeyError, TypeError, AttributeError, ValueError):
        return {}
    return {key: numbers for key, numbers in known.items() if measure in numbers}


def _json(value: float) -> float | None:
    """NaN is not JSON."""
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _told(order: list[Student], measure: str, last: Student) -> dict[str, str]:
    best = order[0]
    facts = {
        **{"update": best.update, "of": last.update, "by": measure, "among": len(order)},
        **{"value": _json(best.numbers[measure]), "last": _json(last.numbers[measure])},
        "kept_as": "bfloat16" if best.path is not None else "float32",
    }
    return {HEADER: json.dumps(facts)}


def _why(order: list[Student], measure: str, last: Student) -> str:
    best = order[0]
    which = f"the student after update {best.update:,}" if best.path is not None else f"the last student ({best.role})"
    told = f"{which} is the result: {measure} {best.numbers[measure]:.4f}, the least of {len(order)}"
    return told + (f"; the last has {last.numbers[measure]:.4f}" if best.path else "") + f" ({PICTURE})"
