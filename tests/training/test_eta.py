"""The time still to go, from what the plan costs and how fast its first updates were."""

from __future__ import annotations

import math

import pytest

from onestep.training.engine.turns import Phase, Plan, Turn
from onestep.training.watch.eta import MEASURED, Pace

TURN = Turn("student", lambda batch, share, update: {}, 1e-4)


def plan() -> Plan:
    """20 updates of 3 forwards, the first 5 of them with 40 more for their data; then 30 of 18, two turns each."""
    first = Phase("warm start", 20, [TURN], 3.0, fresh=5, fresh_cost=40.0)
    return Plan(["student"], [first, Phase("matching", 30, [TURN, TURN], 18.0)])


def test_the_cost_of_a_plan_is_the_sum_of_its_updates() -> None:
    costs = [43.0] * 5 + [3.0] * 15 + [18.0] * 30
    for first in range(51):
        for last in range(first, 51):
            assert plan().cost(first, last) == pytest.approx(sum(costs[first:last]))
    assert plan().updates == 50 and plan().turns == 2


@pytest.mark.parametrize("at", [MEASURED, 20, 40])
def test_the_time_to_go_is_right_where_the_costs_are(at: int) -> None:
    """A machine of 0.25 s a forward: known only after some updates, then exactly, whatever phase comes."""
    made = plan()
    pace = Pace(made)
    for update in range(at):
        assert math.isnan(pace.left(update)) == (update < MEASURED)
        pace.add(update, 0.25 * made.cost(update, update + 1))
    assert pace.left(at) == pytest.approx(0.25 * made.cost(at, 50))
    assert pace.left(50) == 0
