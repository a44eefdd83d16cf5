"""A run on a CPU computes in the number of threads that suits it, keeps it, and gives it back."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_host import SmallHost, small
from whole_runs import Cancelled, at_call, left, run

from onestep.training.runs.threads import ENOUGH, faster

FEW = {"steps": 2, "warm_start": 2, "watch_every": 0, "preview_every": 0}


@pytest.fixture(autouse=True)
def _threads_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads, and nobody has said how many it shall be."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def sleeping(seconds: dict[int, float]) -> tuple[list[int], object]:
    """A forward that takes so long in so many threads; the numbers of threads it was called in."""
    calls: list[int] = []

    def forward() -> None:
        calls.append(torch.get_num_threads())
        time.sleep(seconds[calls[-1]])

    return calls, forward


@pytest.mark.parametrize(("one", "two", "chosen"), [(0.002, 0.05, 1), (0.05, 0.002, 2)])
def test_the_faster_number_is_taken_and_told_where_it_matters(one: float, two: float, chosen: int) -> None:
    calls, forward = sleeping({1: one, 2: two})
    number, notes = faster(forward, 2)  # type: ignore[arg-type]
    assert number == chosen and set(calls) == {1, 2}
    assert len(notes) == (chosen == 1), "all threads are what everybody expects"
    assert all("computes in 1 thread" in note and "as fast here as in 2" in note for note in notes)


def test_a_large_network_is_not_tried_in_one_thread() -> None:
    calls, forward = sleeping({2: ENOUGH + 0.05})
    assert faster(forward, 2) == (2, []) and calls == [2]  # type: ignore[arg-type]


def recorded(folder: Path) -> int:
    found: int = json.loads((folder / "config.json").read_text())["threads"]
    return found


def test_a_run_times_itself_and_gives_back_what_was(tmp_path: Path) -> None:
    seen: list[int] = []
    run(tmp_path / "run", small(**FEW), report=lambda progress: seen.append(torch.get_num_threads()))
    assert torch.get_num_threads() == 2
    assert recorded(tmp_path / "run") == seen[-1] and seen[-1] in (1, 2)


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_goes_on_in_its_number_to_the_bit(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever torch stands meanwhile, and without another timing."""
    with monkeypatch.context() as told:
        told.setenv("OMP_NUM_THREADS", str(number))
        torch.set_num_threads(number)
        run(tmp_path / "whole", small(**FEW))
        host = SmallHost()
        host.on_poll = at_call(3, Cancelled())
        with pytest.raises(Cancelled):
            run(tmp_path / "torn", small(**FEW), host=host)
    torch.set_num_threads(3 - number)
    run(tmp_path / "torn", small(**FEW), existing="continue")
    assert torch.get_num_threads() == 3 - number and recorded(tmp_path / "torn") == number
    assert left(tmp_path / "whole")["metrics"] == left(tmp_path / "torn")["metrics"]
    states = [{n: h for n, h in left(tmp_path / name)["files"].items() if "state" in n} for name in ("whole", "torn")]
    assert states[0] == states[1] and states[0]


@pytest.mark.parametrize("number", [1, 2])
def test_a_person_who_says_a_number_is_obeyed(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(number))
    torch.set_num_threads(number)
    seen: list[int] = []
    result = run(tmp_path / "run", small(**FEW), report=lambda progress: seen.append(torch.get_num_threads()))
    assert recorded(tmp_path / "run") == number and set(seen[1:]) == {number}
    assert not any("thread" in note for note in result.notes)


def test_a_number_that_this_machine_has_not_is_told(tmp_path: Path) -> None:
    host = SmallHost()
    host.on_poll = at_call(3, Cancelled())
    with pytest.raises(Cancelled):
        run(tmp_path / "run", small(**FEW), host=host)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"threads": 4096}))
    result = run(tmp_path / "run", small(**FEW), existing="continue")
    assert any("begun in 4096 threads and goes on in 2" in note for note in result.notes)
    assert recorded(tmp_path / "run") == 2
