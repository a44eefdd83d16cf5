"""A run's own use of the plan: the rung that it goes on, told as it begins, and kept for as long as the run goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ...core.checkpoint import Checkpoints
from ...core.errors import OneStepError
from ...core.recomputed import BLOCKS, NOTHING
from ..engine.trainer import Trainer
from ..host import Host, Shells
from ..settings import Settings
from .cards import Card, found_card
from .ladder import Planned, planned
from .text import line, rung_facts

KEPT = "plan"
"""Where a run's config keeps it."""


class Config(Protocol):
    """What a run's folder tells of the run, by name."""

    def recorded(self, name: str) -> Any: ...

    def record(self, name: str, value: Any) -> None: ...


@dataclass(frozen=True)
class Layout:
    """How a run is laid out on its card. micro: samples of a micro-batch. recompute, sliced, moments_on_host: as
    `engine.trainer.Trainer` has them. note: what is said of it; empty where nothing was planned."""

    settings: Settings
    micro: int
    recompute: str = BLOCKS
    sliced: bool = False
    moments_on_host: bool = False
    note: str = ""

    def place(self, trainer: Trainer, checkpoints: Checkpoints) -> None:
        """Have ``trainer`` lie so from its first update on."""
        trainer.checkpoints, trainer.sliced = checkpoints, self.sliced
        trainer.accumulation = max(trainer.accumulation, -(-self.settings.batch // self.micro))
        trainer.moments_on_host = self.moments_on_host


def laid_out(
    config: Config, host: Host, settings: Settings, shells: Shells | None, find: Callable[..., Card | None] = found_card
) -> Layout:
    """The rung that fits the card of ``host``, found once in a run. Without a card, or a shell of the host, the run is
    as it is set; and so where it could not be counted, which it says."""
    grade = BLOCKS if settings.checkpointing else NOTHING
    as_set = Layout(settings, -(-settings.batch // settings.accumulation), grade)
    kept = config.recorded(KEPT)
    if kept is None:
        card = find(host.device) if shells is not None else None
        if shells is None or card is None:
            return as_set
        kept = _kept(host, settings, shells, card)
        config.record(KEPT, kept)
    rung = kept.get("rung")
    if rung is None:
        return replace(as_set, note=kept["line"])
    micro = min(rung["micro_batch"], as_set.micro)
    return Layout(settings, micro, rung["recompute"], True, rung["moments_on_host"], kept["line"])


def _kept(host: Host, settings: Settings, shells: Shells, card: Card) -> dict[str, Any]:
    try:
        plan: Planned = planned(host.name, shells, settings, card)
    except OneStepError:
        raise
    except Exception as error:  # the meta device does not know every operation: no reason not to train
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
        return {"line": f"what the run needs could not be counted ({why})", "rung": None}
    return {"line": line(plan), "rung": None if plan.taken is None else rung_facts(plan.taken)}
