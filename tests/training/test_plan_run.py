"""A run goes on the rung that fits its card, says so first, writes it down and keeps it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import layout_pipelines as layouts
import pytest
import torch

from onestep.core.tensor_file import read_tensors
from onestep.pipelines.adapt import DiffusersHost, adapt
from onestep.pipelines.shells import of_host
from onestep.training.distil import distil
from onestep.training.methods import settings_for
from onestep.training.plan import run as plan_run
from onestep.training.plan.cards import Card
from onestep.training.plan.rungs import Way, rung_of
from onestep.training.settings import Settings
from onestep.training.watch.progress import Progress

GIB = 2**30


def settings(**more: Any) -> Settings:
    few = {"steps": 1, "pairs": 4, "batch": 4, "rank": 4, "teacher_steps": 1, "preview_every": 0, "watch_every": 0}
    return settings_for(method="regression", sizes="16x16", **{**few, "watch_samples": 4, **more})


def card(usable: int) -> Card:
    return Card("made for a test", int((usable + 0.7 * GIB) / 0.9), 10, 5, 100)


def least(host: DiffusersHost, how: Settings, micro: int, grade: str = "blocks", moments: bool = True) -> int:
    return rung_of(partial(of_host, host), how, None, Way(micro, grade, moments, True)).peak.bytes


@pytest.fixture
def host() -> DiffusersHost:
    return adapt(layouts.sd15())


def started(
    host: DiffusersHost, folder: Path, how: Settings, there: Card, monkeypatch: Any, existing: str = "stop"
) -> Any:
    """A run on such a card: the notes that it began with, its config, and the micro-batches that it learnt from."""
    monkeypatch.setattr(plan_run.laid_out, "__defaults__", (lambda device: there,))
    said: list[Progress] = []
    result = distil(host, ["a cat"], how, folder, existing=existing, report=said.append, shells=partial(of_host, host))
    return said[0].notes, json.loads((folder / "config.json").read_text()), result


@pytest.mark.broad
def test_a_run_begins_in_the_micro_batches_that_fit(host: DiffusersHost, tmp_path: Path, monkeypatch: Any) -> None:
    peak = least(host, settings(), 2)
    notes, config, ours = started(host, tmp_path / "ours", settings(), card(peak + 4), monkeypatch)
    assert notes[0].startswith("A run fits by itself with micro-batch 2, checkpointing")
    assert config["plan"]["rung"]["micro_batch"] == 2 and config["plan"]["rung"]["bytes"] == peak
    # as a run that was set so from the start, to the bit
    plain = distil(host, ["a cat"], settings(accumulation=2), tmp_path / "plain")
    assert ours.path.read_bytes()[-4000:] == plain.path.read_bytes()[-4000:]


@pytest.mark.broad
def test_a_run_that_goes_on_keeps_its_rung(host: DiffusersHost, tmp_path: Path, monkeypatch: Any) -> None:
    """Also on another card: it is not counted anew."""
    peak = least(host, settings(), 1)
    first = started(host, tmp_path, settings(), card(peak + 4), monkeypatch)
    again = started(host, tmp_path, settings(steps=2), card(64 * GIB), monkeypatch, "continue")
    assert first[0][0] == again[0][0] and first[1]["plan"] == again[1]["plan"]
    assert again[2].updates == 2


@pytest.mark.broad
def test_checkpointing_is_taken_by_itself_where_it_is_needed(
    host: DiffusersHost, tmp_path: Path, monkeypatch: Any
) -> None:
    without = settings(checkpointing=False, batch=1, accumulation=1)
    peak = least(host, without, 1)
    notes, config, _ = started(host, tmp_path, without, card(peak + 4), monkeypatch)
    assert config["plan"]["rung"]["recompute"] == "blocks" and config["settings"]["checkpointing"] is False
    assert "micro-batch 1, checkpointing" in notes[0]


@pytest.mark.broad
def test_no_more_is_computed_again_than_must_be(host: DiffusersHost, tmp_path: Path, monkeypatch: Any) -> None:
    """The run takes it by itself, learns the same to the bit, and stays there when it goes on."""
    how = settings()
    notes, config, ours = started(host, tmp_path / "ours", how, card(64 * GIB), monkeypatch)
    assert config["plan"]["rung"]["recompute"] == "nothing" and config["settings"]["checkpointing"] is True
    assert notes[0].startswith("A run fits by itself with micro-batch 4, no checkpointing")
    plain = distil(host, ["a cat"], how, tmp_path / "plain")
    assert read_tensors(ours.path).keys() == read_tensors(plain.path).keys()
    for name, value in read_tensors(plain.path).items():
        assert torch.equal(read_tensors(ours.path)[name], value)
    again = started(host, tmp_path / "ours", how.with_(steps=2), card(1000), monkeypatch, "continue")
    assert again[1]["plan"] == config["plan"] and again[2].updates == 2


def test_a_run_that_cannot_fit_says_what_would(host: DiffusersHost, tmp_path: Path, monkeypatch: Any) -> None:
    notes, config, _ = started(host, tmp_path, settings(), card(1000), monkeypatch)
    assert notes[0].startswith("Nothing tried fits") and config["plan"]["rung"] is None


def test_without_a_card_nothing_is_counted(host: DiffusersHost, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    distil(host, ["a cat"], settings(), tmp_path, shells=partial(of_host, host))
    assert "plan" not in json.loads((tmp_path / "config.json").read_text())
