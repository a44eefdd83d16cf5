"""What a run's student is compared with, as its method has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...core.cond import Cond
from ..data.pairs import teach
from ..engine.batch import Batch
from ..engine.setup import Setup
from ..host import Host

Latents = dict[str, Tensor]
"""What is compared with, by name, [N, ...] on the CPU. x: the latents that the student should draw; plain: what it
draws from the watch's noise without its control, its negatives or what it has learnt; pictures: a person's, that it
should draw alike; others as a method needs them."""


def no_inputs(latents: Latents, rows: list[int], like: Tensor) -> dict[str, Any]:
    """A student without an adapter takes nothing beyond its conditions."""
    return {}


def latents_missed(host: Host, latents: Latents, x: Tensor) -> float:
    """rms of what the student's x misses of the latents that it should draw."""
    return float((x - latents["x"]).square().mean().sqrt())


def target_row(host: Host, latents: Latents, rows: Tensor) -> list[Tensor]:
    """What the student should draw."""
    return [host.decode(latents["x"][rows])]


@dataclass(frozen=True)
class Reference:
    """make: (a slice's prompts, the noise that the student draws from) -> the slice's latents. cond: the conditions in
    place of the run's prompts, for each of the watch's samples. inputs: (latents, rows, a tensor of the
    device and dtype) -> what the student's adapter takes for these samples. missed: (host, latents, the student's x) ->
    how much of what is asked for x misses. above: (host, latents, rows) -> rows of pictures [n, 3, H, W] that a preview
    shows above the student's.
    """

    make: Callable[[Batch, Tensor], Latents]
    cond: Cond | None = None
    inputs: Callable[[Latents, list[int], Tensor], dict[str, Any]] = no_inputs
    missed: Callable[[Host, Latents, Tensor], float] = latents_missed
    above: Callable[[Host, Latents, Tensor], list[Tensor]] = target_row


def by_teacher(setup: Setup) -> Reference:
    """The teacher's latents from the same noise."""
    return Reference(lambda batch, noise: {"x": teach(setup.host, setup.settings, batch, noise)})
