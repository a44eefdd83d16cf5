"""A trainer's whole state as named tensors and plain numbers, and back."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor

from ...core.roles import Roles
from ..engine import optimizer as adam
from ..engine.trainer import Trainer

COUNTERS = ("place", "numbers", "bad", "dropped", "taken", "recompute", "sliced", "accumulation", "moments_on_host")


def snapshot(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Roles, their adapter modules and optimisers as tensors; counters and the optimisers' plain numbers as notes.

    Factors that do not learn, an initial LoRA's under an adapter module, are left out: a run begins with them anew.
    """
    roles = trainer.host.denoiser.roles
    tensors: dict[str, Tensor] = {}
    for role in roles.names():
        tensors |= learnt(roles, role)
    numbers: dict[str, float] = {}
    for role, optimizer in trainer.optimizers.items():
        packed, plain = adam.pack(optimizer, role)
        tensors |= packed
        numbers |= plain
    counters = {name: copy(getattr(trainer, name)) for name in COUNTERS}
    return tensors, {"numbers": numbers, "counters": counters, "notes": trainer.notes}


def learnt(roles: Roles, role: str) -> dict[str, Tensor]:
    """What ``role`` has learnt, of each step where it has several, and its adapter module: the live tensors by name."""
    tensors: dict[str, Tensor] = {}
    for part in roles.steps.parts(role):
        for name, (a, b) in roles.state(part).items() if roles.learns(part) else ():
            tensors[f"{part}/{name}/a"], tensors[f"{part}/{name}/b"] = a, b
        tensors |= {f"{part}/{name}": value for name, value in roles.modules.state(part).items()}
    return tensors


def size_of(trainer: Trainer) -> int:
    """Bytes of a state once every optimiser has its moments, about: of AdamW, two of which are kept at most."""
    learnt = sum(value.nbytes for role in trainer.optimizers for value in trainer.host.denoiser.roles.parameters(role))
    return sum(value.nbytes for value in snapshot(trainer)[0].values()) + 2 * learnt


@torch.no_grad()
def restore(trainer: Trainer, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
    """Write a snapshot into the live factors and optimisers."""
    roles = trainer.host.denoiser.roles
    for role in roles.names():
        for name, value in learnt(roles, role).items():
            value.copy_(tensors[name])
    moments = {key: value for key, value in tensors.items() if "/" not in key}
    for role, optimizer in trainer.optimizers.items():
        adam.unpack(optimizer, role, moments, notes["numbers"])
    # of a state that does not count them; of a role that has a LoRA for each step, no tensor takes every step
    trainer.taken = {role: adam.steps_of(optimizer) for role, optimizer in trainer.optimizers.items()}
    for name, value in notes["counters"].items():
        setattr(trainer, name, copy(value))
    trainer.notes, trainer.whole = list(notes["notes"]), True
