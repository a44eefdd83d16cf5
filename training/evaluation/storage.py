"""A LoRA that was trained on a quantised base, on the base as it was before: how far the two are from each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ...core.errors import OneStepError
from ...core.lora_file import fit, load_lora
from ...core.memory import Slices, attempt
from ...core.randomness import normal
from ...core.recipe import Recipe, step_files
from ...core.step_roles import part_of
from ..host import Host

ROLE = "storage-check"
TIMES = (980.0, 750.0, 500.0, 250.0)
MOST_PROMPTS = 4
Result = TypeVar("Result")


@dataclass(frozen=True)
class Predictions:
    """[levels, prompts, ...] x0 of a base, and of the student: the base with the LoRA."""

    base: Tensor
    student: Tensor


@dataclass(frozen=True)
class Apart:
    """Relative differences of predictions, at four noise levels. base: of the stored base from the whole one.
    student: the same with the LoRA on both. change: of the LoRA's student from its base, on the whole one. direction:
    cosine of the LoRA's change on the stored base with that on the whole one."""

    base: float
    student: float
    change: float
    direction: float

    def told(self) -> str:
        return (
            f"on the unquantised base the student's predictions differ by {self.student:.1%}, the base's own by "
            f"{self.base:.1%} (the LoRA changes them by {self.change:.1%}; cosine of its two changes "
            f"{self.direction:.3f})"
        )


def refuse_other(stored: Host, whole: Host) -> None:
    """Raises OneStepError where ``whole`` is of another architecture than ``stored``. Neither needs its weights."""
    shapes = [
        {name: (target.shape_a(1), target.shape_b(1)) for name, target in host.denoiser.roles.targets.items()}
        for host in (stored, whole)
    ]
    if stored.family != whole.family or shapes[0] != shapes[1]:
        raise OneStepError(
            f"{whole.name[:80]} is of another architecture than {stored.name[:80]}: give the same base, unquantised"
        )


@torch.no_grad()
def predictions(host: Host, lora: Path, prompts: Sequence[str], size: tuple[int, int]) -> Predictions:
    """Of a host's base and of ``lora`` on it, for the first prompts; the same noise on every host. Where each step has
    a file, each level is its own step's."""
    roles, texts = host.denoiser.roles, list(prompts[:MOST_PROMPTS]) or [""]
    _load(host, lora)
    cond, shape = host.encode(texts, size).to(host.device), host.latent_shape(size)

    def some(rows: list[int]) -> Tensor:
        """[base or student, levels, rows, ...]"""
        made: list[list[Tensor]] = [[], []]
        for number, time in enumerate(TIMES):
            noise = normal(shape, 0, "storage", number, rows).to(host.device)
            sigma = host.denoiser.schedule.sigma_of_time(torch.full((len(rows),), time, dtype=torch.float64))
            made[0].append(host.denoiser(noise, sigma, cond[rows]).cpu())
            with roles.use(ROLE, train=False):
                made[1].append(host.denoiser(noise, sigma, cond[rows]).cpu())
        return torch.stack([torch.stack(part) for part in made])

    try:
        with host.training(), roles.installed():
            parts = Slices(len(texts), "the check against the unquantised base")(range(len(texts)), some)
        return Predictions(*torch.cat(parts, dim=2))
    finally:
        roles.drop(ROLE)


def _load(host: Host, lora: Path) -> None:
    roles = host.denoiser.roles
    names, targets = list(roles.targets), list(roles.targets.values())
    told = load_lora(lora, names, host.family).recipe
    recipe = None if told is None else Recipe.from_json(told)
    files = [lora] if recipe is None else step_files(lora, recipe)
    for step, file in enumerate(files):
        state = fit(load_lora(file, names, host.family).state, targets)
        roles.load(part_of(ROLE, step), state, host.device)
    if recipe is not None and len(files) > 1:
        roles.steps.split(ROLE, recipe.timesteps)


def apart(stored: Predictions, whole: Predictions) -> Apart:
    """Of one LoRA on two storages of one base."""
    changes = [found.student - found.base for found in (stored, whole)]
    return Apart(
        _relative(stored.base, whole.base),
        _relative(stored.student, whole.student),
        _relative(whole.student, whole.base),
        float(torch.cosine_similarity(changes[0].flatten(), changes[1].flatten(), 0)),
    )


def tried(work: Callable[[], Result]) -> tuple[Result | None, str]:
    """(what ``work`` gives, ""), or (None, why not): what has been trained is there all the same."""
    try:
        found, why = attempt(work)
    except OneStepError as error:
        found, why = None, str(error)
    return found, why and f"the LoRA could not be checked on the unquantised base: {why}"


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))
