"""Predictions and noise levels of ComfyUI's models: those that are served, and all others refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.comfy

SERVED = {
    "EPS": "VPSchedule",
    "V_PREDICTION": "VPSchedule",
    "x0": "VPSchedule",
    "a share of each time": "VPSchedule",
    "FLOW": "FlowSchedule",
    "FLUX": "FlowSchedule",
    "FLOW_AV": "FlowSchedule",
}
EDM = {
    "EDM",
    "V_PREDICTION_EDM",
    "EDM's times on discrete levels",
    "EDM's levels of a model that predicts noise",
}


@pytest.fixture(scope="module")
def found(run_inside: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    file: Path = tmp_path_factory.mktemp("samplings") / "out.json"
    run_inside("model_samplings", file)
    return json.loads(file.read_text())


def test_those_that_are_served(found: Any) -> None:
    assert {name: found["served"][name] for name in SERVED} == SERVED


def test_a_share_of_each_time_is_a_whole_time(found: Any) -> None:
    """NitroFusion's README: (timesteps * 250 / 1000).long()."""
    assert found["given"] == [249, 187, 124, 62]


def test_all_others_are_refused_by_name(found: Any) -> None:
    others = {name: words for name, words in found["served"].items() if name not in SERVED}
    assert len(others) >= 8 and others.keys() >= EDM
    for name, words in others.items():
        assert "is not served" in words and "ModelSampling" in words or "Cascade" in words, (name, words)
        assert ("EDM's noise levels" in words) == (name in EDM or "ContinuousEDM" in words), (name, words)
