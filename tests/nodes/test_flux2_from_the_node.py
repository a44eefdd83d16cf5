"""FLUX.2 klein from the trainer's node in a real ComfyUI: a student of four of its own steps draws one picture by
core's nodes, by ours and in diffusers; its server is killed on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import from_the_node
import pytest
import tiny_folders
import torch
from comfy_graphs import latents, text
from from_the_node import SEED, Facts
from own_workflow import check_drawn, cut_short

from onestep.cli.inspect import describe
from onestep.core.families import FAMILIES
from onestep.core.lora_file import LoraFile, load_lora
from onestep.core.recipe import Recipe
from onestep.core.schedule import of_size

pytestmark = [pytest.mark.comfy, pytest.mark.broad, pytest.mark.filterwarnings("ignore")]

KLEIN = Facts(
    **{"name": "klein", "layers": 32, "others": ("a wall",), "updates": 6, "seen": 0.01},
    **{"size": (32, 32), "latents": (16, 4, 4), "shape": (1, 16, 4, 4), "unscaled": lambda vae, x0: x0},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folders.klein_folder(tmp_path_factory.mktemp("klein") / "model")


@pytest.fixture(scope="module")
def uncut(folder: Path, comfy_server: Any) -> Path:
    return from_the_node.trained(KLEIN, folder, comfy_server)


def test_a_killed_server_goes_on_to_the_bit(uncut: Path, folder: Path, comfy: Any, pack: Path, tmp_path: Path) -> None:
    from_the_node.check_resumed(KLEIN, folder, uncut, comfy, pack, tmp_path)


def test_the_workflow_trains_and_draws(folder: Path, comfy_server: Any, root: Path) -> None:
    """Workflow 12 with the tiny folder in the place of a person's files, cut short."""
    told = cut_short(root, "12 distil klein", folder)
    (levels,) = (node["inputs"] for node in told.values() if node["class_type"] == "Flux2Scheduler")
    levels |= {"steps": 2, "width": 64, "height": 64}
    check_drawn(comfy_server, told)


def drawing(folder: Path, file: LoraFile, uncut: Path) -> dict[str, Any]:
    """core's nodes by the values that `onestep inspect` prints, with the LoRA and without, and ours."""
    told = describe(file, uncut)["comfyui"]["general"]

    def core(model: str) -> dict[str, Any]:
        plugs = {name: [name, 0] for name in ("noise", "sampler", "sigmas")} | {"latent_image": ["empty", 0]}
        return {"class_type": "SamplerCustomAdvanced", "inputs": {**plugs, "guider": [f"{model} guider", 0]}}

    def guider(model: str) -> dict[str, Any]:
        return {"class_type": "BasicGuider", "inputs": {"model": [model, 0], "conditioning": ["text", 0]}}

    lora = {"model": ["model", 0], "lora_name": f"onestep/{uncut.name}"}
    ours = {"positive": ["text", 0], "latent_image": ["empty", 0], "recipe": ["loaded", 1], "seed": SEED}
    return {
        "model": {"class_type": "LoadTinyFolder", "inputs": {"folder": str(folder)}},
        "text": text(KLEIN.prompt, "model"),
        "empty": {"class_type": "EmptyLatentImage", "inputs": {"width": 32, "height": 32, "batch_size": 1}},
        "merged": {"class_type": "LoraLoaderModelOnly", "inputs": {**lora, "strength_model": 1.0}},
        "loaded": {"class_type": "OneStepLoadLoRA", "inputs": {**lora, "recipe": "from the file"}},
        "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": SEED}},
        "sampler": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": told["sampler_name"]}},
        "sigmas": {"class_type": "ManualSigmas", "inputs": {"sigmas": told["sigmas"]}},
        "merged guider": guider("merged"),
        "model guider": guider("model"),
        "core": core("merged"),
        "base": core("model"),
        "ours": {"class_type": "OneStepSample", "inputs": {**ours, "model": ["loaded", 0]}},
    }


def test_four_steps_from_the_node_are_one_picture(uncut: Path, folder: Path, comfy_server: Any) -> None:
    file = load_lora(uncut)
    recipe = Recipe.from_json(str(file.recipe))
    # of 16 tokens, as FLUX.2's pipelines move four steps
    times = of_size(FAMILIES["flux2"].schedule, KLEIN.shape).trailing(4)
    torch.testing.assert_close(torch.tensor(recipe.timesteps, dtype=torch.float64), times)
    from_the_node.check_alike(KLEIN, folder, uncut, latents(comfy_server, drawing(folder, file, uncut)))
