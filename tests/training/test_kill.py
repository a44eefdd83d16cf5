"""A run may be killed at any instruction, again and again: it goes on, and ends as if nothing had been, to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from narrowed import narrowed

pytestmark = pytest.mark.skipif(os.name == "nt", reason="forks and sends SIGKILL")
RUNNER = Path(__file__).parents[1] / "support" / "kill_runner.py"
MAKING = {
    **{"cdm": "pairs", "dmd2": "pairs", "f-distill": "pairs", "ladd": "pairs", "uni-instruct": "pairs"},
    **{"agd": "trajectories", "guidance-lora": "trajectories", "nct": "triples", "sun": "segments"},
}
"""The methods that make their data first, and its folder."""


@cache
def records_of(method: str) -> list[dict[str, Any]]:
    """The run that nobody killed, then one for each kill."""
    ended = subprocess.run([sys.executable, str(RUNNER), method], capture_output=True, text=True, timeout=1200)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.mark.parametrize("method", narrowed(["dmd", *MAKING], "dmd"))
def test_every_resume_ends_as_the_uninterrupted_run(method: str) -> None:
    """The result's file, state with moments and counters, metrics, pictures and what the method has made to learn
    from."""
    whole, *killed = records_of(method)
    assert whole["left"]["files"] and whole["left"]["metrics"][-1]["update"] == whole["updates"][-1]
    for record in killed:
        assert record["left"] == whole["left"], f"killed after {record['event']} at instant {record['instant']}"


def test_enough_were_killed_and_in_the_worst_places() -> None:
    """At least 25 kills; at least 5 inside a save: after half a write, a whole one, a sync, a rename, a deletion."""
    killed = records_of("dmd")[1:]
    assert all(record["deaths"] >= 1 for record in killed)
    assert sum(record["deaths"] for record in killed) >= 25
    inside = [record["event"][0] for record in killed if record["event"][1] == "save"]
    assert len(inside) >= 15
    assert set(inside) >= {"half a write", "a write", "fsync", "replace", "unlink"}
    assert {"a forward"} <= {record["event"][0] for record in killed if record["event"][1] != "save"}


@pytest.mark.parametrize("method", narrowed(MAKING))
def test_what_a_method_makes_first_is_killed_too(method: str) -> None:
    """In the middle of a block's file and behind its rename, and the same within a save."""
    whole, *killed = records_of(method)
    assert sum(name.startswith(MAKING[method]) for name in whole["left"]["files"]) == 2
    assert all(record["deaths"] >= 1 for record in killed)
    places = {tuple(record["event"]) for record in killed}
    assert places >= {(kind, place) for kind in ("half a write", "replace") for place in ("pool", "save")}


def test_they_went_on_and_did_not_start_anew() -> None:
    """Killed late, a run does only what was left: fewer updates than a cold start, whose end it shares."""
    whole, *killed = records_of("dmd")
    assert whole["updates"] == [0, 1, 2, 3, 4, 5, 6]
    for record in killed:
        assert record["updates"] == whole["updates"][7 - len(record["updates"]) :]
    assert sum(len(record["updates"]) < 6 for record in killed) >= 12


@pytest.mark.broad
def test_so_do_those_that_make_their_data_first() -> None:
    assert any(len(record["updates"]) < 3 for method in MAKING for record in records_of(method)[1:])
