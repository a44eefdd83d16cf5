"""Which student becomes the result: the best of those that were kept, by a measure; said in the file, and drawn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from narrowed import narrowed
from PIL import Image
from small_host import SmallHost
from spoiled_runs import settings_of, spoiled, spoiled_run
from whole_runs import Cancelled, left, run

from onestep.core.lora_file import load_lora
from onestep.core.recipe import step_files
from onestep.core.tensor_file import read_header, read_tensors
from onestep.training.runs.candidates import kept
from onestep.training.watch.choice import HEADER, Student, ranked

CHOOSING = "choosing among the students"


def test_the_best_is_first_and_what_is_no_number_last() -> None:
    values = {3: 0.5, 5: float("nan"), 6: 0.2, 7: 0.2, 9: float("inf")}
    students = [Student(at, "ema", str(at), numbers={"distance": value}) for at, value in values.items()]
    assert [student.update for student in ranked(students, "distance")][:3] == [7, 6, 3]
    assert {student.update for student in ranked(students, "distance")[3:]} == {5, 9}
    assert [student.update for student in ranked(students, "no such")] == [9, 7, 6, 5, 3]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a spoiled run that nothing befell came to."""
    return spoiled_run(tmp_path_factory.mktemp("whole") / "run")


def test_an_earlier_student_becomes_the_result_where_the_last_is_worse(whole: Any) -> None:
    result = whole
    told = json.loads(read_header(result.path).metadata[HEADER])
    lines = json.loads((result.run / "choice.json").read_text())["students"]
    measured = {line["update"]: line["numbers"]["distance"] for line in lines if line["file"]}
    assert list(measured) == sorted(measured, key=lambda at: measured[at]) and len(measured) == 8
    # the least of those that were measured while it learnt; there in float32
    seen = {line["update"]: line["distance"] for line in result.metrics if 0 < line["update"] <= 7}
    assert all(measured[at] == pytest.approx(seen[at], rel=0.05) for at in seen)
    assert told["update"] == lines[0]["update"] == min(measured, key=lambda at: measured[at]) <= 7
    assert (told["of"], told["by"], told["among"], told["kept_as"]) == (9, "distance", 10, "bfloat16")
    assert told["value"] == measured[told["update"]] < told["last"]
    file = read_tensors(kept(result.run)[told["update"]])
    for name, (a, b) in load_lora(result.path).state.items():
        assert torch.equal(a, file[f"ema/{name}/a"].float()) and torch.equal(b, file[f"ema/{name}/b"].float())
    assert read_header(result.path).metadata["ss_steps"] == str(told["update"])
    assert any(f"after update {told['update']} is the result" in note for note in result.notes)


def test_the_last_is_the_result_where_it_is_the_best(tmp_path: Path) -> None:
    """Of what the watch measures to be the same, the later one."""
    result = run(tmp_path / "run", settings_of(learning_rate=0.0, warm_start_rate=0.0, ema=0.0))
    told = json.loads(read_header(result.path).metadata[HEADER])
    assert told["update"] == told["of"] == 9 and told["kept_as"] == "float32" and result.role == "student"
    last = settings_of(choose_by="last")
    assert HEADER not in read_header(run(tmp_path / "other", last).path).metadata


def test_all_are_drawn_under_what_is_to_be_drawn(whole: Any) -> None:
    with Image.open(whole.run / "choice.png") as grid:
        # the teacher's row and ten students', two pictures of 32 pixels each, enlarged twofold, with their frames
        assert grid.height == 11 * (64 + 4) and grid.width == 190 + 2 * (64 + 4)
    assert whole.preview is not None and whole.preview.name == "chosen.png"
    with Image.open(whole.preview) as chosen, Image.open(whole.run / "previews" / "000009.png") as end:
        assert chosen.size == end.size and chosen.tobytes() != end.tobytes()


def test_the_host_and_the_run_are_as_they_were(whole: Any, tmp_path: Path) -> None:
    """What was chosen changes no state: a run that is given more updates goes on from its last."""
    spoiled_run(tmp_path / "last" / "run", choose_by="last")
    same = "state-9/state.safetensors"
    assert left(whole.run)["files"][same] == left(tmp_path / "last" / "run")["files"][same]


