"""FLUX.2 klein from the trainer's node in a real ComfyUI: a student of four of its own steps draws one picture by
core's nodes, by ours and in diffusers; its server is killed on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_folders
import torch
from comfy_graphs import distil, latents, text
from diffusers import DiffusionPipeline
from killed_server import factors, lora_of, resumed
from own_workflow import check_drawn, cut_short

from onestep.cli.inspect import describe
from onestep.core.families import FAMILIES
from onestep.core.lora_file import LoraFile, load_lora
from onestep.core.recipe import Recipe
from onestep.core.sampling import sample
from onestep.core.schedule import of_size
from onestep.pipelines.adapt import adapt

pytestmark = [pytest.mark.comfy, pytest.mark.broad, pytest.mark.filterwarnings("ignore")]
SEED, PROMPT, LATENTS = 11, "a red dragon", (1, 16, 4, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folders.klein_folder(tmp_path_factory.mktemp("klein") / "model")


def graph(folder: Path, name: str) -> dict[str, Any]:
    told = {"preset": "Balanced", "steps": 6, "student_steps": "4", "existing": "continue"}
    settings = {"learning_rate": 1e-2, "ema": 0.5, "save_every": 1}
    return {
        "model": {"class_type": "LoadTinyFolder", "inputs": {"folder": str(folder)}},
        "distil": distil(name, "dmd", settings, prompts=f"{PROMPT}\na wall", **told),
    }


@pytest.fixture(scope="module")
def uncut(folder: Path, comfy_server: Any) -> Path:
    finished = comfy_server.run(graph(folder, "klein"))
    assert finished.status == "success", finished.error
    assert "loads all 32 layers" in finished.outputs["distil"]["text"][0]
    return lora_of(comfy_server, "klein")


def test_a_killed_server_goes_on_to_the_bit(uncut: Path, folder: Path, comfy: Any, pack: Path, tmp_path: Path) -> None:
    found = resumed(comfy, pack, tmp_path, lambda: graph(folder, "klein-killed"), "klein-killed", 3)
    assert factors(found) == factors(uncut)


def test_the_workflow_trains_and_draws(folder: Path, comfy_server: Any, root: Path) -> None:
    """Workflow 12 with the tiny folder in the place of a person's files, cut short."""
    told = cut_short(root, "12 distil klein", folder)
    (levels,) = (node["inputs"] for node in told.values() if node["class_type"] == "Flux2Scheduler")
    levels |= {"steps": 2, "width": 64, "height": 64}
    check_drawn(comfy_server, told)


def drawing(folder: Path, told: dict[str, Any]) -> dict[str, Any]:
    """core's nodes by the values that `onestep inspect` prints, with the LoRA and without, and ours."""

    def core(model: str) -> dict[str, Any]:
        plugs = {name: [name, 0] for name in ("noise", "sampler", "sigmas")} | {"latent_image": ["empty", 0]}
        return {"class_type": "SamplerCustomAdvanced", "inputs": {**plugs, "guider": [f"{model} guider", 0]}}

    def guider(model: str) -> dict[str, Any]:
        return {"class_type": "BasicGuider", "inputs": {"model": [model, 0], "conditioning": ["text", 0]}}

    lora = {"model": ["model", 0], "lora_name": "onestep/klein.safetensors"}
    ours = {"positive": ["text", 0], "latent_image": ["empty", 0], "recipe": ["loaded", 1], "seed": SEED}
    return {
        "model": {"class_type": "LoadTinyFolder", "inputs": {"folder": str(folder)}},
        "text": text(PROMPT, "model"),
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


@torch.no_grad()
def by_diffusers(folder: Path, file: LoraFile, recipe: Recipe) -> torch.Tensor:
    host = adapt(DiffusionPipeline.from_pretrained(folder), device="cpu")
    first, later = (torch.Generator().manual_seed(seed) for seed in (SEED, SEED + 1))
    host.denoiser.roles.load("student", file.state)
    with host.denoiser.roles.use("student"):
        noise, cond = torch.randn(LATENTS, generator=first), host.encode([PROMPT], (32, 32))
        return sample(host.denoiser, recipe, cond, noise, lambda step: torch.randn(LATENTS, generator=later))


def test_four_steps_from_the_node_are_one_picture(uncut: Path, folder: Path, comfy_server: Any) -> None:
    file = load_lora(uncut)
    recipe = Recipe.from_json(str(file.recipe))
    # of 16 tokens, as FLUX.2's pipelines move four steps
    times = of_size(FAMILIES["flux2"].schedule, LATENTS).trailing(4)
    torch.testing.assert_close(torch.tensor(recipe.timesteps, dtype=torch.float64), times)
    drawn = latents(comfy_server, drawing(folder, describe(file, uncut)["comfyui"]["general"]))
    drawn["diffusers"], scale = by_diffusers(folder, file, recipe), float(drawn["ours"].std())
    apart = {way: float((latent - drawn["ours"]).abs().max()) / scale for way, latent in drawn.items()}
    assert apart.pop("base") > 0.01, "the LoRA's effect must be seen"
    assert len(apart) == 3 and max(apart.values()) < 1e-4, apart
