"""How long a run has still to go."""

from __future__ import annotations

import math

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
        return self.slowdown(learning, learnt)

    def left(self, update: int) -> float:
        """Seconds from ``update`` to the end; as the prior has it, or NaN, while too few updates were measured."""
        learning, making_cost = self.plan.costs(update, self.plan.updates)
        if self.updates < MEASURED or not self.learning.cost:
            return self.prior * (learning + making_cost) if self.prior else math.nan
        known = self.making if self.making.seconds else self.learning
        return self.learning.each * learning + known.each * making_cost


class Rate:
    """Seconds for each forward."""

    def __init__(self) -> None:
        self.seconds, self.cost = 0.0, 0.0

    def add(self, seconds: float, cost: float) -> None:
        self.seconds, self.cost = self.seconds + seconds, self.cost + cost

    @property
    def each(self) -> float:
        return self.seconds / self.cost if self.cost else 0.0
