"""Qwen-Image from the trainer's node in a real ComfyUI: a student of four steps, its server killed on the way; what
comes out draws one picture by core's nodes, by ours and in diffusers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_qwen
import torch
from comfy_graphs import distil, latents
from diffusers import DiffusionPipeline
from killed_server import factors, lora_of, resumed
from own_workflow import check_drawn, cut_short
from safetensors.torch import save_file
from student_drawing import drawing
from tiny_pipelines import video_vae

from onestep.core.lora_file import LoraFile, load_lora
from onestep.core.recipe import Recipe
from onestep.core.sampling import sample
from onestep.pipelines.adapt import adapt

pytestmark = [pytest.mark.comfy, pytest.mark.broad, pytest.mark.filterwarnings("ignore")]
SEED, PROMPT, UPDATES = 11, "a red dragon", 12
PROMPTS = f"{PROMPT}\na wall\nan old wall of blue stones beside a red dragon that sleeps"
"""Of three lengths: their embeddings lie on the disk in their own."""
SETTINGS = {"learning_rate": 1e-2, "ema": 0.5, "save_every": 1}
LAYERS = 34


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen.qwen_image_folder(tmp_path_factory.mktemp("qwen") / "model", video_vae(), 256, 2)


def graph(folder: Path, name: str) -> dict[str, Any]:
    told = {"preset": "Balanced", "steps": UPDATES, "student_steps": "4", "existing": "continue"}
    return {
        "model": {"class_type": "LoadTinyFolder", "inputs": {"folder": str(folder)}},
        "distil": distil(name, "dmd", SETTINGS, prompts=PROMPTS, **told),
    }


@pytest.fixture(scope="module")
def uncut(folder: Path, comfy_server: Any) -> Path:
    finished = comfy_server.run(graph(folder, "q-uncut"))
    assert finished.status == "success", finished.error
    assert f"loads all {LAYERS} layers" in finished.outputs["distil"]["text"][0]
    return lora_of(comfy_server, "q-uncut")


def test_a_killed_server_goes_on_to_the_bit(uncut: Path, folder: Path, comfy: Any, pack: Path, tmp_path: Path) -> None:
    found = resumed(comfy, pack, tmp_path, lambda: graph(folder, "q-killed"), "q-killed", 6)
    assert factors(found) == factors(uncut)


@torch.no_grad()
def by_diffusers(folder: Path, file: LoraFile) -> torch.Tensor:
    """Four steps of the same network in diffusers, from KSampler's noise, which goes on from the next seed."""
    host = adapt(DiffusionPipeline.from_pretrained(folder), device="cpu")
    first, later = (torch.Generator().manual_seed(seed) for seed in (SEED, SEED + 1))
    host.denoiser.roles.load("student", file.state)
    with host.denoiser.roles.use("student"):
        recipe, noise = Recipe.from_json(file.recipe), torch.randn(1, 16, 8, 8, generator=first)
        cond = host.encode([PROMPT], (64, 64))
        x0 = sample(host.denoiser, recipe, cond, noise, lambda step: torch.randn(noise.shape, generator=later))
    vae = host.pipe.vae.config
    mean, deviation = (torch.tensor(value).view(1, 16, 1, 1) for value in (vae.latents_mean, vae.latents_std))
    return x0 * deviation + mean


def test_one_picture(uncut: Path, folder: Path, comfy_server: Any) -> None:
    file = load_lora(uncut)
    drawn = {
        name: latent.reshape(1, 16, 8, 8)
        for name, latent in latents(
            comfy_server, drawing(folder, file, uncut, PROMPT, SEED, (64, 64), "EmptySD3LatentImage")
        ).items()
    }
    drawn["diffusers"], scale = by_diffusers(folder, file), float(drawn["ours"].std())
    apart = {way: float((latent - drawn["ours"]).abs().max()) / scale for way, latent in drawn.items()}
    assert apart.pop("base") > 0.3, "the LoRA's effect must be seen"
    assert max(apart.values()) < 1e-4, apart


def sister(folder: Path, name: str) -> None:
    """A LoRA of one layer in the names of another family, or of a wider model."""
    path, width = {
        "lens": ("transformer.transformer_blocks.0.attn.img_qkv", 64),
        "layered": ("transformer.time_text_embed.addition_t_embedding", 64),
        "flux": ("transformer.single_transformer_blocks.0.proj_mlp", 64),
        "wider": ("transformer.transformer_blocks.0.img_mod.1", 3072),
    }[name]
    state = {f"{path}.lora_A.weight": torch.ones(2, width), f"{path}.lora_B.weight": torch.ones(width, 2)}
    save_file(state, folder / f"q-{name}.safetensors")


WRONG = {
    "lens": "This LoRA is for Lens",
    "layered": "This LoRA is for Qwen-Image-Layered",
    "flux": "is a LoRA for the transformer of Flux, but this model is the transformer of Qwen-Image",
    "wider": "has factors [2, 3072] and [3072, 2], this model needs [2, 64] and [384, 2]",
}


def test_what_belongs_to_another_model_is_refused(folder: Path, comfy_server: Any) -> None:
    """Its text encoder, LoRAs, and sizes that the hosts place differently, before anything is copied or written."""
    told = graph(folder, "q-refused")
    tiny = {"class_type": "OneStepLoadTinyModel", "inputs": {"name": "tiny"}}
    told["distil"]["inputs"]["clip"] = ["tiny", 1]
    said = comfy_server.run({**told, "tiny": tiny}).error
    assert re.search(r"the text encoder gives tokens of \d+ numbers, and this model reads 256: load", said), said
    for name, why in WRONG.items():
        sister(comfy_server.base / "models" / "loras", name)
        told = graph(folder, "q-refused")
        told["distil"]["inputs"]["initial_lora"] = f"q-{name}.safetensors"
        assert why in comfy_server.run(told).error, name
    told = graph(folder, "q-refused")
    told["distil"]["inputs"]["sizes"] = "48x64"
    assert "multiples of 32 pixels" in comfy_server.run(told).error
    assert not (comfy_server.base / "output" / "onestep" / "q-refused").exists()


def test_the_workflow_trains_and_draws(folder: Path, comfy_server: Any, root: Path) -> None:
    """Workflow 14 with the tiny folder in the place of a person's files, cut short."""
    check_drawn(comfy_server, cut_short(root, "14 distil Qwen-Image", folder))
