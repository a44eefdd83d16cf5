"""What a run starts from besides a host: the initial LoRA, and the config by which a run is known again."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import asdict
from typing import Any

import torch

from ..core.errors import OneStepError
from ..core.lora_file import fit, load_lora
from ..core.recipe import Recipe
from ..core.roles import State
from .host import Host
from .settings import Settings


def initial_state(host: Host, settings: Settings) -> State | None:
    """The initial LoRA's factors, filled up with zeros to the run's rank where it has less, in every target."""
    if not settings.initial_lora:
        return None
    targets = list(host.denoiser.roles.targets.values())
    file = load_lora(settings.initial_lora, [target.name for target in targets], host.family)
    state = fit(file.state, targets)
    largest = max(len(a) for a, _ in state.values())
    if largest > settings.rank:
        raise OneStepError(
            f"the initial LoRA has rank {largest}, the run {settings.rank}: set rank to at least {largest}"
        )
    host.denoiser.roles.add("initial", settings.rank, settings.seed)
    grown = host.denoiser.roles.state("initial")
    for name, (a, b) in state.items():
        grown[name][0][: len(a)] = a
        grown[name][1][:, : len(a)] = b
    host.denoiser.roles.drop("initial")
    return grown


def recipe_of(host: Host, settings: Settings) -> Recipe:
    """How the student will draw."""
    schedule, sizes = host.denoiser.schedule, settings.size_list
    return Recipe.for_student(schedule, settings.student_steps, host.family, sizes, settings.start)


def config_of(host: Host, prompts: list[str], settings: Settings) -> dict[str, Any]:
    return {
        "settings": asdict(settings),
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "base": host.base_hash,
        "checkpoint": host.name,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "device": str(host.device),
    }
