"""Whole runs on a small real host: what they leave, what they refuse, and that going on is as if nothing had been."""

from __future__ import annotations

import builtins
import errno
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from narrowed import narrowed
from PIL import Image
from small_host import NAMES, PROMPTS, SmallHost, small
from whole_runs import Cancelled, at_call, factors, left, newest, run

from onestep.core.errors import OneStepError
from onestep.core.lora_file import load_lora, save_lora
from onestep.core.recipe import Recipe
from onestep.core.tensor_file import read_header, read_tensors
from onestep.training.distil import Progress, Stopped, distil

METHODS = {
    "dmd": small(),
    "vsd": small(method="vsd", student_steps=2, anchor=0.5, separate_levels=True, follow=0.1),
    "regression": small(method="regression", steps=6, student_steps=4, ema=0.0, sizes="32x32,40x24"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One uninterrupted run of each method."""
    folders = {name: tmp_path_factory.mktemp("whole") / "run" for name in METHODS}
    for name, folder in folders.items():
        run(folder, METHODS[name])
    return folders


# -- what a run leaves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", narrowed(["epsilon", "v_prediction", "sample", "flow"], "epsilon", "flow"))
def test_a_run_leaves_a_lora_with_its_recipe(tmp_path: Path, prediction: str) -> None:
    seen: list[Progress] = []
    host = SmallHost(prediction)
    before = host.base_hash
    result = run(tmp_path / "my run", small(), host=host, report=lambda progress: seen.append(progress))
    file = load_lora(result.path)
    assert file.family == "unet" and set(file.state) == set(NAMES.values())
    assert all(len(a) == 2 and a.isfinite().all() and b.any() for a, b in file.state.values())
    assert file.recipe is not None and Recipe.from_json(file.recipe) == result.recipe
    assert result.check == "7 layers read back" and result.role in ("ema", "student")
    assert json.loads(file.metadata["onestep.settings"])["rank"] == 2
    assert "onestep.prompts" not in read_header(result.path).metadata
    before_that = [progress for progress in seen if progress.preparing]
    told = [(progress.phase, progress.done, progress.of) for progress in before_that]
    assert told[:2] == [("encoding prompts", 0, 6), ("encoding prompts", 6, 6)]
    seen = [progress for progress in seen if not progress.preparing]
    assert [progress.update for progress in seen] == list(range(10))
    assert all((progress.done, progress.of) == (progress.update, 9) for progress in seen)
    # too few updates to know the time to go
    assert all(math.isnan(progress.eta) for progress in seen)
    assert [line["update"] for line in result.metrics] == list(range(10))
    phases = ["before training"] + ["warm start"] * 3 + ["critic"] * 2 + ["dmd"] * 4
    assert [line["phase"] for line in result.metrics] == phases == [progress.phase for progress in seen]
    assert host.base_hash == before and host.denoiser.roles.names() == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in host.network.modules())


def test_a_run_says_first_with_which_of_comfyuis_nodes_it_will_draw(tmp_path: Path) -> None:
    """Before its first update, on the panel and the command's screen; the file's header says the same."""
    seen: list[Progress] = []
    result = run(tmp_path / "run", small(start=0.0), report=seen.append)
    hint = read_header(result.path).metadata["modelspec.usage_hint"]
    assert seen[0].update == 0 and hint in seen[0].notes and hint in result.notes
    assert "KSampler (Advanced) with steps 8" in hint and "start_at_step 3, end_at_step 4" in hint


def test_previews_show_teacher_above_student(whole: dict[str, Path]) -> None:
    """Of the untrained student first, of the finished one last, though 4 does not divide 9."""
    pictures = sorted(path.name for path in (whole["dmd"] / "previews").iterdir())
    assert pictures == ["000000.png", "000004.png", "000008.png", "000009.png"]
    with Image.open(whole["dmd"] / "previews" / "000000.png") as image:
        assert image.size == (2 * (64 + 4), 2 * (64 + 4))


def test_the_folder_may_be_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a person writes it, from home."""
    monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(tmp_path))
    result = distil(SmallHost(), PROMPTS, small(method="regression", steps=1), "~/runs/first")
    assert result.run == tmp_path / "runs" / "first" and result.path.parent == result.run


def test_prompts_go_into_the_file_only_where_asked(tmp_path: Path) -> None:
    result = run(tmp_path / "run", small(keep_prompts=True, method="regression", steps=1))
    assert json.loads(read_header(result.path).metadata["onestep.prompts"]) == PROMPTS


def test_the_same_settings_make_the_same_file(whole: dict[str, Path], tmp_path: Path) -> None:
    """And another seed makes another."""
    run(tmp_path / "again", METHODS["dmd"])
    assert left(tmp_path / "again")["metrics"] == left(whole["dmd"])["metrics"]
    ours, theirs = (factors(folder / "result.safetensors") for folder in (tmp_path / "again", whole["dmd"]))
    assert ours == theirs
    run(tmp_path / "other", small(seed=4))
    assert factors(tmp_path / "other" / "result.safetensors") != theirs


def test_checkpointing_changes_no_result(whole: dict[str, Path], tmp_path: Path) -> None:
    run(tmp_path / "run", small(checkpointing=False))
    ours, theirs = (read_tensors(folder / "result.safetensors") for folder in (tmp_path / "run", whole["dmd"]))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_the_same(whole: dict[str, Path], tmp_path: Path, around: Any) -> None:
    host = SmallHost()
    with around():
        run(tmp_path / "run", host=host)
    assert left(tmp_path / "run") == left(whole["dmd"])


def test_two_runs_on_one_host_do_not_know_of_each_other(whole: dict[str, Path], tmp_path: Path) -> None:
    """Of another method, rank and schedule of phases: no role, hook or cache is left from the first."""
    host = SmallHost()
    run(tmp_path / "first", small(method="vsd", rank=3), host=host)
    run(tmp_path / "second" / "run", METHODS["regression"], host=host)
    assert left(tmp_path / "second" / "run") == left(whole["regression"])


def test_prompts_are_embedded_once(tmp_path: Path) -> None:
    """Six texts, the negative one among them; a run that goes on reads them from its folder."""
    host = SmallHost()
    with pytest.raises(Cancelled):
        run(tmp_path / "run", host=host, report=lambda progress: at_call(1, Cancelled())() if progress.update else None)
    assert host.encoded == 6
    run(tmp_path / "run", host=host, existing="continue")
    assert host.encoded == 6


def test_a_run_starts_from_an_initial_lora(tmp_path: Path) -> None:
    """Of less rank, on some layers: the rest is as new. The student's first pictures are that LoRA's."""
    first = run(tmp_path / "first", small(rank=1, method="regression", steps=3))
    state = load_lora(first.path).state
    part = {name: state[name] for name in list(state)[:4]}
    save_lora(tmp_path / "part.safetensors", part, "unet")
    settings = small(rank=3, initial_lora=str(tmp_path / "part.safetensors"), steps=1, warm_start=1, learning_rate=0.0)
    result = run(tmp_path / "second", settings.with_texts({"warm_start_rate": "0"}))
    found = load_lora(result.path).state
    for name, (a, b) in found.items():
        product = b.flatten(1) @ a.flatten(1)
        wanted = part[name][1].flatten(1) @ part[name][0].flatten(1) if name in part else torch.zeros_like(product)
        torch.testing.assert_close(product, wanted)
    cut = run(tmp_path / "third", small(initial_lora=str(result.path)))
    assert any("of rank 3 is cut to 2, which keeps" in note for note in cut.notes)


# -- cancelled, finished, continued -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("poll", narrowed([1, 4, 8, 17, 21, 29], 8))
def test_a_cancelled_run_goes_on_to_the_same_end(whole: dict[str, Path], tmp_path: Path, name: str, poll: int) -> None:
    """Whenever the person cancels: in a pair, between the turns of an update, in the watch. To the bit, metrics too."""
    host = SmallHost(on_poll=at_call(poll, Cancelled()))
    try:
        run(tmp_path / "run", METHODS[name], host=host)
    except Cancelled:
        run(tmp_path / "run", METHODS[name], existing="continue")
    assert left(tmp_path / "run") == left(whole[name])


def test_a_cancelled_run_leaves_a_partial_lora(tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.update == 7:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(tmp_path / "run", report=stop)
    assert set(load_lora(tmp_path / "run" / "partial.safetensors").state) == set(NAMES.values())
    assert not (tmp_path / "run" / "result.safetensors").exists()
    run(tmp_path / "run", existing="continue")
    assert not (tmp_path / "run" / "partial.safetensors").exists()
    assert (tmp_path / "run" / "result.safetensors").exists()


def test_a_resumed_run_is_not_a_cold_start(whole: dict[str, Path], tmp_path: Path) -> None:
    """The state is used: with its factors spoilt, the end is another."""
    with pytest.raises(Cancelled):
        run(tmp_path / "run", host=SmallHost(on_poll=at_call(25, Cancelled())))
    state = newest(tmp_path / "run") / "state.safetensors"
    data = bytearray(state.read_bytes())
    data[-64:] = bytes(64)
    state.write_bytes(bytes(data))
    run(tmp_path / "run", existing="continue")
    assert left(tmp_path / "run")["files"] != left(whole["dmd"])["files"]


def test_a_finished_run_continued_is_finished(whole: dict[str, Path], tmp_path: Path) -> None:
    run(tmp_path / "run")
    run(tmp_path / "run", existing="continue")
    assert left(tmp_path / "run") == left(whole["dmd"])


# -- what is already there --------------------------------------------------------------------------------------------


def test_continuing_what_is_not_there_starts_anew(tmp_path: Path) -> None:
    result = run(tmp_path / "run", existing="continue")
    assert result.updates == 9 and not any("run" in note for note in result.notes), "a first run is no news"


def test_an_existing_run_is_not_touched_unasked(tmp_path: Path) -> None:
    run(tmp_path / "run")
    before = left(tmp_path / "run")
    with pytest.raises(OneStepError, match="a run is already in .*: continue it, restart it, or give another name"):
        run(tmp_path / "run")
    with pytest.raises(OneStepError, match=r"has other settings, rank \(2 there, 3 now\): restart it"):
        run(tmp_path / "run", small(rank=3), existing="continue")
    with pytest.raises(OneStepError, match="has other prompts"):
        distil(SmallHost(), ["something else"], small(), tmp_path / "run", existing="continue")
    with pytest.raises(OneStepError, match="has other base"):
        run(tmp_path / "run", host=SmallHost(seed=1), existing="continue")
    assert left(tmp_path / "run") == before


def test_a_restarted_run_knows_nothing_of_the_old_one(whole: dict[str, Path], tmp_path: Path) -> None:
    """Pairs and the watch's reference of other settings are gone; files that are not ours stay."""
    run(tmp_path / "run", small(seed=9, guidance=1.0, teacher_steps=2))
    (tmp_path / "run" / "notes.txt").write_text("mine")
    run(tmp_path / "run", existing="restart")
    assert left(tmp_path / "run") == left(whole["dmd"])
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_restarting_a_folder_that_is_no_run_deletes_nothing(tmp_path: Path) -> None:
    (tmp_path / "previews").mkdir()
    (tmp_path / "previews" / "holiday.png").write_bytes(b"mine")
    run(tmp_path, existing="restart")
    assert (tmp_path / "previews" / "holiday.png").read_bytes() == b"mine"


def test_a_run_is_locked_while_it_runs(tmp_path: Path) -> None:
    """For this process and for any other; the lock dies with the process that holds it."""
    refusals: list[str] = []
    script = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'a+b'), fcntl.LOCK_EX | fcntl.LOCK_NB)"

    def intrude(progress: Progress) -> None:
        if progress.update == 2:
            with pytest.raises(OneStepError) as caught:
                run(tmp_path / "run", existing="continue")
            refusals.append(str(caught.value))
            other = subprocess.run(
                [sys.executable, "-c", script, str(tmp_path / "run" / "run.lock")], capture_output=True
            )
            assert b"BlockingIOError" in other.stderr

    if os.name == "nt":
        pytest.skip("the script is for POSIX")
    run(tmp_path / "run", report=intrude)
    assert len(refusals) == 1 and "being trained by another process" in refusals[0]
    run(tmp_path / "run", existing="continue")


