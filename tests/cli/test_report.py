"""A run's report: a picture to share whose figures are the run's own, and in which nothing is private."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import SHORT, Command
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from onestep.cli.report import KEY, facts_of, last_preview, metrics_of, seconds_an_update, shareable
from onestep.training.methods import settings_for

SECRET = "a portrait of my neighbour"
ROWS = [
    {"update": 0, "phase": "before training", "seconds": 9.0, "distance": 0.7},
    *({"update": update, "phase": "warm start", "seconds": update / 10} for update in (1, 2, 3)),
    {"update": 4, "phase": "dmd", "seconds": 2.0, "distance": 0.2, "peak_bytes": 2**30},
    {"update": 5, "phase": "dmd", "seconds": 4.0, "distance": 0.3, "peak_bytes": 2**29},
    {"update": 6, "phase": "dmd", "seconds": float("nan"), "distance": float("nan")},
]


def folder_of(folder: Path, rows: list[dict], **config: object) -> Path:
    folder.mkdir()
    settings = settings_for("dmd", rank=8, negative=SECRET, initial_lora="pictures-of-anna/secret.safetensors").flat()
    told = {"settings": settings, "checkpoint": SECRET, "device": "cpu", "versions": {"torch": "2.13.0"}} | config
    (folder / "config.json").write_text(json.dumps(told))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_figures_are_the_runs(tmp_path):
    facts = facts_of(folder_of(tmp_path / "run", ROWS))
    assert facts["updates"] == 6 and facts["peak_bytes"] == 2**30
    assert facts["seconds_an_update"] == {"warm start": 0.2, "dmd": 3.0}  # medians; what is no number does not count
    assert facts["measures"]["first"] == {"update": 0, "distance": 0.7}
    assert facts["measures"]["best"] == {"update": 4, "distance": 0.2}
    planned = folder_of(tmp_path / "planned", ROWS, plan={"line": "A run fits as it is set.", "rung": None})
    assert facts_of(planned)["plan"] == "A run fits as it is set." and facts["plan"] is None
    assert facts["measures"]["last"] == {"update": 5, "distance": 0.3}


def test_texts_of_a_person_are_told_to_be_there_and_no_more():
    told = dict(shareable(settings_for("dmd", rank=8, negative=SECRET, targets="attention").flat()))
    assert told == {"rank": 8, "negative": "(given)", "targets": "attention"}


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    run = folder_of(tmp_path / "run", ROWS[:3])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"update": 3, "pha')
    assert [row["update"] for row in metrics_of(run)] == [0, 1, 2]
    assert seconds_an_update([]) == {}


def test_nothing_private_is_in_the_file(onestep: Command, tmp_path):
    run = folder_of(tmp_path / "run", ROWS)
    said = onestep("report", run, "--json")
    path = run / "report.png"
    assert said.code == 0 and json.loads(said.out)["picture"] == str(path)
    told = Image.open(path).text[KEY]
    assert json.loads(told)["updates"] == 6
    for secret in (SECRET, "anna", str(tmp_path)):
        assert secret not in told and secret.encode() not in path.read_bytes()


def test_of_a_real_run(onestep: Command, model, prompts, tmp_path):
    run, out = tmp_path / "run", tmp_path / "shared" / "mine.png"
    out.parent.mkdir()
    assert onestep("distill", model, "--prompts", prompts, "--out", run, *SHORT).code == 0
    said = onestep("report", run, "--out", out)
    assert said.code == 0 and "regression, 1 updates" in said.out
    assert Image.open(out).width == 900 and not (run / "report.png").exists()


@pytest.mark.parametrize("rows", [[], ROWS[:1]])
def test_a_run_that_has_hardly_begun_has_a_report(rows, onestep: Command, tmp_path):
    assert onestep("report", folder_of(tmp_path / "run", rows)).code == 0


def test_what_is_no_run_is_refused_in_words(onestep: Command, tmp_path):
    assert "is no run's folder" in onestep("report", tmp_path).message
    (tmp_path / "config.json").write_text("[]")
    said = onestep("report", tmp_path)
    assert said.code == 2 and "is not a run's" in said.message


@pytest.mark.parametrize("broken", [b"", b"\x89PNG\r\n\x1a\n" + bytes(30), b"GIF89a"])
def test_a_broken_preview_is_passed_over(broken: bytes, tmp_path):
    run = folder_of(tmp_path / "run", ROWS)
    (run / "previews").mkdir()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(run / "previews" / "000001.png")
    (run / "previews" / "000002.png").write_bytes(broken)
    found = last_preview(run)
    assert found is not None and found.getpixel((0, 0)) == (255, 0, 0)


def test_a_previews_own_words_stay_at_home(onestep: Command, tmp_path):
    """Text chunks and EXIF, as ComfyUI and cameras write them."""
    run, words = folder_of(tmp_path / "run", ROWS), PngInfo()
    (run / "previews").mkdir()
    words.add_text("prompt", SECRET)
    exif = Image.Exif()
    exif[0x010E] = SECRET
    Image.new("RGB", (8, 8)).save(
        run / "previews" / "000001.png", pnginfo=words, exif=exif, icc_profile=SECRET.encode()
    )
    assert onestep("report", run).code == 0
    shared = Image.open(run / "report.png")
    shared.load()
    assert SECRET not in str(shared.info) and SECRET.encode() not in (run / "report.png").read_bytes()
    assert not shared.getexif() and set(shared.info) <= {KEY}


def test_why_nothing_could_be_counted_is_not_told(tmp_path):
    """In somebody else's words, which may name a file."""
    line = "what the run needs could not be counted ([Errno 2] No such file: 'D:\\anna\\model.safetensors')"
    run = folder_of(tmp_path / "run", ROWS, plan={"line": line, "rung": None})
    assert facts_of(run)["plan"] == "what the run needs could not be counted"
    words = "A run fits by itself with micro-batches of 1 (checkpointed): 3 of 10 GiB."
    run = folder_of(tmp_path / "other", ROWS, plan={"line": words, "rung": {"micro_batch": 1}})
    assert facts_of(run)["plan"] == words
