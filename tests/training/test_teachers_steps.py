"""A run draws its teacher as it began: in fewer steps of second order, or, begun before these were, as it did."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_host import PROMPTS, SmallHost, small
from torch import Tensor
from whole_runs import run

from onestep.core.tensor_file import read_tensors
from onestep.training.data.pairs import Pairs, of_second_order
from onestep.training.engine.prompts import embed

SETTINGS = small(method="regression", teacher_steps=10, steps=2, watch_every=0, preview_every=0)


def block(folder: Path) -> Tensor:
    return read_tensors(folder / "pairs" / "000001.safetensors")["x"]


def alone(folder: Path, second_order: bool) -> Pairs:
    settings, host = replace(SETTINGS, second_order=second_order), SmallHost()
    return Pairs(host, embed(host, PROMPTS, settings, folder / "texts"), settings, folder / f"{second_order}")


def test_a_new_run_takes_fewer_steps(tmp_path: Path) -> None:
    run(tmp_path / "run", SETTINGS)
    pool = alone(tmp_path, True)
    assert torch.equal(pool._solve(1, 4), block(tmp_path / "run")) and pool.solve_cost == 12.0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["second_order"] is True


def test_a_run_of_before_keeps_its_own(tmp_path: Path) -> None:
    run(tmp_path / "run", SETTINGS, report=lambda progress: progress.update == 1)
    config, pairs = tmp_path / "run" / "config.json", tmp_path / "run" / "pairs"
    told: dict[str, Any] = json.loads(config.read_text())
    del told["second_order"]
    config.write_text(json.dumps(told))
    shutil.rmtree(pairs)
    run(tmp_path / "run", SETTINGS.with_(steps=3), existing="continue")
    pool = alone(tmp_path, False)
    assert torch.equal(pool._solve(1, 4), block(tmp_path / "run")) and pool.solve_cost == 20.0
    assert "second_order" not in json.loads(config.read_text())


@pytest.mark.parametrize("steps, second", [(3, False), (7, False), (8, True), (50, True)])
def test_where_there_are_enough_of_them(steps: int, second: bool) -> None:
    assert of_second_order(replace(SETTINGS, teacher_steps=steps, second_order=True)) is second
    assert not of_second_order(SETTINGS.with_(teacher_steps=steps))
    assert not [entry for entry in SETTINGS.flat() if "order" in entry], "no setting of a person's"
