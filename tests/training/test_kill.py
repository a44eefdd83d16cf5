"""A run may be killed at any instruction, again and again: it goes on, and ends as if nothing had been, to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="forks and sends SIGKILL")
RUNNER = Path(__file__).parents[1] / "support" / "kill_runner.py"


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """The run that nobody killed, then one for each kill."""
    ended = subprocess.run([sys.executable, str(RUNNER)], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_every_resume_ends_as_the_uninterrupted_run(records: list[dict[str, Any]]) -> None:
    """LoRA, state with moments and counters, metrics, pictures and pairs."""
    whole, *killed = records
    assert whole["left"]["files"] and whole["left"]["metrics"][-1]["update"] == 6
    for record in killed:
        assert record["left"] == whole["left"], f"killed after {record['event']} at instant {record['instant']}"


def test_enough_were_killed_and_in_the_worst_places(records: list[dict[str, Any]]) -> None:
    """At least 25 kills; at least 5 inside a save: after half a write, a whole one, a sync, a rename, a deletion."""
    killed = records[1:]
    assert all(record["deaths"] >= 1 for record in killed)
    assert sum(record["deaths"] for record in killed) >= 25
    inside = [record["event"][0] for record in killed if record["event"][1]]
    assert len(inside) >= 15
    assert set(inside) >= {"half a write", "a write", "fsync", "replace", "unlink"}
    assert {"a forward"} <= {record["event"][0] for record in killed if not record["event"][1]}


def test_they_went_on_and_did_not_start_anew(records: list[dict[str, Any]]) -> None:
    """Killed late, a run does only what was left: fewer updates than a cold start, whose end it shares."""
    whole, *killed = records
    assert whole["updates"] == [0, 1, 2, 3, 4, 5, 6]
    for record in killed:
        assert record["updates"] == whole["updates"][7 - len(record["updates"]) :]
    assert sum(len(record["updates"]) < 6 for record in killed) >= 12
