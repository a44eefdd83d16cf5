"""The student as it was where a stage of the run began, in a role of its own: the teacher of that stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...core.errors import OneStepError
from ...core.factors import named
from ...core.roles import Roles
from ...core.tensor_file import read_tensors, write_tensors
from ..engine import processes
from ..engine.batch import Batch
from ..engine.student import STUDENT

EARLIER = "earlier student"


@dataclass
class EarlierStudent:
    """Kept in ``folder``, one file a stage, so that a run that goes on has the same. firsts: the first update of each
    stage; in the first of them the teacher is the base."""

    roles: Roles
    folder: Path
    firsts: list[int]
    _held: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.roles.copy(STUDENT, EARLIER)
        for factor in self.roles.parameters(EARLIER):
            factor.requires_grad_(False)

    def stage(self, update: int) -> int:
        """Of ``update``."""
        return max(stage for stage, first in enumerate(self.firsts) if update >= first)

    @torch.no_grad()
    def hold(self, batch: Batch, update: int) -> None:
        """The role becomes what the student was as the stage of ``update`` began. Raises OneStepError where its file is
        gone."""
        stage = self.stage(update)
        if stage == self._held or batch.device.type == "meta":
            return
        path = self.folder / f"{stage:03d}.safetensors"
        if update == self.firsts[stage] and processes.is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_tensors(path, named(self.roles.state(STUDENT)))
        if update == self.firsts[stage]:
            processes.wait()
        if not path.is_file():
            raise OneStepError(
                f"the student of an earlier stage, {path}, is gone, from which this stage learns: put it back, or "
                "begin the run anew (existing=restart)"
            )
        kept = read_tensors(path)
        for name, value in named(self.roles.state(EARLIER)).items():
            value.copy_(kept[name])
        self._held = stage
