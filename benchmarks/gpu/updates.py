"""A run's updates on a host with random weights: the real trainer, without a run's folder, watch or previews."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from onestep.training.engine.prompts import embed
from onestep.training.engine.setup import Setup, hooked
from onestep.training.engine.student import STUDENT, add_student
from onestep.training.engine.trainer import EMA, Trainer
from onestep.training.methods import METHODS, settings_for
from onestep.training.plan.rungs import Way
from onestep.training.settings import Settings

PROMPTS = ["a lighthouse in a storm", "a red bicycle"]
DIRECT: dict[str, Any] = {"warm_start": 0, "critic_warm_up": 0, "teacher_steps": 1}
DIRECT |= {"watch_every": 0, "preview_every": 0}
"""Matching from the first update, with teacher's pictures of one step: what is measured is an update."""


def direct(**values: Any) -> Settings:
    """Settings of a `dmd` run that begins with its matching; as many pairs as a batch."""
    values = DIRECT | {"steps": 100} | values
    return settings_for("dmd", **values | {"pairs": values.get("batch", 4)})


@contextmanager
def trainer_of(host: Any, settings: Settings, way: Way | None = None) -> Iterator[Trainer]:
    """Within, the trainer of a run on ``host``. way: how it lies there; by default whole, all its blocks computed
    again."""
    method, way = METHODS[settings.method], way or Way(settings.batch)
    with TemporaryDirectory() as folder:
        prompts = embed(host, PROMPTS, settings, Path(folder))
        setup = Setup(host, settings, prompts, Path(folder), method.recipe(host, settings))
        with host.training(), hooked(host, way.recompute) as checkpoints:
            add_student(host, settings, None)
            host.denoiser.roles.copy(STUDENT, EMA, torch.device("cpu") if way.mean_on_host else host.device)
            trainer = Trainer(host, settings, setup.recipe, prompts, method.plan(setup))
            # roles are asked one after the other, as in every run that was planned
            trainer.checkpoints, trainer.sliced = checkpoints, True
            trainer.moments_on_host = way.moments_on_host
            trainer.accumulation = -(-settings.batch // way.micro)
            try:
                yield trainer
            finally:
                for role in host.denoiser.roles.names():
                    host.denoiser.roles.drop(role)
