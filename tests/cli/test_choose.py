"""onestep choose: a finished run's best student becomes its result; what cannot be chosen from is refused in a line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import SHORT, Command

from onestep.core.tensor_file import read_header
from onestep.training.runs.candidates import kept

MORE = ("--steps", "4", "--set", "candidate_every=1", "--set", "learning_rate=0.2", "--set", "warm_up=0")


@pytest.fixture(scope="module")
def keeping(model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from onestep.cli.main import main

    run = tmp_path_factory.mktemp("runs") / "keeping"
    assert main(["distill", str(model), "--prompts", str(prompts), "--out", str(run), *SHORT, *MORE]) == 0
    return run


def copied(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "run"))


def test_the_best_becomes_the_result(onestep: Command, keeping: Path, tmp_path: Path) -> None:
    """By what the run says of its model and prompts; and again by another measure, without drawing it all again."""
    run = copied(keeping, tmp_path)
    last = (run / "result.safetensors").read_bytes()
    assert list(kept(run)) == [1, 2, 3, 4] and not (run / "choice.json").exists()
    said = onestep("choose", run, "--json")
    assert said.code == 0, said.err
    told = json.loads(said.out)
    chosen = json.loads(read_header(run / "result.safetensors").metadata["onestep.chosen"])
    lines = json.loads((run / "choice.json").read_text())["students"]
    assert chosen["value"] == min(line["numbers"]["distance"] for line in lines) and chosen["among"] == len(lines) == 5
    assert told["updates"] == 4 and any("is the result: distance" in note for note in told["notes"])
    assert (run / "choice.png").read_bytes()[:4] == b"\x89PNG"
    assert (chosen["update"] == 4) == (read_header(run / "result.safetensors").metadata["ss_steps"] == "4")
    assert onestep("choose", run, "--by", "content").code == 0
    assert json.loads((run / "choice.json").read_text())["by"] == "content"
    assert last and (run / "state-4" / "complete").is_file()


def test_a_moved_model_is_named(onestep: Command, keeping: Path, model: Path, prompts: Path, tmp_path: Path) -> None:
    run = copied(keeping, tmp_path)
    config = json.loads((run / "config.json").read_text())
    del config["origin"]
    (run / "config.json").write_text(json.dumps(config))
    said = onestep("choose", run)
    assert said.code == 2 and "give --model" in said.message
    assert onestep("choose", run, "--model", model, "--prompts", prompts).code == 0
    other = tmp_path / "other.txt"
    other.write_text("something else\n")
    said = onestep("choose", run, "--model", model, "--prompts", other)
    assert said.code == 2 and "other prompts" in said.message


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: shutil.rmtree(run / "candidates"), "keeps no students to choose from"),
        (lambda run: (run / "config.json").unlink(), "is no run's folder"),
        (lambda run: (run / "config.json").write_text("[]"), "is not a run's"),
        (lambda run: (run / "config.json").write_text("{"), "cannot be read"),
        (lambda run: [shutil.rmtree(path) for path in run.glob("state-*")], "there is no run"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(
    spoil, words: str, onestep: Command, keeping: Path, tmp_path: Path
) -> None:
    run = copied(keeping, tmp_path)
    spoil(run)
    before = sorted(run.rglob("*"))
    said = onestep("choose", run)
    assert said.code == 2 and words in said.message and len(said.message) < 400
    assert sorted(run.rglob("*")) == before


def test_a_folder_that_is_not_there_and_a_measure_that_is_none(onestep: Command, keeping: Path, tmp_path: Path) -> None:
    assert "is no run's folder" in onestep("choose", tmp_path / "nowhere").message
    said = onestep("choose", keeping, "--by", "beauty")
    assert said.code == 2 and "beauty" in said.message


def test_broken_candidates_are_left_out(onestep: Command, keeping: Path, tmp_path: Path) -> None:
    run = copied(keeping, tmp_path)
    for path in kept(run).values():
        path.write_bytes(b"broken")
    said = onestep("choose", run, "--json")
    assert said.code == 0, said.err
    notes = json.loads(said.out)["notes"]
    assert sum("is left out" in note for note in notes) == 3, notes


@pytest.mark.broad
def test_a_sum_of_the_students_is_searched_for(onestep: Command, keeping: Path, tmp_path: Path) -> None:
    """Said whether it is taken; again, nothing is drawn again."""
    run = copied(keeping, tmp_path)
    before = (run / "result.safetensors").read_bytes()
    said = onestep("combine", run, "--evaluations", "2", "--json")
    assert said.code == 0, said.err
    found = json.loads((run / "combination.json").read_text())
    assert len(found["measured"]) == found["result"]["evaluations"] == 2
    assert found["result"]["taken"] or (run / "result.safetensors").read_bytes() == before
    assert onestep("combine", run, "--evaluations", "2").code == 0
    assert json.loads((run / "combination.json").read_text()) == found
    said = onestep("combine", run, "--evaluations", "1")
    assert said.code == 2 and "a search measures 2 sums at least" in said.message
    assert "is no run's folder" in onestep("combine", tmp_path / "nowhere").message
