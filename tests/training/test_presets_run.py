"""Every preset is a run that goes: from its first update to a file that draws in as many steps as it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from own_pictures import needed_by
from small_host import SmallHost
from whole_runs import run

from onestep.core.lora_file import save_lora
from onestep.core.recipe import PRESETS as RECIPES
from onestep.core.recipe import step_files
from onestep.training.methods import METHODS
from onestep.training.presets import PRESETS, preset
from onestep.training.settings import Settings, described

FEW: dict[str, Any] = {"steps": 2, "rank": 2, "batch": 2, "pairs": 2, "sizes": "32x32", "teacher_steps": 2}
FEW |= {"warm_start": 1, "critic_warm_up": 1, "warm_up": 1, "states": 1, "watch_samples": 4, "preview_every": 0}
STEPS = {"Overnight": 4, "Weekend": 2, "One step": 1, "Fast": 1, "Balanced": 1, "Best": 1, "Tune": 1}


def short(name: str, **changes: Any) -> Settings:
    """The preset, cut to two updates; what it leaves out stays so."""
    known = {entry.name for kind in (Settings, METHODS[preset(name).method].settings) for entry in described(kind)}
    few = {key: value for key, value in FEW.items() if key in known}
    whole = preset(name, **changes)
    if "warm_start" in few:
        few["warm_start"] = min(1, whole.own.warm_start)
    return whole.with_(**few)


def donor(folder: Path, recipe: str) -> str:
    roles, draw = SmallHost().denoiser.roles, torch.Generator().manual_seed(5)
    roles.add("donor", 3, 1)
    state = {name: (a, 0.05 * torch.randn(b.shape, generator=draw)) for name, (a, b) in roles.state("donor").items()}
    save_lora(folder / "donor.safetensors", state, "unet", RECIPES[recipe].to_json())
    return str(folder / "donor.safetensors")


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "Adapt"])
def test_from_nothing(name: str, tmp_path: Path) -> None:
    result = run(tmp_path / "run", short(name, **needed_by(preset(name).method, tmp_path)))
    assert result.recipe.steps == STEPS.get(name, 2)  # guidance only: the teacher's own
    assert len(step_files(result.path, result.recipe)) == (2 if name == "Weekend" else 1)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("Adapt", "dmd2-4"), ("Adapt", "sd-turbo-1"), ("Overnight", "sdxl-lightning-4"), ("Weekend", "sdxl-lightning-2")],
)
def test_from_a_donor(name: str, recipe: str, tmp_path: Path) -> None:
    """In the donor's steps; without regression, whatever the preset does from nothing."""
    result = run(tmp_path / "run", short(name, initial_lora=donor(tmp_path, recipe)))
    assert result.recipe.timesteps == RECIPES[recipe].timesteps
    assert {line["phase"] for line in result.metrics} <= {"before training", "critic", "dmd", "cdm"}
    assert preset(name, initial_lora="x").own.critic_start == "donor"
