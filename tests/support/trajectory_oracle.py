"""Trajectories in NumPy, written without our schedules, and a method's loss on the small checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from oracles import Array, World
from small_host import SmallHost, setup_of, small

from onestep.training.engine.student import STUDENT, add_student
from onestep.training.methods import METHODS
from onestep.training.settings import Settings, described


def ratios(world: World, sigma: Array) -> Array:
    """alpha [B, 1] of sigma [B, 1], written without our schedules."""
    return 1 - sigma if "flow" in world.case.name else np.sqrt(np.maximum(1 - sigma**2, 0))


def led(world: World, x: Array, x0: Array, sigma: Array, lower: Array) -> Array:
    """alpha' D + sigma' (x - alpha D) / sigma."""
    return ratios(world, lower) * x0 + lower * (x - ratios(world, sigma) * x0) / np.maximum(sigma, 1e-300)


def loss_of(name: str, folder: Path, prediction: str = "flow", number: str = "consistency", **changes: Any) -> float:
    """What the method calls ``number`` in its first update on the small checkpoint, whose student is not the base any
    more."""
    host = SmallHost(prediction)
    told = {"student_steps": 1, "distance": "l2", "solver_steps": 8}
    own = {entry.name for kind in (Settings, METHODS[name].settings) for entry in described(kind)}
    settings = small(method=name, **{key: value for key, value in told.items() if key in own} | changes)
    setup = setup_of(host, settings, folder / name)
    add_student(host, settings, None)
    with torch.no_grad():
        for _, b in host.denoiser.roles.state(STUDENT).values():
            b.copy_(0.1 * torch.randn(b.shape, generator=torch.Generator().manual_seed(b.numel())))
    loss = METHODS[name].plan(setup).phases[0].turns[0].loss
    with host.denoiser.roles.installed():
        return float(loss(setup.prompts.batch(0, range(4)), 1.0, 0)[number])
