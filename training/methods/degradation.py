"""The way from the teacher to the untrained student, as snapshots of the critic's factors on it, and back (DisBack,
arXiv:2408.15991)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...core.errors import OneStepError
from ...core.factors import named
from ...core.roles import TEACHER, Roles
from ...core.tensor_file import read_tensors, write_tensors
from ..engine import processes
from ..engine.batch import Batch
from ..engine.student import STUDENT
from ..engine.turns import Loss, Plan, Turn
from .distribution_matching import CRITIC

DEGRADED = "degraded teacher"
"""The role that holds one snapshot: the base, on the way to what the untrained student draws."""


@dataclass
class Degradation:
    """Snapshots 1 .. count of the critic while it learns alone the pictures of a student that stands still, the last
    the nearest to them; kept in ``folder``, one at a time in memory.

    first, updates: the first of the critic's own updates, and how many they are. steps, share: updates after these, in
    the first share of which the teacher goes back from the last snapshot to the first; then it is the base. turns: an
    update's most.
    """

    roles: Roles
    folder: Path
    count: int
    first: int
    updates: int
    steps: int
    share: float
    turns: int
    _held: int = field(default=0, init=False)
    _taken: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.roles.copy(CRITIC, DEGRADED)
        for factor in self.roles.parameters(DEGRADED):
            factor.requires_grad_(False)

    # -- which snapshot, when -----------------------------------------------------------------------------------------

    def due(self, update: int) -> int:
        """The snapshot that the critic is as ``update`` begins, 0 for none: they lie evenly, the last at the end."""
        return next((n for n in range(1, self.count + 1) if update == self.first + n * self.updates // self.count), 0)

    def at(self, update: int) -> int:
        """The snapshot that is the teacher at ``update``; 0 is the base."""
        along = max(0, update - self.first - self.updates) / self.steps
        if teacher_at(along, self.share) == TEACHER:
            return 0
        return max(1, self.count - int(along / self.share * self.count))

    # -- their files --------------------------------------------------------------------------------------------------

    def record(self, batch: Batch, update: int) -> None:
        """Called before each turn of the critic: keeps it where a snapshot is due and nothing of the update is learnt
        yet. A run that goes on from before writes the same again."""
        number, first_turn = self.due(update), batch.step % self.turns == 0
        if not number or not first_turn or self._taken == number or batch.device.type == "meta":
            return
        self._taken = number
        if processes.is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_tensors(self._path(number), named(self.roles.state(CRITIC)))

    @torch.no_grad()
    def hold(self, number: int) -> None:
        """The role becomes snapshot ``number``. Raises OneStepError where its file is gone."""
        factors = named(self.roles.state(DEGRADED))
        if number in (0, self._held) or any(value.is_meta for value in factors.values()):
            return
        path = self._path(number)
        if not path.is_file():
            raise OneStepError(
                f"the critic's snapshot {path} is gone, which the run goes back by: put it back, or begin the run anew "
                "(existing=restart)"
            )
        kept = read_tensors(path)
        for name, value in factors.items():
            value.copy_(kept[name])
        self._held = number

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:03d}.safetensors"

    # -- the turns of a run -------------------------------------------------------------------------------------------

    def along(self, plan: Plan) -> Plan:
        """``plan``, whose critic is recorded in each phase and whose student, in the last, has its teacher ready."""
        last = plan.phases[-1]
        loss = {turn.role: turn.loss for turn in last.turns}
        critic, student = self._recorded(loss[CRITIC]), self._led(loss[STUDENT])

        def changed(turn: Turn, matching: bool) -> Turn:
            if turn.role == CRITIC:
                return replace(turn, loss=critic)
            return replace(turn, loss=student) if matching and turn.role == STUDENT else turn

        return Plan(
            plan.roles,
            [replace(phase, turns=[changed(turn, phase is last) for turn in phase.turns]) for phase in plan.phases],
        )

    def _recorded(self, loss: Loss) -> Loss:
        def learn(batch: Batch, share: float, update: int) -> Mapping[str, Any]:
            self.record(batch, update)
            return loss(batch, share, update)

        return learn

    def _led(self, loss: Loss) -> Loss:
        def match(batch: Batch, share: float, update: int) -> Mapping[str, Any]:
            self.hold(self.at(update))
            return loss(batch, share, update)

        return match


def teacher_at(along: float, share: float) -> str:
    """Who answers as the teacher at ``along`` of the matching, in the first ``share`` of which it goes back."""
    return DEGRADED if along < share else TEACHER
