"""The time still to go, from what the plan costs and how fast its first updates were."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
from whole_runs import run

from onestep.training.engine import making
from onestep.training.engine.turns import Phase, Plan, Turn
from onestep.training.watch.eta import MEASURED, Pace, length_told

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
def test_the_time_to_go_is_right_where_the_costs_are(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 0.25 s a forward that learns and 0.1 s one that makes data: known only after some updates, then
    exactly, whatever phase comes."""
    made, spent = plan(), [7.0]
    monkeypatch.setattr(making, "seconds", lambda: spent[0])
    pace = Pace(made)
    for update in range(at):
        assert math.isnan(pace.left(update)) == (update < MEASURED)
        learning, data = made.costs(update, update + 1)
        spent[0] += 0.1 * data
        pace.add(update, 0.25 * learning + 0.1 * data)
    learning, data = made.costs(at, 50)
    assert pace.left(at) == pytest.approx(0.25 * learning + 0.1 * data) and pace.left(50) == 0


def test_what_a_run_says_of_its_length() -> None:
    """Before it begins, updates and samples; after the first of them, once, how long the rest takes."""
    told = length_told(plan(), 8)
    assert told == (
        "50 updates (warm start 20, matching 30) of 8 samples: 400 samples; the first 10 say how long that takes"
    )
    assert length_told(Plan(["student"], [Phase("few", 3, [TURN])]), 2) == "3 updates (few 3) of 2 samples: 6 samples"
    pace = Pace(Plan(["student"], [Phase("long", 1000, [TURN])]))
    said = [note for update in range(30) for note in pace.add(update, 2.0)]
    assert said == ["by its first 10 updates here the rest takes about 33 min"]  # 990 updates of 2 s


def test_a_run_says_it_before_its_first_update(tmp_path: Path) -> None:
    told: list[tuple[bool, tuple[str, ...]]] = []
    run(tmp_path / "run", report=lambda now: told.append((now.preparing, now.notes)))
    length = "9 updates (warm start 3, critic 2, dmd 4) of 4 samples: 36 samples"
    assert any(preparing and length in notes for preparing, notes in told)


def test_data_that_is_still_to_be_made_is_reckoned_in() -> None:
    """In the midst of it, at its own pace; where none was made yet, at the pace of what learns."""
    first = Phase("warm start", 40, [TURN], 3.0, fresh=30, fresh_cost=40.0)
    pace = Pace(Plan(["student"], [first]))
    for update in range(MEASURED):
        pace.add(update, 3.0)
    assert pace.left(MEASURED) == pytest.approx(30 * 3.0 + 20 * 40.0)
    before = making.seconds()
    with making.making():
        time.sleep(0.05)
    made = making.seconds() - before
    pace.add(MEASURED, 3.0 + made)
    assert made >= 0.05 and pace.making.each * 40 == pytest.approx(made / (MEASURED + 1))
