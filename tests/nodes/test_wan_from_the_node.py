"""Wan from the trainer's node in a real ComfyUI: a student of four steps, its server killed on the way; what comes
out draws one picture by core's nodes, by ours and in diffusers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_folders
import torch
from comfy_graphs import distil, latents
from comfy_support import GraphRefused
from killed_server import factors, lora_of, resumed
from own_workflow import check_drawn, cut_short
from safetensors.torch import save_file
from student_drawing import drawing

from onestep.core.lora_file import LoraFile, load_lora
from onestep.core.recipe import Recipe
from onestep.core.sampling import sample
from onestep.pipelines.adapt import adapt
from onestep.pipelines.load import load

pytestmark = [pytest.mark.comfy, pytest.mark.broad, pytest.mark.filterwarnings("ignore")]
SEED, PROMPT, UPDATES = 11, "a red dragon", 12
PROMPTS = f"{PROMPT}\na wall\nan old wall of blue stones beside a red dragon that sleeps"
SETTINGS = {"learning_rate": 1e-2, "ema": 0.5, "save_every": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folders.wan_folder(tmp_path_factory.mktemp("wan") / "model", 8.0)


def graph(folder: Path, name: str) -> dict[str, Any]:
    told = {"preset": "Balanced", "steps": UPDATES, "student_steps": "4", "existing": "continue"}
    return {
        "model": {"class_type": "LoadTinyFolder", "inputs": {"folder": str(folder)}},
        "distil": distil(name, "dmd", SETTINGS, prompts=PROMPTS, **told),
    }


@pytest.fixture(scope="module")
def uncut(folder: Path, comfy_server: Any) -> Path:
    finished = comfy_server.run(graph(folder, "wan-uncut"))
    assert finished.status == "success", finished.error
    assert "loads all 26 layers" in finished.outputs["distil"]["text"][0]
    return lora_of(comfy_server, "wan-uncut")


def test_a_killed_server_goes_on_to_the_bit(uncut: Path, folder: Path, comfy: Any, pack: Path, tmp_path: Path) -> None:
    found = resumed(comfy, pack, tmp_path, lambda: graph(folder, "wan-killed"), "wan-killed", 6)
    assert factors(found) == factors(uncut)


@torch.no_grad()
def by_diffusers(folder: Path, file: LoraFile) -> torch.Tensor:
    """Four steps of the same network in diffusers, from KSampler's noise, which goes on from the next seed."""
    host = adapt(load(folder), device="cpu")
    first, later = (torch.Generator().manual_seed(seed) for seed in (SEED, SEED + 1))
    host.denoiser.roles.load("student", file.state)
    with host.denoiser.roles.use("student"):
        recipe, noise = Recipe.from_json(str(file.recipe)), torch.randn(1, 16, 6, 4, generator=first)
        cond = host.encode([PROMPT], (32, 48))
        x0 = sample(host.denoiser, recipe, cond, noise, lambda step: torch.randn(noise.shape, generator=later))
    mean, deviation = (
        torch.tensor(value)[:, None, None]
        for value in (host.pipe.vae.config[f"latents_{name}"] for name in ("mean", "std"))
    )
    return (x0 * deviation + mean).unsqueeze(2)


def test_one_picture(uncut: Path, folder: Path, comfy_server: Any) -> None:
    file = load_lora(uncut)
    drawn = latents(comfy_server, drawing(folder, file, uncut, PROMPT, SEED, (32, 48), "EmptyLatentImage"))
    drawn["diffusers"], scale = by_diffusers(folder, file), float(drawn["ours"].std())
    assert {tuple(latent.shape) for latent in drawn.values()} == {(1, 16, 1, 6, 4)}
    apart = {way: float((latent - drawn["ours"]).abs().max()) / scale for way, latent in drawn.items()}
    assert apart.pop("base") > 0.1, "the LoRA's effect must be seen"
    assert max(apart.values()) < 1e-4, apart


def sister(folder: Path, name: str) -> None:
    """A LoRA of one attention in the names of another family, of a variant, or of a wider model."""
    path, out, rank = {
        "anima": ("diffusion_model.blocks.0.self_attn.q_proj", 24, 2),
        "i2v": ("diffusion_model.blocks.0.cross_attn.k_img", 24, 2),
        "wider": ("diffusion_model.blocks.0.self_attn.q", 5120, 2),
    }[name]
    state = {f"{path}.lora_A.weight": torch.ones(rank, out), f"{path}.lora_B.weight": torch.ones(out, rank)}
    save_file(state, folder / f"wan-{name}.safetensors")


WRONG = {
    "anima": "is a LoRA for the transformer of Anima, but this model is the transformer of Wan",
    "i2v": "This LoRA is for Wan image-to-video",
    "wider": "has factors [2, 5120] and [5120, 2], this model needs [2, 24] and [24, 2]",
}


def test_what_belongs_to_another_model_is_refused(folder: Path, comfy_server: Any) -> None:
    """Its text encoder, LoRAs, and a run on frames, before anything is copied or written."""
    told = graph(folder, "wan-refused")
    tiny = {"class_type": "OneStepLoadTinyModel", "inputs": {"name": "tiny"}}
    told["distil"]["inputs"]["clip"] = ["tiny", 1]
    said = comfy_server.run({**told, "tiny": tiny}).error
    assert re.search(r"the text encoder gives tokens of \d+ numbers, and this model reads 24: load", said), said
    for name, why in WRONG.items():
        sister(comfy_server.base / "models" / "loras", name)
        told = graph(folder, "wan-refused")
        told["distil"]["inputs"]["initial_lora"] = f"wan-{name}.safetensors"
        assert why in comfy_server.run(told).error, name
    told = graph(folder, "wan-refused")
    told["distil"]["inputs"]["sizes"] = "64x64x81"
    with pytest.raises(GraphRefused, match="but of 81 frames: a run is on pictures"):
        comfy_server.run(told)
    assert not (comfy_server.base / "output" / "onestep" / "wan-refused").exists()


def test_the_workflow_trains_and_draws(folder: Path, comfy_server: Any, root: Path) -> None:
    """Workflow 18 with the tiny folder in the place of a person's files, cut short."""
    check_drawn(comfy_server, cut_short(root, "18 distil Wan", folder))