# -- numbers that are none --------------------------------------------------------------------------------------------


def test_lost_numbers_stop_the_run_at_its_last_good_state(tmp_path: Path) -> None:
    """From update 6 on all is NaN: dropped, counted, back to the last good state, and why; no file as a result."""
    host = SmallHost()

    def report(progress: Progress) -> None:
        if progress.update == 6:
            host.network.register_forward_hook(lambda *args: args[2] * math.nan)

    settings = small(steps=30, patience=4, save_every=2)
    with pytest.raises(
        Stopped, match=r"\d steps in a row were no numbers .*back at the state after update \d.*learning_rate"
    ):
        run(tmp_path / "run", settings, host=host, report=report)
    assert not (tmp_path / "run" / "result.safetensors").exists()
    tensors = read_tensors(newest(tmp_path / "run") / "state.safetensors")
    assert all(bool(value.isfinite().all()) for value in tensors.values())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for line in lines:
        json.loads(line, parse_constant=pytest.fail)
    # mended, the run goes on
    assert run(tmp_path / "run", settings, existing="continue").updates == settings.steps + 5


def test_a_single_lost_step_is_dropped_and_the_run_goes_on(tmp_path: Path) -> None:
    host, calls = SmallHost(), iter(range(10**6))

    def once(*args: Any) -> Any:
        return args[2] * math.nan if torch.is_grad_enabled() and next(calls) == 5 else None

    host.network.register_forward_hook(once)
    result = run(tmp_path / "run", host=host)
    assert result.updates == 9
    notes = json.loads((newest(tmp_path / "run") / "state.json").read_text())
    assert notes["counters"]["dropped"] == 1
    assert all(bool(f.isfinite().all()) for pair in load_lora(result.path).state.values() for f in pair)
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


