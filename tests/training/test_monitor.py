"""What a run sees of its student: the untrained one first, the finished one last, and the best between them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from small_host import SmallHost, setup_of, small
from whole_runs import Cancelled, at_call, left, run

from onestep.training.engine.student import STUDENT
from onestep.training.engine.trainer import EMA
from onestep.training.runs.run import Run
from onestep.training.watch.monitor import Monitor


def previewed(folder: Path) -> list[int]:
    """Updates after which previews were drawn."""
    return [int(path.stem) for path in sorted((folder / "previews").glob("*.png"))]


def test_the_curve_begins_at_the_untrained_student(tmp_path: Path) -> None:
    """Whose measures a student that learns nothing keeps."""
    settings = small(method="regression", steps=6, learning_rate=0.0, ema=0.0)
    first, *others = [line for line in run(tmp_path / "run", settings).metrics if "distance" in line]
    assert (first["update"], first["no_gain"]) == (0, 0) and [line["update"] for line in others] == [3, 6]
    for name in ("distance", "content", "variety", "spread"):
        assert all(line[name] == first[name] for line in others)
    assert [line["no_gain"] for line in others] == [3, 6]


@pytest.mark.parametrize(("every", "drawn"), [(0, []), (1, [0, 1, 2, 3, 4, 5, 6]), (5, [0, 5, 6]), (100, [0, 6])])
def test_the_last_preview_is_of_the_finished_student(tmp_path: Path, every: int, drawn: list[int]) -> None:
    settings = small(method="regression", steps=6, preview_every=every, watch_every=0)
    result = run(tmp_path / "run", settings)
    assert previewed(tmp_path / "run") == drawn
    assert result.preview == (tmp_path / "run" / "previews" / "000006.png" if drawn else None)
    assert [line["update"] for line in result.metrics] == [1, 2, 3, 4, 5, 6], "nothing was measured"
    assert not any("distance" in line for line in result.metrics)


def test_nothing_is_told_of_a_student_that_nobody_looks_at(tmp_path: Path) -> None:
    seen: list[int] = []
    settings = small(watch_every=0, preview_every=0)
    run(tmp_path / "run", settings, report=lambda now: now.preparing or seen.append(now.update))
    assert seen == list(range(1, 10)) and not (tmp_path / "run" / "reference.safetensors").exists()


def test_the_untrained_student_is_measured_once_in_a_run(tmp_path: Path) -> None:
    """One that goes on from its very start knows that measure from its metrics: here not what it would find."""
    with pytest.raises(Cancelled):
        run(tmp_path / "run", report=lambda now: at_call(1, Cancelled())() if now.phase == "before training" else None)
    metrics = tmp_path / "run" / "metrics.jsonl"
    line = json.loads(metrics.read_text())
    assert line["update"] == 0 and Run(tmp_path / "run").states() == [0]
    metrics.write_text(json.dumps(line | {"distance": -1.0}) + "\n")
    result = run(tmp_path / "run", existing="continue")
    assert [entry["update"] for entry in result.metrics] == list(range(10)) and result.metrics[0]["distance"] == -1.0
    assert [entry["no_gain"] for entry in result.metrics if "no_gain" in entry] == [0, 3, 6, 9]


def test_no_gain_is_told_of_a_student_that_does_not_learn(tmp_path: Path) -> None:
    """In a critic's warm-up it is drawn as it was, and its distance cannot fall."""
    result = run(tmp_path / "run", small(warm_start=2, critic_warm_up=4, steps=2, watch_every=1, ema=0.0))
    told = {line["update"]: "no_gain" in line for line in result.metrics}
    assert told == {update: not 3 <= update <= 6 for update in range(9)}
    assert len({line["distance"] for line in result.metrics if 2 <= line["update"] <= 6}) == 1


def test_a_run_that_only_gets_worse_keeps_no_untrained_state(tmp_path: Path) -> None:
    """Its last two states stay, and it ends with a result of what it learnt."""
    host = SmallHost()
    settings = small(
        method="regression", steps=6, learning_rate=1.0, warm_up=0, max_grad_norm=0.0, watch_every=1, ema=0.0
    )
    result = run(tmp_path / "run", settings, host=host)
    assert [line["no_gain"] for line in result.metrics] == list(range(7)), "it was to get worse at once"
    assert Run(tmp_path / "run").states() == [5, 6]
    assert result.path.is_file() and result.role == "student" and result.updates == 6


def test_a_run_cancelled_while_it_looks_first_goes_on_to_the_same_end(tmp_path: Path) -> None:
    run(tmp_path / "whole" / "run")
    for poll in (2, 3):
        folder = tmp_path / f"cut at {poll}" / "run"
        with pytest.raises(Cancelled):
            run(folder, host=SmallHost(on_poll=at_call(poll, Cancelled())))
        assert Run(folder).metrics() == [] and Run(folder).states() == [0]
        run(folder, existing="continue")
        assert left(folder) == left(tmp_path / "whole" / "run")


def test_the_best_is_the_least_finite_distance(tmp_path: Path) -> None:
    """An untrained student whose numbers overflow does not stand for ever as the best."""
    host = SmallHost()
    monitor = Monitor(setup_of(host, small(), tmp_path))
    assert monitor.gain(0, math.nan) == 0 and monitor.best is None
    assert monitor.gain(3, 1.0) == 0 and monitor.gain(6, math.nan) == 3 and monitor.gain(9, 2.0) == 6
    assert monitor.best == {"distance": 1.0, "update": 3.0}
    assert monitor.gain(12, 0.5) == 0


@pytest.mark.parametrize("broken", [EMA, STUDENT])
def test_who_draws_no_numbers_is_not_the_result(tmp_path: Path, broken: str) -> None:
    host, settings = SmallHost(), small(ema=0.9, watch_samples=4)
    setup, roles = setup_of(host, settings, tmp_path), host.denoiser.roles
    for role in (EMA, STUDENT):
        roles.add(role, 2, 0)
    for _, b in roles.state(broken).values():
        b.fill_(math.nan)
    with roles.installed():
        monitor = Monitor(setup)
        monitor.prepare(setup)
        assert monitor.better() == {EMA: STUDENT, STUDENT: EMA}[broken]
