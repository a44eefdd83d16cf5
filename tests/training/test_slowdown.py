"""Updates that became slow, as a driver makes them that has gone over to the host's memory: told once, if it lasts."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from onestep.training.engine.turns import Phase, Plan
from onestep.training.watch.eta import Pace
from onestep.training.watch.slowdown import KNOWN, LATELY, Slowdown


def told(seconds: Iterable[float], work: Iterable[float] | None = None) -> list[tuple[int, str]]:
    """(update, what is said) of updates of these seconds and this work."""
    seconds, watch = list(seconds), Slowdown()
    works = [10.0] * len(seconds) if work is None else list(work)
    found = [(at, watch(w, s)) for at, (w, s) in enumerate(zip(works, seconds, strict=True))]
    return [(at, text) for at, texts in found for text in texts]


def test_a_sudden_and_lasting_jump_is_told_once() -> None:
    [(at, text)] = told([1.0] * 20 + [8.0] * 40)
    assert at == 20 + LATELY - 1
    assert "takes 8.0 s, where it took 1.0" in text and "Sysmem Fallback" in text and "accumulation" in text


def test_noise_is_no_measure_of_it() -> None:
    [(_, text)] = told([1.0, 1.4, 0.8, 1.1, 2.5] * 4 + [9.0, 12.0, 10.0, 9.5, 11.0])
    assert "takes 10.0 s, where it took 1.1" in text


@pytest.mark.parametrize(
    "seconds",
    [
        [1.0] * 60,
        [1.0] * 20 + [9.0] * (LATELY - 1) + [1.0] * 20,  # a pause
        ([1.0] * 4 + [9.0]) * 10,  # every fifth update does more
        [1.0 * 1.02**step for step in range(120)],  # slowly hotter
        [1.0] * 20 + [2.5] * 30,
        [9.0] * 5 + [1.0] * 30,  # the first are slow
        [1.0] * (KNOWN - 1) + [9.0] * LATELY,  # too few are known
    ],
)
def test_nothing_is_said_of_others(seconds: list[float]) -> None:
    assert told(seconds) == []


def test_updates_of_other_work_are_measured_by_themselves() -> None:
    assert told([1.0] * 20 + [9.0] * 40, [3.0] * 20 + [27.0] * 40) == []
    assert len(told([1.0] * 20 + [9.0] * 20 + [40.0] * 10, [3.0] * 20 + [27.0] * 30)) == 1


def test_a_run_says_it() -> None:
    """By the seconds of an update that its pace is told."""
    pace = Pace(Plan(["student"], [Phase("one", 100, [], cost=4.0)]))
    said = [text for update in range(40) for text in pace.add(update, 1.0 if update < 25 else 6.0)]
    assert ["takes 6.0 s" in text for text in said] == [False, True]
