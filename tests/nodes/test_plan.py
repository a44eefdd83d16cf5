"""Plan Distillation counts a MODEL of ComfyUI as the same model is counted in diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from narrowed import narrowed
from PIL import Image

from onestep.pipelines.shells import of_folder
from onestep.training.methods import settings_for
from onestep.training.plan.rungs import Way, rung_of

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore::FutureWarning")]


COUNTED = [(["agd"], ["tiny"]), (["nct", "sun"], ["tiny", "tiny-flow"])]


@pytest.mark.parametrize(("adapters", "names"), narrowed(COUNTED))
def test_a_model_is_counted_in_both_hosts(
    adapters: list[str], names: list[str], root: Path, run_inside: Callable[..., str], tmp_path: Path
) -> None:
    folders = [root / "pipelines" / "tiny" / name for name in names]
    said = run_inside("plan", tmp_path / "bar.png", ",".join(adapters), *folders).strip().splitlines()
    *plans, text = (json.loads(line) for line in said[-3 - len(adapters) :])
    plans, theirs = plans[: len(folders)], plans[len(folders) :]
    settings = settings_for(method="regression", sizes="32x32", rank=8, batch=2, steps=1, watch_samples=4)
    for folder, plan in zip(folders, plans, strict=True):
        rung, shell = plan["rungs"][0], of_folder(folder)
        shell.tokens = 77 if "flow" not in folder.name else 77 + 256  # as ComfyUI's texts are counted
        ours = rung_of(shell.shell, settings, None, Way(2))
        # the same adapters, and about the same work: the hosts' layers differ, their dtypes too (float32, bfloat16)
        assert rung["made_of"]["student"] == ours.peak.made_of["student"]
        assert rung["forwards_a_sample"] == pytest.approx(ours.forwards, rel=0.03)
        assert rung["parts"].keys() == ours.parts.keys()
    for name, plan in zip(adapters, theirs, strict=True):
        few = {"sizes": "32x32", "batch": 2, "steps": 1, "watch_samples": 4}
        shell = of_folder(folders[0])
        shell.tokens = 77
        ours = rung_of(shell.shell, settings_for(method=name, **few), None, Way(2))
        (rung,) = plan["rungs"]
        # the same adapter in the same places, and the same parts and work of its run
        assert rung["forwards_a_sample"] == pytest.approx(ours.forwards, rel=0.03)
        assert rung["made_of"]["student"] == ours.peak.made_of["student"] > 0
        assert rung["parts"].keys() == ours.parts.keys()
        assert f", {name} at 32x32, batch 2" in plan["said"] and "GiB of tensors as it is set" in plan["said"]
    assert (
        "RTX 3060: 10.1 GiB for tensors" in text and "A run fits by itself with micro-batch 4, no checkpointing" in text
    )
    picture = np.asarray(Image.open(tmp_path / "bar.png"))
    assert picture.shape[1] == 960 and picture.std() > 20


def test_comfyui_makes_the_room_that_the_run_has_counted(
    random_tiny: dict[str, Path], run_inside: Callable[..., str], tmp_path: Path
) -> None:
    """Whenever the network comes back to the card; and the back end that ONESTEP_ATTENTION names is trained with."""
    told = json.loads(run_inside("plan_room", random_tiny["tiny"], tmp_path / "run").strip().splitlines()[-1])
    assert told["counted"] > 2**20 and told["asked"] and set(told["asked"]) == {told["counted"]}, told
    assert 0 < told["learnt"] < told["calls"], told
