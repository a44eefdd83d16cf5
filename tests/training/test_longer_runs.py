"""A run that goes on with more than it had, of updates or of what its teacher makes; or with its LoRA elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from narrowed import narrowed
from small_host import PROMPTS, SmallHost, small
from tiny_pipelines import sd
from whole_runs import Cancelled, at_call, factors, left, newest, run

from onestep.core.errors import OneStepError
from onestep.core.tensor_file import read_tensors
from onestep.pipelines.adapt import adapt
from onestep.training.distil import distil
from onestep.training.settings import Settings

EVEN: dict[str, Any] = {"final_rate": 1.0, "warm_up": 1, "watch_every": 0, "preview_every": 0}
"""Step sizes that do not tell how long a run is, and no looks at its end."""


def learnt(folder: Path) -> dict[str, Any]:
    """What a run leaves, but for its notes and for the settings in its file's header."""
    found = left(folder)
    found["state"].pop("notes")
    return found


@pytest.mark.parametrize("method", narrowed(["dmd", "regression"], "dmd"))
def test_a_longer_run_is_what_it_would_have_been_from_the_start(method: str, tmp_path: Path) -> None:
    """To the bit, where the step size does not fall; the file's header tells the settings as they are now."""
    run(tmp_path / "at once" / "run", small(method=method, steps=7, **EVEN))
    short = run(tmp_path / "in two" / "run", small(method=method, **EVEN))
    longer = run(tmp_path / "in two" / "run", small(method=method, steps=7, **EVEN), existing="continue")
    assert (
        longer.updates == short.updates + 3
        and f"went on after {short.updates} updates with steps 4 -> 7" in longer.notes
    )
    assert learnt(tmp_path / "in two" / "run") == learnt(tmp_path / "at once" / "run")


def test_its_step_size_falls_over_all_its_updates(tmp_path: Path) -> None:
    """To nothing at the shorter one's end, which is the middle of the longer one: there it is half its height, and an
    AdamW step is about as long."""
    falls: dict[str, Any] = {"method": "regression", "warm_up": 1, "final_rate": 0.0, "ema": 0.0}
    run(tmp_path / "run", small(steps=4, **falls))
    before = read_tensors(newest(tmp_path / "run") / "state.safetensors")
    run(tmp_path / "run", small(steps=8, **falls), existing="continue", report=lambda progress: progress.update == 5)
    after = read_tensors(newest(tmp_path / "run") / "state.safetensors")
    moved = max(float((after[name] - before[name]).abs().max()) for name in after if name.startswith("student/"))
    assert moved == pytest.approx(0.5e-2, rel=0.1)


@pytest.mark.parametrize("poll", narrowed([1, 4], 4))
def test_killed_after_it_was_adjusted_it_goes_on_so(tmp_path: Path, poll: int) -> None:
    """Its config and its notes tell the other numbers from the first on."""
    run(tmp_path / "whole" / "run")
    longer = run(tmp_path / "whole" / "run", small(steps=7, pairs=16), existing="continue")
    run(tmp_path / "cut" / "run")
    with pytest.raises(Cancelled):
        host = SmallHost(on_poll=at_call(poll, Cancelled()))
        run(tmp_path / "cut" / "run", small(steps=7, pairs=16), host=host, existing="continue")
    told = json.loads((tmp_path / "cut" / "run" / "config.json").read_text())["settings"]
    assert (told["steps"], told["pairs"]) == (7, 16)
    again = run(tmp_path / "cut" / "run", small(steps=7, pairs=16), existing="continue")
    assert learnt(tmp_path / "cut" / "run") == learnt(tmp_path / "whole" / "run")
    assert again.notes == longer.notes and "went on after 9 updates with steps 4 -> 7, pairs 8 -> 16" in again.notes


def test_too_long_a_run_is_shortened(tmp_path: Path) -> None:
    """Down to what it has done; before that nothing is written."""
    run(tmp_path / "at once" / "run", small(steps=3, **EVEN))
    run(tmp_path / "run", small(steps=400, **EVEN), report=lambda progress: progress.update == 7)
    config = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(OneStepError, match="has done 7 updates, more than the 6 that it would have now: raise steps"):
        run(tmp_path / "run", small(steps=1, **EVEN), existing="continue")
    assert (tmp_path / "run" / "config.json").read_bytes() == config
    shorter = run(tmp_path / "run", small(steps=3, **EVEN), existing="continue")
    assert shorter.updates == 8 and learnt(tmp_path / "run") == learnt(tmp_path / "at once" / "run")


