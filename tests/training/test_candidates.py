"""Students that a run keeps on its way: which, what is in them, and that a run goes on without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from narrowed import narrowed
from small_host import SmallHost, setup_of, small
from whole_runs import Cancelled, at_call, left, run

from onestep.core.errors import OneStepError
from onestep.core.memory import noticed
from onestep.core.tensor_file import read_header, read_tensors
from onestep.training.engine.spacing import number, spacing
from onestep.training.runs import candidates
from onestep.training.runs.candidates import kept


def thinned(updates: int, every: int, most: int) -> list[int]:
    """The rule in words: one each ``every``; where they are too many, every second goes, and so do those to come."""
    there: list[int] = []
    for update in range(1, updates + 1):
        if update % every == 0:
            there.append(update)
        if len(there) > most:
            there, every = there[1::2], 2 * every
    return there


@pytest.mark.parametrize("most", [2, 3, 5, 12])
@pytest.mark.parametrize("every", [1, 3])
def test_every_second_goes_where_they_are_too_many(every: int, most: int, tmp_path: Path) -> None:
    host, settings = SmallHost(), small(candidate_every=every, candidates=most)
    host.denoiser.roles.add("student", 1, 0)
    for update in range(1, 70):
        candidates.keep(tmp_path, update, host.denoiser.roles, "student", settings)
        assert list(kept(tmp_path)) == thinned(update, every, most)
        assert len(kept(tmp_path)) == number(update, settings)
        assert all(at % spacing(update, settings) == 0 for at in kept(tmp_path))
    assert most / 2 <= len(kept(tmp_path)) <= most


def followed(folder: Path, settings: Any, **how: Any) -> tuple[Any, dict[int, dict[str, torch.Tensor]]]:
    """A run, and what its mean held after each update."""
    host, seen = how.pop("host", None) or SmallHost(), {}

    def report(now: Any) -> None:
        if not now.preparing:
            state = host.denoiser.roles.state("ema")
            seen[now.update] = {
                f"ema/{n}/{k}": v.clone() for n, pair in state.items() for k, v in zip("ab", pair, strict=True)
            }

    return run(folder, settings, host=host, report=report, **how), seen


def test_what_is_kept_is_the_mean_alone_in_half_its_bytes(tmp_path: Path) -> None:
    _, seen = followed(tmp_path / "run", small(candidate_every=2, candidates=4))
    files = kept(tmp_path / "run")
    assert list(files) == [2, 4, 6, 8] and read_header(files[2]).metadata == {"onestep.role": "ema"}
    for update, path in files.items():
        found = read_tensors(path)
        assert found.keys() == seen[update].keys()
        assert all(torch.equal(value, seen[update][name].bfloat16()) for name, value in found.items())


@pytest.mark.parametrize("changes", [{"candidate_every": 0}, {"watch_every": 0, "preview_every": 0}, {}])
def test_none_are_kept_where_nobody_asks_or_looks(changes: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path / "run", small(**{"candidate_every": 100, **changes}))
    assert kept(tmp_path / "run") == {} and not (tmp_path / "run" / "choice.json").exists()


def test_a_student_with_a_lora_for_each_step_is_kept_whole(tmp_path: Path) -> None:
    run(tmp_path / "run", small(candidate_every=3, student_steps=2, step_loras=True))
    names = set(read_tensors(kept(tmp_path / "run")[6]))
    assert {name.split("/")[0] for name in names} == {"ema", "ema@2"}


def test_an_adapter_is_kept_without_what_it_stands_on(tmp_path: Path) -> None:
    settings = small(method="nct", control="soft-edges", control_width=8, noise_levels=4, candidate_every=2)
    run(tmp_path / "run", settings)
    host = SmallHost()
    found = read_tensors(kept(tmp_path / "run")[2])
    assert found and not any(name.endswith(("/a", "/b")) for name in found)
    assert len(found) < len(host.network.state_dict()) * 10


def test_keeping_changes_nothing_of_what_is_learnt(tmp_path: Path) -> None:
    run(tmp_path / "with" / "run", small(candidate_every=1, candidates=2))
    run(tmp_path / "without" / "run", small(candidate_every=0))
    one, other = left(tmp_path / "with" / "run"), left(tmp_path / "without" / "run")
    assert one["state"] == other["state"] and one["metrics"] == other["metrics"]
    same = "state-9/state.safetensors"
    assert one["files"][same] == other["files"][same]


@pytest.mark.parametrize("poll", narrowed([3, 9, 14], 9))
def test_a_run_that_was_cut_ends_with_the_same_candidates(poll: int, tmp_path: Path) -> None:
    """Also those between its last state and its end are made again; of a run with saves far apart."""
    settings = small(candidate_every=1, candidates=3, save_every=4)
    run(tmp_path / "whole" / "run", settings)
    with pytest.raises(Cancelled):
        run(tmp_path / "run", settings, host=SmallHost(on_poll=at_call(poll, Cancelled())))
    # as of a kill: what it kept after its last state goes
    candidates.forget_after(tmp_path / "run", 1)
    run(tmp_path / "run", settings, existing="continue")
    assert left(tmp_path / "run") == left(tmp_path / "whole" / "run")


def test_a_restart_leaves_nothing_of_the_old_run(tmp_path: Path) -> None:
    """Not its candidates, nor what any method had made."""
    folder = tmp_path / "run"
    steps = {"student_steps": 2, "diversity_anchor": 0.5, "diversity_steps": 2, "anchor": 0.5}
    run(folder, small(candidate_every=1, **steps))
    made = {path.name for path in folder.iterdir() if path.is_dir()}
    assert {"candidates", "anchors", "pairs"} <= made
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors") if path.parent.name != "embeddings"}
    run(
        folder,
        small(seed=8, candidate_every=4, student_steps=2, diversity_anchor=0.5, diversity_steps=2),
        existing="restart",
    )
    assert list(kept(folder)) == [4, 8]
    assert not [path for path, content in before.items() if path.is_file() and path.read_bytes() == content]


def test_a_run_may_keep_more_or_fewer_from_now_on(tmp_path: Path) -> None:
    settings = small(candidate_every=1)
    with pytest.raises(Cancelled):
        run(tmp_path / "run", settings, host=SmallHost(on_poll=at_call(14, Cancelled())))
    run(tmp_path / "run", settings.with_(candidate_every=4, choose_by="distance"), existing="continue")
    assert [at for at in kept(tmp_path / "run") if at > 4] == [8]


def test_a_disk_that_refuses_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OneStepError("Cannot write it: No space left on device")

    monkeypatch.setattr(candidates, "write_tensors", full)
    result = run(tmp_path / "run", small(candidate_every=4))
    assert result.path.is_file() and kept(tmp_path / "run") == {}
    assert any("update 4 could not be kept" in note and "No space left" in note for note in result.notes)


@pytest.mark.parametrize("kind", ["another rank", "another role", "cut off", "text"])
def test_what_is_no_candidate_of_the_run_is_refused(kind: str, tmp_path: Path) -> None:
    host, settings, notes = SmallHost(), small(candidate_every=1), []
    roles = host.denoiser.roles
    setup_of(host, settings, tmp_path)
    roles.add("ema", 2, 0)
    roles.add("other", 3 if kind == "another rank" else 2, 0)
    with noticed(notes):
        candidates.keep(tmp_path, 1, roles, "other" if "another" in kind else "ema", settings)
    path = kept(tmp_path)[1]
    if kind in ("cut off", "text"):
        path.write_bytes(path.read_bytes()[:-7] if kind == "cut off" else b"no tensors")
    with pytest.raises(OneStepError) as refused:
        candidates.read(path, roles, "ema")
    assert len(str(refused.value)) < 400 and not notes
    assert json.dumps(str(refused.value)).find("000001.safetensors") > 0
