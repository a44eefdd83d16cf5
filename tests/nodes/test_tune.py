"""Tuning from the trainer's node in a real ComfyUI: the pictures are a folder of its input folder, with captions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_graphs import distil, loader
from killed_server import factors, lora_of, resumed
from own_pictures import pictures_in

from onestep.core.lora_file import load_lora
from onestep.core.recipe import Recipe
from onestep.core.tensor_file import read_tensors
from onestep.pipelines.adapt import adapt
from onestep.pipelines.load import load
from onestep.training.data.real_pictures import opened

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]
BUNDLED = "bundled-tiny-one-step.safetensors"


def graph(name: str, folder: str, updates: int = 8, model: str = "tiny", **told: Any) -> dict[str, Any]:
    own = {"pictures": folder, "watch_every": 2, "save_every": 1, "ema": 0.5, **told.pop("own", {})}
    more = {"preset": "Tune", "steps": updates, "student_steps": "by preset", "existing": "continue", "rank": 64}
    return {"model": loader(model), "distil": distil(name, "tune", own, **(more | told))}


@pytest.fixture(scope="module")
def mine(comfy_server: Any) -> str:
    pictures_in(comfy_server.base / "input" / "mine")
    return "mine"


@pytest.fixture(scope="module")
def uncut(comfy_server: Any, mine: str) -> Path:
    finished = comfy_server.run(graph("tune-uncut", mine, initial_lora=BUNDLED))
    assert finished.status == "success", finished.error
    return lora_of(comfy_server, "tune-uncut")


def test_a_student_is_tuned_and_stays_few_step(uncut: Path, comfy_server: Any, root: Path) -> None:
    """The result draws as the student did; its pictures are encoded by ComfyUI's VAE as diffusers' encodes them."""
    before = load_lora(root / "pipelines" / "tiny" / "loras" / BUNDLED)
    found = load_lora(uncut)
    assert Recipe.from_json(found.recipe).timesteps == Recipe.from_json(before.recipe).timesteps
    assert any(not torch.equal(found.state[name][1], b) for name, (_, b) in before.state.items())
    kept = read_tensors(comfy_server.base / "output" / "onestep" / "tune-uncut" / "pictures" / "32x32.safetensors")["x"]
    picture = opened(comfy_server.base / "input" / "mine" / "0.png", (32, 32))
    wanted = adapt(load("tiny"), device="cpu").latents_of(picture[None])
    torch.testing.assert_close(kept[:1], wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.broad
def test_a_killed_server_goes_on_to_the_bit(uncut: Path, comfy: Any, pack: Path, tmp_path: Path) -> None:
    pictures_in(tmp_path / "input" / "mine")
    found = resumed(comfy, pack, tmp_path, lambda: graph("tuned", "mine", initial_lora=BUNDLED), "tuned", 3)
    assert factors(found) == factors(uncut)


@pytest.mark.broad
@pytest.mark.parametrize("model", ["tiny-flow", "tiny-dit"])
def test_flow_models_are_tuned(model: str, mine: str, comfy_server: Any) -> None:
    finished = comfy_server.run(graph(f"tune-{model}", mine, model=model, own={"drawn": "few"}, student_steps="4"))
    assert finished.status == "success", finished.error
    assert Recipe.from_json(load_lora(lora_of(comfy_server, f"tune-{model}")).recipe).steps == 4


@pytest.mark.parametrize(
    ("folder", "why"),
    [
        ("", "tune learns from your pictures, and pictures is empty"),
        ("nowhere", "pictures is 'input/nowhere', which is no folder"),
        ("../output", "'..' is no name of a file or folder"),
        ("bare", "the picture '0.png' has no caption: write what it shows into '0.txt' beside it"),
    ],
)
def test_a_folder_that_cannot_be_learnt_from_is_refused(folder: str, why: str, comfy_server: Any) -> None:
    bare = comfy_server.base / "input" / "bare"
    if not bare.exists():
        pictures_in(bare)
        (bare / "0.txt").unlink()
    finished = comfy_server.run(graph("tune-refused", folder))
    assert finished.status == "error" and why in finished.error, finished.error
    assert str(comfy_server.base) not in finished.error
    assert not (comfy_server.base / "output" / "onestep" / "tune-refused").exists()
    shutil.rmtree(bare)
