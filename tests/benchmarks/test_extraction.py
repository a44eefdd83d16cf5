"""What extraction keeps over rank: every part of the script once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import extraction  # noqa: E402


@pytest.mark.broad
def test_more_rank_keeps_more_and_the_full_one_everything(tmp_path: Path) -> None:
    prompts = ["weapon: axe", "floor: lava, red"]
    few = extraction.few_step(prompts, tmp_path, updates=2, batch=2, pairs=4)
    assert extraction.few_step(prompts, tmp_path, updates=2, batch=2, pairs=4) == few  # made once
    found = list(extraction.rows(few, [2, 1152], prompts, tmp_path))
    assert [(row["rank"], row["whitened"]) for row in found] == [(2, False), (2, True), (1152, False), (1152, True)]
    plain, whitened, whole, whole_whitened = found
    assert 0 < plain["weights"] < 1 and whitened["weights"] <= plain["weights"] + 1e-6
    assert 0 < whitened["outputs"] < 1 and whitened["apart"] > 0.01
    assert whole["weights"] == pytest.approx(1, abs=1e-6) and whole["largest error"] < 1e-5
    assert whole_whitened["outputs"] == pytest.approx(1, abs=1e-5)
    # what is left is of the norms and biases, which were trained too and which no LoRA holds
    assert whole_whitened["apart"] < whitened["apart"] / 10
