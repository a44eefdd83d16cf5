"""A run's own use of the plan: the rung that it goes on, told as it begins, and kept for as long as the run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ...core.checkpoint import Checkpoints
from ...core.errors import OneStepError
from ...core.recomputed import BLOCKS, NOTHING
from ..engine.setup import hooked
from ..engine.trainer import Trainer
from ..engine.turns import Plan
from ..host import Host, Shells
from ..settings import Settings
from .cards import Card, found_card
from .ladder import Planned, planned
from .rungs import CANDIDATES, STATE
from .text import in_short, line, rung_facts

KEPT = "plan"
"""Where a run's config keeps it."""
FRESH = "teacher's data"


class Config(Protocol):
    """What a run's folder tells of the run, by name."""

    def recorded(self, name: str) -> Any: ...

    def record(self, name: str, value: Any) -> None: ...


@dataclass(frozen=True)
class Layout:
    """How a run is laid out on its card. micro: samples of a micro-batch. recompute, sliced, moments_on_host: as
    `engine.trainer.Trainer` has them. streamed: whether the base is. notes: what is said of it; none where nothing was
    planned. beyond: bytes that it takes beyond the base. disk: bytes that it leaves beside its states. costs: forwards
    of a sample in an update, by phase, and of a sample's data, under ``FRESH``. forward: seconds of one, at the least;
    0 where it is not known."""

    settings: Settings
    micro: int
    recompute: str = BLOCKS
    sliced: bool = False
    moments_on_host: bool = False
    streamed: bool = False
    notes: tuple[str, ...] = ()
    beyond: int = 0
    disk: int = 0
    costs: Mapping[str, float] = field(default_factory=dict)
    forward: float = 0.0

    @contextmanager
    def training(self, host: Host) -> Iterator[None]:
        """Within, ``host`` trains, and knows whether its network is streamed."""
        host.streamed = self.streamed
        try:
            with host.training():
                yield
        finally:
            host.streamed = False

    def hooked(self, host: Host) -> AbstractContextManager[Checkpoints]:
        """`engine.setup.hooked`, as it is laid out."""
        return hooked(host, self.recompute, self.settings.compile_blocks)

    def place(self, trainer: Trainer, checkpoints: Checkpoints) -> None:
        """Have ``trainer`` lie so from its first update on."""
        trainer.checkpoints, trainer.sliced = checkpoints, self.sliced
        trainer.accumulation = max(trainer.accumulation, -(-self.settings.batch // self.micro))
        trainer.moments_on_host = self.moments_on_host

    def counted(self, plan: Plan) -> tuple[Plan, float]:
        """``plan`` at the costs that were counted, where they were; and the least seconds of a batch's forward."""
        fresh = self.costs.get(FRESH)
        phases = [
            replace(
                phase,
                cost=self.costs.get(phase.name, phase.cost),
                fresh_cost=phase.fresh_cost if fresh is None or not phase.fresh_cost else fresh,
            )
            for phase in plan.phases
        ]
        return replace(plan, phases=phases), self.forward * self.settings.batch


def laid_out(
    config: Config,
    host: Host,
    settings: Settings,
    shells: Shells | None,
    prompts: int = 0,
    find: Callable[..., Card | None] = found_card,
) -> Layout:
    """The rung that fits the card of ``host``, found once in a run. Without a card, or a shell of the host, the run is
    as it is set; and so where it could not be counted, which it says. prompts: how many there are."""
    grade = BLOCKS if settings.checkpointing else NOTHING
    micro = -(-settings.batch // settings.accumulation)
    as_set = Layout(settings, micro, grade, streamed=settings.streaming == "on")
    kept = config.recorded(KEPT)
    if kept is None:
        card = find(host.device) if shells is not None else None
        if shells is None or card is None:
            return as_set
        kept = _kept(host, settings, shells, card, prompts)
        config.record(KEPT, kept)
    known = {name: kept[name] for name in ("beyond", "disk", "costs", "forward") if name in kept}
    noted = replace(as_set, notes=tuple(kept.get("lines", [kept["line"]])), **known)
    rung = kept.get("rung")
    if rung is None:
        return noted
    micro, on_host = min(rung["micro_batch"], as_set.micro), rung["moments_on_host"]
    streamed = rung.get("streamed", False) if settings.streaming == "auto" else as_set.streamed
    way = replace(noted, micro=micro, recompute=rung["recompute"], sliced=True, moments_on_host=on_host)
    return replace(way, streamed=streamed)


def _kept(host: Host, settings: Settings, shells: Shells, card: Card, prompts: int) -> dict[str, Any]:
    try:
        plan: Planned = planned(host.name, shells, settings, card)
    except OneStepError:
        raise
    except Exception as error:  # the meta device does not know every operation: no reason not to train
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
        return {"line": f"what the run needs could not be counted ({why})", "rung": None}
    rung = plan.taken or plan.rungs[-1]
    whole, base = rung.whole, rung.peak.made_of.get("base", 0)
    data = sum(bytes for name, bytes in whole.disk.items() if name not in (STATE, CANDIDATES))
    said = [line(plan), *([card.crowded] if card.crowded else []), in_short(plan, prompts)]
    return {
        "line": said[0],
        "lines": said,
        "rung": None if plan.taken is None else rung_facts(plan.taken),
        "beyond": max(0, rung.peak.bytes - base),
        "disk": data + prompts * whole.text,
        "costs": whole.costs | {FRESH: whole.fresh},
        "forward": whole.forward,
    }
