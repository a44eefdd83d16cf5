"""What the benchmark of negatives asks for (benchmarks/negative.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import negative  # noqa: E402


def test_a_rival_is_the_other_class_that_is_seen_most_often() -> None:
    asked = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2])
    found = torch.tensor([0, 0, 0, 1, 2, 2, 0, 1])
    rivals = negative.mistaken(asked, found, 4)
    assert rivals[1:3].tolist() == [2, 1]
    assert all(rival != own for own, rival in enumerate(rivals.tolist())), "0 and 3 were never mistaken"
