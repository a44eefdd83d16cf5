"""Apply Guidance Adapter in a real ComfyUI: the trainer's own numbers, on and off, with CFG and without."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from rounding import between_hosts

from onestep.core.schedule import VPSchedule

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def measured(run_inside: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return json.loads(run_inside("guidance_adapter", tmp_path_factory.mktemp("adapter")).strip().splitlines()[-1])


BOUND = between_hosts(VPSchedule.scaled_linear(), 899)
"""At a tenth of the sampling, where a U-Net's rounding comes out 1 / alpha = 9 times as large."""


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "z_image", "klein"])
def test_the_guider_sees_what_the_trainer_trained(measured: Any, kind: str) -> None:
    found = measured[kind]
    assert found["effect"] > 0.02 and found["the trainer's"] < BOUND
    assert found["plain again"] == found["guided again"] == found["off"] == found["hooks left"] == 0
    # with CFG on, the adapter guides the positive rows alone
    assert found["with CFG"] < BOUND


def test_what_does_not_fit_is_refused(measured: Any) -> None:
    said = measured["said"]
    assert len(said) == 4
    assert said[0].startswith("this adapter is for another base") and "made for 'unet' models" in said[1]
    assert all("must lie in 1 (none) to 30" in words for words in said[2:])
