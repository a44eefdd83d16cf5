"""A LoRA that was trained on a quantised base, on the base as it was before: how far the two are from each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import OneStepError
from ..core.lora_file import fit, load_lora
from ..core.randomness import normal
from ..core.stored import is_plain
from ..core.targets import is_adaptable
from .places import is_quantized, place

ROLE = "storage-check"
TIMES = (980.0, 750.0, 500.0, 250.0)
MOST_PROMPTS = 4


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


def stored_as(network: torch.nn.Module) -> str:
    """How a network's quantised weights are stored, in a word; "" where all are plain."""
    weights = [layer.weight for layer in network.modules() if is_adaptable(layer)]
    kinds = {str(weight.dtype).removeprefix("torch.") for weight in weights if not is_plain(weight)}  # type: ignore
    return ", ".join(sorted(kinds))


@torch.no_grad()
def compare(
    stored: Any, load_whole: Callable[[], Any], lora: Path, prompts: Sequence[str], size: tuple[int, int]
) -> Apart:
    """A LoRA on the host that it was trained on, and on that of the same base unquantised, which is loaded when the
    first has left the card. Raises OneStepError where it is another base."""
    texts = list(prompts[:MOST_PROMPTS]) or [""]
    mine = _predictions(stored, lora, texts, size)
    if not is_quantized(stored.network):
        place(stored.network, torch.device("cpu"))
    whole = load_whole()
    if stored.family != whole.family or set(stored.denoiser.roles.targets) != set(whole.denoiser.roles.targets):
        raise OneStepError(f"{whole.name[:80]} is of another architecture than {stored.name[:80]}: give the same base")
    theirs = _predictions(whole, lora, texts, size)
    changes = [student - base for base, student in (mine, theirs)]
    return Apart(
        _relative(mine[0], theirs[0]),
        _relative(mine[1], theirs[1]),
        _relative(theirs[1], theirs[0]),
        float(torch.cosine_similarity(changes[0].flatten(), changes[1].flatten(), 0)),
    )


def _predictions(host: Any, lora: Path, texts: list[str], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """[levels, prompts, ...] x0 of the base, and with the LoRA; the same noise on every host."""
    roles, denoiser = host.denoiser.roles, host.denoiser
    targets = list(roles.targets.values())
    roles.load(ROLE, fit(load_lora(lora, list(roles.targets), host.family).state, targets), host.device)
    cond, shape = host.encode(texts, size).to(host.device), host.latent_shape(size)
    try:
        with host.training(), roles.installed():
            base, student = [], []
            for number, time in enumerate(TIMES):
                noise = normal(shape, 0, "storage", number, range(len(texts)))
                sigma = denoiser.schedule.sigma_of_time(torch.full((len(texts),), time, dtype=torch.float64))
                base.append(denoiser(noise.to(host.device), sigma, cond).cpu())
                with roles.use(ROLE, train=False):
                    student.append(denoiser(noise.to(host.device), sigma, cond).cpu())
        return torch.stack(base), torch.stack(student)
    finally:
        roles.drop(ROLE)


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))
