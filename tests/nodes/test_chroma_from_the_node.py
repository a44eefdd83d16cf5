"""Chroma from the trainer's node in a real ComfyUI: a student of four steps, its server killed on the way; what comes
out draws one picture by core's nodes, by ours and in diffusers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_chroma
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
SEED, PROMPT, UPDATES = 11, "a red dragon", 8
PROMPTS = f"{PROMPT}\na wall\nan old wall of blue stones beside a red dragon that sleeps"
"""Of three lengths: their embeddings lie on the disk in their own."""
SETTINGS = {"learning_rate": 1e-2, "ema": 0.5, "save_every": 1}
LAYERS = 421


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chroma.chroma_folder(tmp_path_factory.mktemp("chroma") / "model")


def graph(folder: Path, name: str) -> dict[str, Any]:
    told = {"preset": "Balanced", "steps": UPDATES, "student_steps": "4", "existing": "continue"}
    return {
        "model": {"class_type": "LoadTinyFolder", "inputs": {"folder": str(folder)}},
        "distil": distil(name, "dmd", SETTINGS, prompts=PROMPTS, **told),
    }


@pytest.fixture(scope="module")
def uncut(folder: Path, comfy_server: Any) -> Path:
    finished = comfy_server.run(graph(folder, "chroma-uncut"))
    assert finished.status == "success", finished.error
    assert f"loads all {LAYERS} layers" in finished.outputs["distil"]["text"][0]
    return lora_of(comfy_server, "chroma-uncut")


def test_a_killed_server_goes_on_to_the_bit(uncut: Path, folder: Path, comfy: Any, pack: Path, tmp_path: Path) -> None:
    found = resumed(comfy, pack, tmp_path, lambda: graph(folder, "chroma-killed"), "chroma-killed", 4)
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
    told = drawing(folder, file, uncut, PROMPT, SEED, (32, 32), "EmptyLatentImage")
    drawn = latents(comfy_server, told)
    drawn["diffusers"], scale = by_diffusers(folder, file), float(drawn["ours"].std())
    apart = {way: float((latent - drawn["ours"]).abs().max()) / scale for way, latent in drawn.items()}
    assert apart.pop("base") > 0.3, "the LoRA's effect must be seen"
    assert max(apart.values()) < 1e-4, apart


def sister(folder: Path, name: str) -> None:
    """A LoRA of one layer in the names of another family, or of a wider model."""
    path, width = {
        "flux": ("transformer.single_transformer_blocks.0.norm.linear", 32),
        "radiance": ("diffusion_model.nerf_blocks.0.param_generator", 32),
        "maker": ("diffusion_model.distilled_guidance_layer.in_proj", 64),
        "wider": ("transformer.single_transformer_blocks.0.attn.to_q", 3072),
    }[name]
    state = {f"{path}.lora_A.weight": torch.ones(2, width), f"{path}.lora_B.weight": torch.ones(width, 2)}
    save_file(state, folder / f"chroma-{name}.safetensors")


WRONG = {
    "flux": "is a LoRA for the transformer of Flux, but this model is the transformer of Chroma",
    "radiance": "This LoRA is for Chroma Radiance",
    "maker": "which is not adapted here (it modulates every block by the time",
    "wider": "has factors [2, 3072] and [3072, 2], this model needs [2, 32] and [32, 2]",
}


def test_what_belongs_to_another_model_is_refused(folder: Path, comfy_server: Any) -> None:
    """Its text encoder, and LoRAs, before anything is copied or written."""
    told = graph(folder, "chroma-refused")
    tiny = {"class_type": "OneStepLoadTinyModel", "inputs": {"name": "tiny"}}
    told["distil"]["inputs"]["clip"] = ["tiny", 1]
    said = comfy_server.run({**told, "tiny": tiny}).error
    assert re.search(r"the text encoder gives tokens of \d+ numbers, and this model reads 24: load", said), said
    for name, why in WRONG.items():
        sister(comfy_server.base / "models" / "loras", name)
        told = graph(folder, "chroma-refused")
        told["distil"]["inputs"]["initial_lora"] = f"chroma-{name}.safetensors"
        assert why in comfy_server.run(told).error, name
    assert not (comfy_server.base / "output" / "onestep" / "chroma-refused").exists()


def test_the_workflow_trains_and_draws(folder: Path, comfy_server: Any, root: Path) -> None:
    """Workflow 16 with the tiny folder in the place of a person's files, cut short."""
    check_drawn(comfy_server, cut_short(root, "16 distil Chroma", folder))