@pytest.mark.parametrize("done", narrowed([1, 4], 4))
def test_a_run_that_is_cut_while_it_chooses_chooses_the_same(whole: Any, done: int, tmp_path: Path) -> None:
    host = SmallHost()
    spoil = spoiled(host, 7)

    def report(now: Any) -> None:
        spoil(now)
        if now.phase == CHOOSING and now.done == done:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(tmp_path / "run", settings_of(), host=host, report=report)
    assert not (tmp_path / "run" / "result.safetensors").exists()
    run(tmp_path / "run", settings_of(), existing="continue")
    assert left(tmp_path / "run") == left(whole.run)


def test_what_was_measured_once_is_not_drawn_again(whole: Any, tmp_path: Path) -> None:
    result = Path(shutil.copytree(whole.run, tmp_path / "run")) / "result.safetensors"
    before, forwards, host = result.read_bytes(), [], SmallHost()
    host.network.register_forward_hook(lambda *args: forwards.append(1))
    run(tmp_path / "run", settings_of(preview_every=0).with_(preview_every=4), host=host, existing="continue")
    assert result.read_bytes() == before
    assert len(forwards) == 2, "the preview of the chosen one, in slices of a batch"
    (tmp_path / "run" / "choice.json").write_text('{"students": 3}')
    run(tmp_path / "run", settings_of(), host=host, existing="continue")
    assert len(forwards) > 20 and result.read_bytes() == before


class Full(SmallHost):
    """Has no room for more than ``rows`` samples while a run chooses."""

    rows, choosing = 10**9, False

    def __post_init__(self) -> None:
        super().__post_init__()

        def refuse(network: Any, inputs: Any) -> None:
            if self.choosing and len(inputs[0]) > self.rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        self.network.register_forward_pre_hook(refuse)


@pytest.mark.parametrize(("rows", "words"), [(1, "in slices of 1 from here on"), (0, "the result is the last student")])
def test_memory_that_runs_out_while_it_chooses(whole: Any, rows: int, words: str, tmp_path: Path) -> None:
    host = Full()
    spoil = spoiled(host, 7)

    def report(now: Any) -> None:
        spoil(now)
        host.rows, host.choosing = rows, host.choosing or (now.update == 9 and not now.preparing)

    result = run(tmp_path / "run", settings_of(preview_every=0), host=host, report=report)
    assert any(words in note for note in result.notes), result.notes
    same = load_lora(result.path).state, load_lora(whole.path).state
    assert all(torch.equal(same[0][name][1], same[1][name][1]) for name in same[0]) == (rows > 0)


@pytest.mark.parametrize("content", [b"", b"no tensors", None], ids=["empty", "text", "cut off"])
def test_a_broken_candidate_is_left_out_with_a_word(whole: Any, content: bytes | None, tmp_path: Path) -> None:
    shutil.copytree(whole.run, tmp_path / "run")
    best = json.loads(read_header(whole.path).metadata[HEADER])["update"]
    path = kept(tmp_path / "run")[best]
    path.write_bytes(path.read_bytes()[:-3] if content is None else content)
    again = run(tmp_path / "run", settings_of(), existing="continue")
    told = json.loads(read_header(again.path).metadata[HEADER])
    assert told["update"] != best and told["among"] == 9
    assert any(f"the candidate after update {best} is left out" in note for note in again.notes)


def test_a_student_of_several_loras_is_chosen_whole(tmp_path: Path) -> None:
    result = spoiled_run(tmp_path / "run", student_steps=2, step_loras=True)
    told = json.loads(read_header(result.path).metadata[HEADER])
    assert told["kept_as"] == "bfloat16"
    file = read_tensors(kept(tmp_path / "run")[told["update"]])
    for part, path in zip(("ema", "ema@2"), step_files(result.path, result.recipe), strict=True):
        for name, (a, b) in load_lora(path).state.items():
            assert torch.equal(a, file[f"{part}/{name}/a"].float()) and torch.equal(b, file[f"{part}/{name}/b"].float())
