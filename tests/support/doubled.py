"""The small host in float64, with its student and critic: a network whose Jacobian differs from place to place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from oracles import ExactBatch
from small_host import SmallHost, setup_of, small

from onestep.core.checkpoint import checkpoint_blocks
from onestep.core.roles import TEACHER
from onestep.training.engine.setup import Setup
from onestep.training.engine.student import STUDENT, add_student
from onestep.training.methods import METHODS
from onestep.training.methods.alternating import Turns

PREDICTIONS = ["epsilon", "v_prediction", "flow"]
SIGMA, ALPHA = 0.6, {"epsilon": 0.8, "v_prediction": 0.8, "flow": 0.4}
"""One level, and alpha there, written without our schedules."""


class Doubled:
    """A run's setup, its plan made and all factors drawn anew away from B = 0."""

    def __init__(self, folder: Path, prediction: str, **settings: Any) -> None:
        self.host = SmallHost(prediction)
        self.setup: Setup = setup_of(self.host, small(**settings), folder)
        add_student(self.host, self.setup.settings, None)
        self.plan = METHODS[self.setup.settings.method].plan(self.setup)
        self.host.network.double()
        # numbers as large as a trained network's differ with its input
        for weight in self.host.network.parameters():
            weight.detach().mul_(2.0)
        self.roles, self.denoise = self.host.denoiser.roles, self.host.denoiser
        draw = torch.Generator().manual_seed(5)
        parts = self.roles.steps.parts("critic") if "critic" in self.plan.roles else ()
        for role in ("student", *parts):
            self.roles._factors[role] = {
                name: tuple(f.detach().double().requires_grad_() for f in pair)  # type: ignore[misc]
                for name, pair in self.roles._factors[role].items()
            }
            for _, b in self.roles.state(role).values():
                b.copy_(0.3 * torch.randn(b.shape, generator=draw))

        head = getattr(self.turns, "head", None)
        if head is not None:
            head.discriminator.head.double()

    @contextmanager
    def hooked(self, checkpointing: bool) -> Iterator[None]:
        with self.roles.installed():
            if not checkpointing:
                yield
                return
            with checkpoint_blocks(self.host.blocks, self.roles):
                yield

    @property
    def turns(self) -> Turns:
        """Of the matching."""
        found: Turns = self.plan.phases[-1].turns[-1].loss.__self__  # type: ignore[attr-defined]
        return found

    def batch(self, step: int = 3, **changes: Any) -> ExactBatch:
        """Of four samples."""
        return ExactBatch(**{**vars(self.setup.prompts.batch(step, range(4))), **changes})

    def pictures(self) -> torch.Tensor:
        """[4, 2, 4, 4]."""
        return torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(11), dtype=torch.float64)

    def answer(self, role: str, x_s: torch.Tensor, sigma: torch.Tensor, cond: Any) -> torch.Tensor:
        """Within whatever graph is made; the factors get none."""
        with self.roles.use(role, train=role == STUDENT):
            return self.denoise(x_s, sigma, cond)

    def guided(self, role: str, k: float, x_s: torch.Tensor, sigma: torch.Tensor, batch: ExactBatch) -> torch.Tensor:
        """D_u + k (D_c - D_u)."""
        assert role in (TEACHER, "critic")
        d_c, d_u = (self.answer(role, x_s, sigma, cond) for cond in (batch.cond, batch.nulls()))
        return d_u + k * (d_c - d_u)
