"""Every method of the registry: a whole run, one that is cancelled and goes on, one that is finished early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from every_method import host_of, short
from narrowed import narrowed
from small_host import PROMPTS, small
from whole_runs import Cancelled, at_call, left

from onestep.training.distil import Progress, Result, distil
from onestep.training.methods import METHODS

ENGINES = ("lcm",)
"""One of each engine that has no test of this of its own, as dmd has; `make test-all` runs all."""
POLLS = (3, 9, 17)


def run(folder: Path, settings: Any, host: Any, **how: Any) -> Result:
    return distil(host, PROMPTS, settings, folder, **how)


def stopped_at(host: Any, poll: int) -> Any:
    """The host, on which a person cancels at the ``poll``-th place where that is asked."""
    plain, cancel = host.poll, at_call(poll, Cancelled())

    def polled() -> None:
        cancel()
        plain()

    host.poll = polled
    return host


@pytest.mark.parametrize("method", narrowed(METHODS, *ENGINES))
def test_a_cancelled_run_goes_on_to_the_same_end(method: str, tmp_path: Path) -> None:
    """While data is made, in an update, in the watch: to the bit, with all that it leaves."""
    settings = small(**short(method, tmp_path), steps=4, watch_every=2, preview_every=2, candidate_every=2)
    whole = run(tmp_path / "whole" / "run", settings, host_of(method))
    assert whole.updates and whole.preview is not None and whole.check
    for poll in POLLS:
        folder = tmp_path / f"cut {poll}" / "run"
        with pytest.raises(Cancelled):
            run(folder, settings, stopped_at(host_of(method), poll))
        run(folder, settings, host_of(method), existing="continue")
        assert left(folder) == left(tmp_path / "whole" / "run"), poll


@pytest.mark.parametrize("method", narrowed(METHODS, *ENGINES))
def test_one_that_is_finished_early_has_a_result(method: str, tmp_path: Path) -> None:
    settings = small(**short(method, tmp_path), steps=50, watch_every=0, preview_every=0)

    def report(progress: Progress) -> bool:
        return not progress.preparing and progress.update >= 2

    found = run(tmp_path / "run", settings, host_of(method), report=report)
    assert found.updates == 2 and found.path.is_file() and found.check
    assert any("finished early, after 2 of" in note for note in found.notes)
