"""Apply Negative Adapter in a real ComfyUI: the trainer's own numbers, on and off, with CFG and without."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def measured(run_inside: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return json.loads(run_inside("negative_adapter", tmp_path_factory.mktemp("adapter")).strip().splitlines()[-1])


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_the_guider_sees_what_the_trainer_trained(measured: Any, kind: str) -> None:
    found = measured[kind]
    assert found["effect"] > 0.02 and found["another"] > 0.02 and found["the trainer's"] < 1e-4
    assert found["plain again"] == found["away again"] == found["off"] == found["hooks left"] == 0


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_rows_have_their_own_negatives(measured: Any, kind: str) -> None:
    assert max(measured[kind][name] for name in ("with CFG", "combined", "of a batch")) < 1e-4


def test_what_does_not_fit_is_refused(measured: Any) -> None:
    words = [
        *("this adapter is for another base", "made for 'unet' models", "scale is nan", "scale is 11.0"),
        *("tokens are 2048 wide", "holds no text", "from 0.2 to 1 of the schedule", "has a negative adapter already"),
    ]
    assert len(measured["said"]) == len(words)
    for said, word in zip(measured["said"], words, strict=True):
        assert word in said
