"""When states are saved, what is in them, and what is said where the disk has no room for them."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from small_host import SmallHost, small
from whole_runs import Cancelled, at_call, factors, left, newest, run

from onestep.core.factors import lerp
from onestep.core.roles import Roles
from onestep.core.targets import Target
from onestep.core.tensor_file import read_tensors
from onestep.training.engine.student import mean_device
from onestep.training.runs.run import NotSaved, Run

QUIET: dict[str, Any] = {"watch_every": 0, "preview_every": 0}


def learnt(folder: Path) -> dict[str, bytes]:
    """Of a whole run; its file's header also tells what it went through."""
    return factors(folder / "result.safetensors")


Usage = namedtuple("Usage", "total used free")


# -- when -------------------------------------------------------------------------------------------------------------


def saves(folder: Path, monkeypatch: pytest.MonkeyPatch, **how: Any) -> list[int]:
    """Updates after which a run saved."""
    real, seen = Run.save, []

    def save(self: Run, update: int, *args: Any) -> None:
        seen.append(update)
        real(self, update, *args)

    monkeypatch.setattr(Run, "save", save)
    run(folder, **how)
    monkeypatch.setattr(Run, "save", real)
    return seen


def test_a_run_saves_as_it_begins_every_ten_minutes_and_as_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each update takes four minutes here; the watch's best, after update 3, is no reason to write gigabytes."""
    now = [0.0]
    monkeypatch.setattr("onestep.training.distil.time.monotonic", lambda: now[0])

    def later(progress: Any) -> None:
        now[0] += 240.0

    settings = small(save_every=0, watch_every=3, preview_every=0)
    found = saves(tmp_path / "run", monkeypatch, settings=settings, report=later)
    assert found[0] == 0 and found[-1] == 9 and len(found) >= 4, found
    assert all(after - before == 3 for before, after in zip(found[1:-2], found[2:-1], strict=True)), found


def test_after_a_number_of_updates_where_one_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert saves(tmp_path / "run", monkeypatch, settings=small(save_every=4, **QUIET)) == [0, 4, 8, 9]
    assert saves(tmp_path / "none", monkeypatch, settings=small(save_every=0, **QUIET)) == [0, 9]


def test_a_run_that_leaves_saves_whenever_the_next_state_is_due(tmp_path: Path) -> None:
    """Cancelled in update 5, it goes on from there and ends as if it had not been."""
    settings = small(save_every=0, **QUIET)
    run(tmp_path / "whole", settings)
    host = SmallHost()
    host.on_poll = at_call(9, Cancelled())
    with pytest.raises(Cancelled):
        run(tmp_path / "torn", settings, host=host)
    assert newest(tmp_path / "torn").name != "state-0"
    run(tmp_path / "torn", settings, existing="continue")
    assert learnt(tmp_path / "whole") == learnt(tmp_path / "torn")


def test_how_often_it_saves_may_be_another_in_a_run_that_goes_on(tmp_path: Path) -> None:
    run(tmp_path / "run", small(save_every=2, **QUIET), report=lambda progress: progress.update == 4)
    run(tmp_path / "run", small(save_every=0, **QUIET), existing="continue")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["save_every"] == 2


# -- what -------------------------------------------------------------------------------------------------------------


def test_a_state_lacks_what_is_made_again(tmp_path: Path) -> None:
    """Of an adapter's run: the initial LoRA, which its running mean shares."""
    lora = run(tmp_path / "lora", small(method="regression", steps=2, start=0.6, **QUIET)).path
    own = {"control": "soft-edges", "control_width": 8, "noise_levels": 4, "ema": 0.5}
    settings = small(method="nct", initial_lora=str(lora), steps=4, **own, **QUIET)
    run(tmp_path / "whole", settings)
    tensors = read_tensors(newest(tmp_path / "whole") / "state.safetensors")
    assert not [name for name in tensors if name.endswith(("/a", "/b"))]
    assert {name.split("/")[0] for name in tensors if "/" in name} == {"student", "ema"}
    host = SmallHost()
    host.on_poll = at_call(6, Cancelled())
    with pytest.raises(Cancelled):
        run(tmp_path / "torn", settings, host=host)
    run(tmp_path / "torn", settings, existing="continue")
    whole, torn = left(tmp_path / "whole"), left(tmp_path / "torn")
    assert {**whole, "files": None} == {**torn, "files": None}


# -- room on the disk -------------------------------------------------------------------------------------------------


def with_room(monkeypatch: pytest.MonkeyPatch, free: Any) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, free(path) if callable(free) else free))


def test_a_disk_that_holds_few_states_is_said_as_the_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any("little room" in note for note in run(tmp_path / "other", small(**QUIET)).notes)
    size = (newest(tmp_path / "other") / "state.safetensors").stat().st_size
    with_room(monkeypatch, 2 * size)
    notes = run(tmp_path / "run", small(**QUIET)).notes
    assert any("little room on the disk: 0.0 MB are free, 0.1 MB are wanted" in note for note in notes), notes


def test_old_states_go_where_the_disk_has_no_room_for_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(monkeypatch, lambda folder: 10**6 if len(list(Path(folder).glob("state-*"))) < 2 else 10)
    assert run(tmp_path / "run", small(save_every=1, **QUIET)).updates == 9
    assert Run(tmp_path / "run").states() == [8, 9]


def test_a_full_disk_is_found_before_it_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state before is intact; with room again the run ends as one that never met it."""
    settings = small(save_every=2, **QUIET)
    run(tmp_path / "whole", settings)

    def fill(progress: Any) -> None:
        if progress.update == 5:
            with_room(monkeypatch, 100)

    with pytest.raises(NotSaved, match=r"it takes 0\.\d MB, and 0\.0 MB are free on the disk\. The last state is"):
        run(tmp_path / "torn", settings, report=fill)
    assert Run(tmp_path / "torn").states()[-1] == 4
    monkeypatch.undo()
    run(tmp_path / "torn", settings, existing="continue")
    assert learnt(tmp_path / "whole") == learnt(tmp_path / "torn")


# -- the running mean -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.01, 0.3, 0.5, 0.77, 1.0])
def test_all_factors_move_at_once_as_one_after_the_other(weight: float) -> None:
    """(1 - w) mine + w theirs, to the bit of Tensor.lerp_; from another dtype, as from another device, too."""
    draw = torch.Generator().manual_seed(3)
    mine, theirs = ([torch.randn(shape, generator=draw) for shape in ((5, 7), (3,), (2, 2, 3, 3))] for _ in range(2))
    wanted = [a.clone().lerp_(b, weight) for a, b in zip(mine, theirs, strict=True)]
    apart = [a.clone() for a in mine]
    lerp(mine, theirs, weight)
    lerp(apart, [b.double().requires_grad_() for b in theirs], weight)
    assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(apart, wanted, strict=True))
    lerp([], [], weight)


def test_a_mean_may_lie_elsewhere_than_the_student() -> None:
    layer = torch.nn.Linear(4, 3)
    roles = Roles([Target("proj", layer)])
    roles.add("student", 2, 0)
    roles.copy("student", "mean", "meta")
    assert {factor.device.type for factor in roles.parameters("mean")} == {"meta"}
    assert {factor.device.type for factor in roles.parameters("student")} == {"cpu"}
    assert mean_device(torch.device("cpu")) == torch.device("cpu")


def test_on_a_small_card_it_lies_in_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    card, Card = torch.device("cuda", 0), namedtuple("Card", "total_memory")
    for size, place in ((12, "cpu"), (24, "cuda")):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, size=size: Card(size * 2**30))
        assert mean_device(card).type == place
