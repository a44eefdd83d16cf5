"""How long a run has still to go."""

from __future__ import annotations

import math

from ...core.words import duration
from ..engine import making
from ..engine.turns import Plan
from .slowdown import Slowdown

MEASURED = 10
"""Updates after which the pace is known."""


class Pace:
    """Seconds a forward of one sample takes here, of those that learn and of those that make data, from the updates of
    this process and the plan's costs. prior: seconds of a batch's forward before any was measured; 0 = not known."""

    def __init__(self, plan: Plan, prior: float = 0.0) -> None:
        self.plan, self.prior, self.updates, self.made = plan, prior, 0, making.seconds()
        self.learning, self.making, self.slowdown = Rate(), Rate(), Slowdown()

    def add(self, update: int, seconds: float) -> list[str]:
        """``update`` took so long; what is to be said of it."""
        made, before = making.seconds(), self.made
        learning, making_cost = self.plan.costs(update, update + 1)
        self.updates, self.made = self.updates + 1, made
        if making_cost:
            self.making.add(made - before, making_cost)
        learnt = max(seconds - (made - before), 0.0)
        self.learning.add(learnt, learning)
        return [*self._first(update), *self.slowdown(learning, learnt)]

    def _first(self, update: int) -> list[str]:
        """What the first updates say, once, where more than a minute is left."""
        left = self.left(update + 1) if self.updates == MEASURED else 0.0
        return [f"by its first {MEASURED} updates here the rest takes about {duration(left)}"] if left > 60 else []

    def left(self, update: int) -> float:
        """Seconds from ``update`` to the end; as the prior has it, or NaN, while too few updates were measured."""
        learning, making_cost = self.plan.costs(update, self.plan.updates)
        if self.updates < MEASURED or not self.learning.cost:
            return self.prior * (learning + making_cost) if self.prior else math.nan
        known = self.making if self.making.seconds else self.learning
        return self.learning.each * learning + known.each * making_cost


def length_told(plan: Plan, batch: int) -> str:
    """How much a run sees, before it begins."""
    phases = ", ".join(f"{phase.name} {phase.updates:,}" for phase in plan.phases if phase.updates)
    seen = f"{plan.updates:,} updates ({phases}) of {batch:,} samples: {plan.updates * batch:,} samples"
    return f"{seen}; the first {MEASURED} say how long that takes" if plan.updates > MEASURED else seen


class Rate:
    """Seconds for each forward."""

    def __init__(self) -> None:
        self.seconds, self.cost = 0.0, 0.0

    def add(self, seconds: float, cost: float) -> None:
        self.seconds, self.cost = self.seconds + seconds, self.cost + cost

    @property
    def each(self) -> float:
        return self.seconds / self.cost if self.cost else 0.0
