"""How long a run has still to go."""

from __future__ import annotations

import math

from ..engine.turns import Plan

MEASURED = 10
"""Updates after which the pace is known."""


class Pace:
    """Seconds a forward of one sample takes here, from the updates of this process and the plan's costs."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.updates, self.seconds, self.cost = plan, 0, 0.0, 0.0

    def add(self, update: int, seconds: float) -> None:
        """``update`` took so long."""
        self.updates, self.seconds = self.updates + 1, self.seconds + seconds
        self.cost += self.plan.cost(update, update + 1)

    def left(self, update: int) -> float:
        """Seconds from ``update`` to the end; NaN while too few updates were measured."""
        if self.updates < MEASURED or not self.cost:
            return math.nan
        return self.seconds / self.cost * self.plan.cost(update, self.plan.updates)
