"""Two updates of both roles on a small U-Net, its base stored in each way, beside the same in float32 on the CPU.

Both have the same weights: the reference's are what the stored ones are read as. Compared are the gradients that the
optimisers are given, by their cosine and the ratio of their norms: AdamW's first step keeps little but their signs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from part import Case, Run, Table, table_of
from random_host import STORED, RandomHost, host_of, weight_of
from torch import Tensor
from updates import direct, trainer_of

LEAST = {"float32": 0.9999, "bfloat16": 0.97, "float8": 0.97, "nf4": 0.97}
"""Cosine of a gradient with the reference's, that is right. What half precision leaves of a matching term, a difference
of two predictions that are nearly equal, is less."""
UPDATES = 2


def measure(run: Run) -> Table:
    columns = ("base", *(f"{role}, step {step}" for step in (1, 2) for role in ("critic", "student")), "norms", "state")
    cases = [Case(stored, partial(compared, run, stored), 10) for stored in STORED]
    found = table_of(
        run, columns, cases, "Cosines with float32 on the CPU; the ratio of norms that is farthest from 1."
    )
    found.good &= all(row[-1] == "right" for row in found.rows)
    return found


def compared(run: Run, stored: str) -> Sequence[Any]:
    name = "tiny" if run.tiny else "small"
    host = host_of(name, run.device, stored)
    ours, right = gradients(host), gradients(reference(host, name))
    cosines = [cosine(*pair) for pair in zip(ours, right, strict=True)]
    ratios = [float(mine.norm() / other.norm()) for mine, other in zip(ours, right, strict=True)]
    ratio = max(ratios, key=lambda value: abs(value - 1))
    good = min(cosines) >= LEAST[stored] and 0.8 <= ratio <= 1.25
    return *cosines, ratio, "right" if good else "WRONG"


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def reference(host: RandomHost, name: str) -> RandomHost:
    """In float32 on the CPU, with the weights that ``host`` computes with."""
    plain = host_of(name, torch.device("cpu"), "float32")
    for name, layer in plain.network.named_modules():
        twin = host.network.get_submodule(name)
        for own, value in layer.named_parameters(recurse=False):
            is_weight = own == "weight"
            value.data.copy_(weight_of(twin) if is_weight else getattr(twin, own).detach().float().cpu())
    return plain


def gradients(host: RandomHost) -> list[Tensor]:
    """Critic's and student's of each update, each in one vector on the CPU, in float64."""
    found: list[Tensor] = []

    def note(optimizer: Any, *rest: Any) -> None:
        values = [p.grad for group in optimizer.param_groups for p in group["params"]]
        found.append(torch.cat([value.detach().double().cpu().flatten() for value in values]))

    settings = direct(sizes="32x32", rank=8, batch=2, critic_updates=1, optimizer="adamw")
    with trainer_of(host, settings) as trainer:
        for optimizer in trainer.optimizers.values():
            optimizer.register_step_pre_hook(note)
        for update in range(UPDATES):
            trainer.step(update)
    return found