# -- the disk ---------------------------------------------------------------------------------------------------------


def full(calls: list[int], at: int) -> None:
    calls.append(1)
    if len(calls) >= at:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("at", narrowed([1, 2, 5, 6, 7, 8, 12, 15, 20, 23], 1, 7, 20))
def test_a_full_disk_is_said_and_the_last_state_is_intact(
    whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, at: int
) -> None:
    """Whichever write meets it; with space again, the run goes on to the same end."""
    real: Callable[..., Any] = getattr(os, call)
    calls: list[int] = []
    monkeypatch.setattr(os, call, lambda *args: full(calls, at) or real(*args))
    with pytest.raises(OneStepError, match=os.strerror(errno.ENOSPC)) as caught:
        run(tmp_path / "run")
    assert len(str(caught.value)) < 400 + len(str(tmp_path))
    monkeypatch.undo()
    leftovers = [path for path in (tmp_path / "run").rglob("*") if path.name.endswith((".tmp", ".part"))]
    assert leftovers == []
    run(tmp_path / "run", existing="continue")
    ours, theirs = left(tmp_path / "run"), left(whole["dmd"])
    notes = ours["state"].pop("notes")
    assert theirs["state"].pop("notes") == [] and all("started anew" in note for note in notes)
    assert ours == theirs