@pytest.mark.parametrize(
    ("method", "folder"),
    narrowed([("regression", "pairs"), ("guidance-lora", "trajectories"), ("nct", "triples")], ("regression", "pairs")),
)
def test_more_pairs_leave_those_that_are_there(method: str, folder: str, tmp_path: Path) -> None:
    """The blocks of the shorter run and the new ones are those of a run that had as many from the start."""
    options: dict[str, Any] = {"method": method, "guidance": 3.0, "sizes": "16x16", "ema": 0.0}
    options |= {"control_width": 8} if method == "nct" else {}

    def made(place: str, existing: str, **more: int) -> dict[str, bytes]:
        run(tmp_path / place / "run", small(**options, **EVEN, **more), existing=existing)
        return {path.name: path.read_bytes() for path in (tmp_path / place / "run" / folder).iterdir()}

    first = made("in two", "stop", pairs=8, steps=2)
    later = made("in two", "continue", pairs=16, steps=20)
    assert len(first) == 2 and len(later) == 4 and first.items() <= later.items()
    assert later == made("at once", "stop", pairs=16, steps=20)


def test_what_may_not_change_is_refused_and_named_alone(tmp_path: Path) -> None:
    run(tmp_path / "run")
    before = left(tmp_path / "run"), (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(OneStepError, match=r"has other settings, rank \(2 there, 3 now\): restart it"):
        run(tmp_path / "run", small(steps=7, rank=3), existing="continue")
    with pytest.raises(OneStepError, match="has other base"):
        run(tmp_path / "run", small(steps=7), host=SmallHost(seed=1), existing="continue")
    assert (left(tmp_path / "run"), (tmp_path / "run" / "config.json").read_bytes()) == before


def test_a_run_of_a_later_version_is_refused(tmp_path: Path) -> None:
    """Its settings hold one that is not known here."""
    run(tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"settings": config["settings"] | {"unheard_of": 7}}))
    for steps in (4, 7):
        with pytest.raises(OneStepError, match="has other settings: restart it"):
            run(tmp_path / "run", small(steps=steps), existing="continue")


def test_suns_pairs_may_not_change(tmp_path: Path) -> None:
    """Its segments are drawn among as many texts as there are pairs: with more of them, each would be of another."""
    torch.manual_seed(0)
    host = adapt(sd(), device="cpu")

    def sun(**more: int) -> Settings:
        quiet = {"watch_every": 0, "preview_every": 0, "sizes": "16x16", "batch": 2, "negatives": "people, blurry"}
        return small(method="sun", segment_steps=2, **{**quiet, "pairs": 4, "steps": 1, **more})

    distil(host, PROMPTS, sun(), tmp_path / "run")
    with pytest.raises(OneStepError, match=r"pairs \(4 there, 300 now\): restart it"):
        distil(host, PROMPTS, sun(steps=2, pairs=300), tmp_path / "run", existing="continue")
    assert distil(host, PROMPTS, sun(steps=2), tmp_path / "run", existing="continue").updates == 2


@pytest.mark.broad
def test_an_initial_lora_may_lie_elsewhere_but_must_be_the_same(tmp_path: Path) -> None:
    first, other = (run(tmp_path / name, small(seed=seed)).path for name, seed in (("first", 3), ("other", 4)))
    run(tmp_path / "whole" / "run", small(initial_lora=str(first), steps=6))
    with pytest.raises(Cancelled):
        host = SmallHost(on_poll=at_call(20, Cancelled()))
        run(tmp_path / "run", small(initial_lora=str(first), steps=6), host=host)
    (tmp_path / "elsewhere").mkdir()
    moved = first.rename(tmp_path / "elsewhere" / "renamed.safetensors")
    with pytest.raises(OneStepError, match=r"other settings, initial_lora \(sha256 \w{16} there, sha256 \w{16} now\)"):
        run(tmp_path / "run", small(initial_lora=str(other), steps=6), existing="continue")
    with pytest.raises(OneStepError, match=r"other settings, initial_lora \(sha256 \w{16} there, none now\)"):
        run(tmp_path / "run", small(steps=6), existing="continue")
    config = tmp_path / "run" / "config.json"
    told = json.loads(config.read_text())
    # as an earlier version wrote it: by its place, which is known again while it lies there
    config.write_text(json.dumps(told | {"settings": told["settings"] | {"initial_lora": str(moved)}}))
    with pytest.raises(OneStepError, match=r"initial_lora \(sha256 \w{16} there, sha256 \w{16} now\)"):
        run(tmp_path / "run", small(initial_lora=str(other), steps=6), existing="continue")
    result = run(tmp_path / "run", small(initial_lora=str(moved), steps=6), existing="continue")
    assert factors(result.path) == factors(tmp_path / "whole" / "run" / "result.safetensors")
