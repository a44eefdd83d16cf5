r"""LCSC (arXiv:2404.02241): a sum of the students that a run has kept may be better than any of them.

    W = W_0 + sum_k w_k B_k A_k,   sum_k w_k = 1

The sum is exact as factors laid side by side, of as many times the rank; of it the run's own rank is kept, by SVD. The
weights are found by evolution on the watch's measure. What is found on some prompts and noise is better on these by
luck as well: it becomes the result only where it is better on others too, which the search has never seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.errors import OneStepError
from ...core.factors import truncated
from ...core.memory import OutOfMemory, notice
from ...core.roles import Roles
from ..engine.prompts import Tick, silent
from ..runs import candidates
from ..runs.files import read_json, write_json
from ..runs.state import learnt
from ..settings import CHOICES, LAST, Settings
from .choice import Choice, chosen
from .evolution import Weights, own, search
from .measures import Watch
from .monitor import Monitor

FILE, HEADER = "combination.json", "onestep.combined"
MOST = 6
"""Students of a sum: each has its weight to be found."""
Student = Mapping[str, Tensor]
"""What a student has learnt, by name (`runs.state.learnt`)."""


# -- the sum ----------------------------------------------------------------------------------------------------------


def combined(students: Sequence[Student], weights: Weights, pairs: set[str]) -> tuple[dict[str, Tensor], float]:
    """The sum of ``students``, and the share of its squared size that the rank could not hold. pairs: names of factors
    without their /a and /b; all else is summed as it is."""
    used = [(student, w) for student, w in zip(students, weights, strict=True) if w]
    if len(used) == 1 and used[0][1] == 1:
        return dict(used[0][0]), 0.0
    found, left, size = {}, 0.0, 0.0
    for name in pairs:
        first = students[0][f"{name}/a"]
        a = torch.cat([student[f"{name}/a"].double() for student, _ in used])
        b = torch.cat([w * student[f"{name}/b"].double() for student, w in used], 1)
        (kept_a, kept_b), s = truncated(a, b, len(first))
        found[f"{name}/a"], found[f"{name}/b"] = _filled(kept_a, len(first), 0), _filled(kept_b, len(first), 1)
        left, size = left + float(s[len(first) :].square().sum()), size + float(s.square().sum())
    for name in students[0].keys() - found.keys():
        found[name] = sum(w * student[name].double() for student, w in used).to(students[0][name].dtype)  # type: ignore[union-attr]
    return found, left / size if size else 0.0


def _filled(factor: Tensor, rank: int, dim: int) -> Tensor:
    """``factor`` with zeros up to ``rank``."""
    shape = list(factor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim) if shape[dim] else factor


def pairs_of(roles: Roles, role: str) -> set[str]:
    """The names of the factors that ``role`` learns."""
    parts = [part for part in roles.steps.parts(role) if roles.learns(part)]
    return {f"{part}/{name}" for part in parts for name in roles.state(part)}


# -- the search -------------------------------------------------------------------------------------------------------


@contextmanager
def searched(monitor: Monitor, settings: Settings, update: int, tick: Tick = silent) -> Iterator[Choice]:
    """Within, the choice's role holds what becomes the result of a run that has done ``update``: what `chosen` takes,
    or a combination that is better than that."""
    with chosen(monitor, settings, update, tick) as choice, ExitStack() as stack:
        if settings.combine:
            try:
                choice = _searched(monitor, settings, choice, tick, stack)
            except OutOfMemory as error:
                notice(f"no combination was searched for: {error}")
        yield choice


def _searched(monitor: Monitor, settings: Settings, choice: Choice, tick: Tick, stack: ExitStack) -> Choice:
    watch, roles = monitor.watch, monitor.host.denoiser.roles
    if watch is None:
        notice("no combination was searched for: the run watches nothing. Set watch_every")
        return choice
    students, updates = _students(monitor, choice)
    if len(students) < 2:
        notice("no combination was searched for: the run has kept no students beside its result. Set candidate_every")
        return choice
    measure = CHOICES[0] if settings.choose_by == LAST else settings.choose_by
    sums = Sums(monitor, students, updates, measure, pairs_of(roles, monitor.shown), settings, tick)
    ranked = search(sums.measured(watch), len(students), settings.combine, settings.seed)
    best, was = ranked[0], next(one for one in ranked if one[1] == own(len(students)))
    told: dict[str, Any] = {"by": measure, "of": updates, "weights": best[1], "value": best[0], "own": was[0]}
    told |= {"evaluations": settings.combine}
    if best is was:
        notice(f"no combination of {len(students)} students has a lower {measure} than the run's own result")
        sums.remember(told | {"taken": False})
        return choice
    held = monitor.held_out(tick)
    told["held_out"], told["held_out_own"] = (sums.value(held, weights) for weights in (best[1], was[1]))
    values, lost = combined(students, best[1], sums.pairs)
    told |= {"lost": lost, "taken": told["held_out"] < told["held_out_own"]}
    sums.remember(told)
    note = _said(told)
    if not told["taken"]:
        notice(note)
        return choice
    stack.enter_context(candidates.in_place_of(roles, monitor.shown, values))
    header = choice.told | {HEADER: json.dumps(told)}
    return Choice(monitor.shown, choice.update, header, note, monitor.preview_of("combined"))


def _said(told: dict[str, Any]) -> str:
    by, kept = told["by"], 100 * (1 - told["lost"])
    both = f"{by} {told['value']:.4f} where it was searched, {told['held_out']:.4f} on what the search has not seen"
    alone = f"{told['own']:.4f} and {told['held_out_own']:.4f}"
    if not told["taken"]:
        return f"the run's own result stays: a combination has {both}; alone it has {alone}, which is no worse"
    which = ", ".join(f"{update}" for update in told["of"])
    return (
        f"a combination of the students after updates {which} is the result: {both}; alone the run's own has {alone}. "
        f"The run's rank holds {kept:.2f} % of the sum"
    )


def _students(monitor: Monitor, choice: Choice) -> tuple[list[Student], list[int]]:
    """What would be the result, first, and kept students spread over the run, with their updates."""
    roles, shown = monitor.host.denoiser.roles, monitor.shown
    of_choice = learnt(roles, choice.role)
    first = {shown + name.removeprefix(choice.role): value.to("cpu", copy=True) for name, value in of_choice.items()}
    files = [(at, path) for at, path in candidates.kept(monitor.folder).items() if at != choice.update]
    chosen = torch.linspace(len(files) - 1, 0, min(MOST - 1, len(files))).round().long().tolist()
    students: list[Student] = [first]
    updates = [choice.update]
    for at, path in (files[index] for index in chosen):
        try:
            students.append(candidates.read(path, roles, shown))
            updates.append(at)
        except OneStepError as error:
            notice(f"the candidate after update {at} is left out: {error}")
    return students, updates


@dataclass
class Sums:
    """Measures of combinations; those of a search that was cut, or of the same one, are not drawn again."""

    monitor: Monitor
    students: Sequence[Student]
    updates: Sequence[int]
    measure: str
    pairs: set[str]
    settings: Settings
    tick: Tick = silent
    _known: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._known = self._read()

    def measured(self, watch: Watch) -> Any:
        """(weights) -> the measure on ``watch``, for a search."""
        done = iter(range(1, self.settings.combine + 1))

        def measure(weights: Weights) -> float:
            key = repr(weights)
            if key not in self._known:
                self._known[key] = self.value(watch, weights)
                self.remember(None)
            self.tick("searching for a combination", next(done), self.settings.combine)
            return self._known[key]

        return measure

    def value(self, watch: Watch, weights: Weights) -> float:
        """The measure on ``watch`` of the sum as a file would have it."""
        monitor = self.monitor
        values, _ = combined(self.students, weights, self.pairs)
        with candidates.in_place_of(monitor.host.denoiser.roles, monitor.shown, values):
            latents = watch.student(monitor.host, monitor.recipe, monitor.shown)
        return watch.measured(monitor.host, latents)[self.measure]

    # -- what is left of it -------------------------------------------------------------------------------------------

    @property
    def _path(self) -> Path:
        return self.monitor.folder / FILE

    def _of(self) -> str:
        """By what the students hold, and the measure."""
        sha = hashlib.sha256(self.measure.encode())
        for student in self.students:
            for name in sorted(student):
                sha.update(name.encode() + student[name].float().cpu().numpy().tobytes())
        return sha.hexdigest()[:16]

    def _read(self) -> dict[str, float]:
        self._key = self._of()
        try:
            there = read_json(self._path)
            same = there["key"] == self._key
            return (
                {str(key): float("nan") if v is None else float(v) for key, v in there["measured"].items()}
                if same
                else {}
            )
        except (OneStepError, KeyError, TypeError, AttributeError, ValueError):
            return {}

    def remember(self, told: dict[str, Any] | None) -> None:
        """Write what was measured so far, and what came of it."""
        measured = {key: value if value == value else None for key, value in self._known.items()}
        write_json(self._path, {"key": self._key, "result": told, "measured": measured})
