"""Z-Image from the trainer's node in a real ComfyUI: a student of four steps, its server killed on the way; what comes
out draws one picture by core's nodes, by ours and in diffusers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_folders
import torch
from comfy_graphs import distil, latents
from diffusers import DiffusionPipeline
from killed_server import factors, lora_of, resumed
from own_workflow import check_drawn, cut_short
from safetensors.torch import save_file
from student_drawing import drawing

from onestep.core.lora_file import LoraFile, load_lora
from onestep.core.recipe import Recipe
from onestep.core.sampling import sample
from onestep.pipelines.adapt import adapt

pytestmark = [pytest.mark.comfy, pytest.mark.broad, pytest.mark.filterwarnings("ignore")]
SEED, PROMPT, UPDATES = 11, "a red dragon", 12
PROMPTS = f"{PROMPT}\na wall\nan old wall of blue stones beside a red dragon that sleeps"
"""Of two lengths in which the network fills them up: their embeddings lie on the disk in their own."""
SETTINGS = {"learning_rate": 1e-2, "ema": 0.5, "save_every": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folders.z_image_folder(tmp_path_factory.mktemp("z_image") / "model")


def graph(folder: Path, name: str) -> dict[str, Any]:
    told = {"preset": "Balanced", "steps": UPDATES, "student_steps": "4", "existing": "continue"}
    return {
        "model": {"class_type": "LoadTinyFolder", "inputs": {"folder": str(folder)}},
        "distil": distil(name, "dmd", SETTINGS, prompts=PROMPTS, **told),
    }


@pytest.fixture(scope="module")
def uncut(folder: Path, comfy_server: Any) -> Path:
    finished = comfy_server.run(graph(folder, "z-uncut"))
    assert finished.status == "success", finished.error
    assert "loads all 37 layers" in finished.outputs["distil"]["text"][0]
    return lora_of(comfy_server, "z-uncut")


def test_a_killed_server_goes_on_to_the_bit(uncut: Path, folder: Path, comfy: Any, pack: Path, tmp_path: Path) -> None:
    found = resumed(comfy, pack, tmp_path, lambda: graph(folder, "z-killed"), "z-killed", 6)
    assert factors(found) == factors(uncut)


@torch.no_grad()
def by_diffusers(folder: Path, file: LoraFile) -> torch.Tensor:
    """Four steps of the same network in diffusers, from KSampler's noise, which goes on from the next seed."""
    host = adapt(DiffusionPipeline.from_pretrained(folder), device="cpu")
    first, later = (torch.Generator().manual_seed(seed) for seed in (SEED, SEED + 1))
    host.denoiser.roles.load("student", file.state)
    with host.denoiser.roles.use("student"):
        recipe, noise = Recipe.from_json(file.recipe), torch.randn(1, 4, 8, 8, generator=first)
        cond = host.encode([PROMPT], (32, 32))
        x0 = sample(host.denoiser, recipe, cond, noise, lambda step: torch.randn(noise.shape, generator=later))
    vae = host.pipe.vae.config
    return x0 / vae.scaling_factor + vae.shift_factor


def test_one_picture(uncut: Path, folder: Path, comfy_server: Any) -> None:
    file = load_lora(uncut)
    drawn = latents(comfy_server, drawing(folder, file, uncut, PROMPT, SEED, (32, 32), "EmptyLatentImage"))
    drawn["diffusers"], scale = by_diffusers(folder, file), float(drawn["ours"].std())
    apart = {way: float((latent - drawn["ours"]).abs().max()) / scale for way, latent in drawn.items()}
    assert apart.pop("base") > 0.3, "the LoRA's effect must be seen"
    assert max(apart.values()) < 1e-4, apart


def sister(folder: Path, name: str) -> None:
    """A LoRA of one attention in the names of another family, or of a wider model."""
    path, out, rank = {
        "lumina": ("diffusion_model.context_refiner.0.attn.to_q", 288, 2),
        "qwen": ("transformer.transformer_blocks.0.img_mlp.net.2", 288, 2),
        "flux": ("transformer.single_transformer_blocks.0.proj_mlp", 288, 2),
        "wider": ("transformer.layers.0.attention.to_q", 3840, 2),
    }[name]
    state = {f"{path}.lora_A.weight": torch.ones(rank, out), f"{path}.lora_B.weight": torch.ones(out, rank)}
    save_file(state, folder / f"z-{name}.safetensors")


WRONG = {
    "lumina": "is a LoRA for the transformer of Lumina 2, but this model is the transformer of Z-Image",
    "qwen": "is a LoRA for the transformer of Qwen-Image, but this model is the transformer of Z-Image",
    "flux": "is a LoRA for the transformer of Flux, but this model is the transformer of Z-Image",
    "wider": "has factors [2, 3840] and [3840, 2], this model needs [2, 288] and [288, 2]",
}


def test_what_belongs_to_another_model_is_refused(folder: Path, comfy_server: Any) -> None:
    """Its text encoder, and LoRAs, before anything is copied or written."""
    told = graph(folder, "z-refused")
    tiny = {"class_type": "OneStepLoadTinyModel", "inputs": {"name": "tiny"}}
    told["distil"]["inputs"]["clip"] = ["tiny", 1]
    said = comfy_server.run({**told, "tiny": tiny}).error
    assert re.search(r"the text encoder gives tokens of \d+ numbers, and this model reads 24: load", said), said
    for name, why in WRONG.items():
        sister(comfy_server.base / "models" / "loras", name)
        told = graph(folder, "z-refused")
        told["distil"]["inputs"]["initial_lora"] = f"z-{name}.safetensors"
        assert why in comfy_server.run(told).error, name
    assert not (comfy_server.base / "output" / "onestep" / "z-refused").exists()


def test_the_workflow_trains_and_draws(folder: Path, comfy_server: Any, root: Path) -> None:
    """Workflow 11 with the tiny folder in the place of a person's files, cut short."""
    check_drawn(comfy_server, cut_short(root, "11 distil Z-Image", folder))