def test_a_state_without_room_leaves_the_last_and_what_was_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, folder = os.replace, tmp_path / "run"

    def refuse(there: Any, here: Any) -> None:
        if Path(here).name == "state.safetensors" and (folder / "state-2").is_dir():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(there, here)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OneStepError, match="The last state is intact"):
        run(folder)
    assert newest(folder).name == "state-2" and (newest(folder) / "complete").is_file()
    assert set(load_lora(folder / "partial.safetensors").state) == set(NAMES.values())
    monkeypatch.undo()
    run(folder, existing="continue")
    assert (folder / "result.safetensors").is_file() and not (folder / "partial.safetensors").exists()


def test_a_full_disk_while_logging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.open

    def refuse(file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        if mode == "a" and str(file).endswith("metrics.jsonl"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, mode, *args, **more)

    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(OneStepError, match="metrics.jsonl in .* could not be written"):
        run(tmp_path / "run")


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", narrowed(["cut", "emptied", "gone", "garbage"], "cut", "gone"))
def test_a_damaged_state_is_passed_over(whole: dict[str, Path], tmp_path: Path, file: str, damage: str) -> None:
    """The one before it is whole: the run goes on from there to the same end."""
    with pytest.raises(Cancelled):
        run(tmp_path / "run", host=SmallHost(on_poll=at_call(27, Cancelled())))
    path = newest(tmp_path / "run") / file
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "emptied": b"", "garbage": os.urandom(len(data))}[damage])
    run(tmp_path / "run", existing="continue")
    assert left(tmp_path / "run") == left(whole["dmd"])


def test_a_torn_line_of_metrics_is_dropped(whole: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        run(tmp_path / "run", host=SmallHost(on_poll=at_call(27, Cancelled())))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as metrics:
        metrics.write('{"update": 99, "ph')
    run(tmp_path / "run", existing="continue")
    assert left(tmp_path / "run") == left(whole["dmd"])
