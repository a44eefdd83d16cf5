"""Krea 2 from the trainer's node in a real ComfyUI, its MODEL by ComfyUI's own loader: a student of four steps, its
server killed on the way; what comes out draws one picture by core's nodes, by ours and in diffusers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_krea2
import torch
from comfy_graphs import distil, latents
from diffusers import AutoencoderKLQwenImage, DiffusionPipeline
from killed_server import factors, lora_of, resumed
from own_workflow import check_drawn, cut_short
from safetensors.torch import save_file
from student_drawing import drawing
from tiny_pipelines import randomise

from onestep.core.lora_file import LoraFile, load_lora
from onestep.core.recipe import Recipe
from onestep.core.sampling import sample
from onestep.pipelines.adapt import adapt

pytestmark = [pytest.mark.comfy, pytest.mark.broad, pytest.mark.filterwarnings("ignore")]
SEED, PROMPT, UPDATES = 11, "a red dragon", 12
PROMPTS = f"{PROMPT}\na wall\nan old wall of blue stones beside a red dragon that sleeps"
"""Of three lengths: their embeddings lie on the disk in their own."""
SETTINGS = {"learning_rate": 1e-2, "ema": 0.5, "save_every": 1}
LAYERS, FILE = 8 + 8 * (1 + 4), "krea2_raw_tiny.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its autoencoder has the published statistics, which ComfyUI's MODEL knows."""
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(base_dim=4).eval()
    randomise(vae)
    told = {"sizes": tiny_krea2.OWN, "distilled": True}
    return tiny_krea2.krea2_folder(tmp_path_factory.mktemp("krea2") / "model", vae, **told)


@pytest.fixture(scope="module")
def server(folder: Path, comfy_server: Any) -> Any:
    tiny_krea2.own_checkpoint(folder, comfy_server.base / "models" / "diffusion_models" / FILE)
    return comfy_server


def with_model(folder: Path, nodes: dict[str, Any]) -> dict[str, Any]:
    """``nodes``, whose "model" is ComfyUI's own loader's MODEL and the folder's CLIP and VAE."""
    nodes = {**nodes, "model": {"class_type": "LoadTinyFolder", "inputs": {"folder": str(folder)}}}
    for node in nodes.values():
        plugs = node["inputs"].items()
        node["inputs"] = {name: ["unet", 0] if plug == ["model", 0] else plug for name, plug in plugs}
    return {**nodes, "unet": {"class_type": "UNETLoader", "inputs": {"unet_name": FILE, "weight_dtype": "default"}}}


def graph(folder: Path, name: str) -> dict[str, Any]:
    told = {"preset": "Balanced", "steps": UPDATES, "student_steps": "4", "existing": "continue"}
    return with_model(folder, {"distil": distil(name, "dmd", SETTINGS, prompts=PROMPTS, **told)})


@pytest.fixture(scope="module")
def uncut(folder: Path, server: Any) -> Path:
    finished = server.run(graph(folder, "k-uncut"))
    assert finished.status == "success", finished.error
    assert f"loads all {LAYERS} layers" in finished.outputs["distil"]["text"][0]
    return lora_of(server, "k-uncut")


def test_a_killed_server_goes_on_to_the_bit(uncut: Path, folder: Path, comfy: Any, pack: Path, tmp_path: Path) -> None:
    tiny_krea2.own_checkpoint(folder, tmp_path / "models" / "diffusion_models" / FILE)
    found = resumed(comfy, pack, tmp_path, lambda: graph(folder, "k-killed"), "k-killed", 6)
    assert factors(found) == factors(uncut)


@torch.no_grad()
def by_diffusers(folder: Path, file: LoraFile) -> torch.Tensor:
    """Four steps of the same network in diffusers, from KSampler's noise, which goes on from the next seed."""
    host = adapt(DiffusionPipeline.from_pretrained(folder), device="cpu")
    first, later = (torch.Generator().manual_seed(seed) for seed in (SEED, SEED + 1))
    host.denoiser.roles.load("student", file.state)
    with host.denoiser.roles.use("student"):
        recipe, noise = Recipe.from_json(str(file.recipe)), torch.randn(1, 16, 8, 8, generator=first)
        cond = host.encode([PROMPT], (64, 64))
        x0 = sample(host.denoiser, recipe, cond, noise, lambda step: torch.randn(noise.shape, generator=later))
    vae = host.pipe.vae.config
    mean, deviation = (torch.tensor(value).view(1, 16, 1, 1) for value in (vae.latents_mean, vae.latents_std))
    return x0 * deviation + mean


def test_one_picture(uncut: Path, folder: Path, server: Any) -> None:
    file = load_lora(uncut)
    told = drawing(folder, file, uncut, PROMPT, SEED, (64, 64), "EmptySD3LatentImage")
    drawn = {name: found.reshape(1, 16, 8, 8) for name, found in latents(server, with_model(folder, told)).items()}
    drawn["diffusers"], scale = by_diffusers(folder, file), float(drawn["ours"].std())
    apart = {way: float((latent - drawn["ours"]).abs().max()) / scale for way, latent in drawn.items()}
    assert apart.pop("base") > 0.3, "the LoRA's effect must be seen"
    assert max(apart.values()) < 1e-4, apart


def sister(folder: Path, name: str) -> None:
    """A LoRA of one layer in the names of another family, or of a wider model."""
    path, width = {
        "lens": ("transformer.transformer_blocks.0.attn.img_qkv", 256),
        "qwen": ("transformer.transformer_blocks.0.img_mlp.net.2", 256),
        "wan": ("diffusion_model.blocks.0.self_attn.q", 256),
        "wider": ("transformer.transformer_blocks.0.attn.to_gate", 6144),
    }[name]
    state = {f"{path}.lora_A.weight": torch.ones(2, width), f"{path}.lora_B.weight": torch.ones(width, 2)}
    save_file(state, folder / f"k-{name}.safetensors")


WRONG = {
    "lens": "This LoRA is for Lens",
    "qwen": "is a LoRA for the transformer of Qwen-Image, but this model is the transformer of Krea 2",
    "wan": "Wan",
    "wider": "has factors [2, 6144] and [6144, 2], this model needs [2, 256] and [256, 2]",
}


def test_what_belongs_to_another_model_is_refused(folder: Path, server: Any) -> None:
    """Its text encoder, LoRAs, and sizes of half a token, before anything is copied or written."""
    told = graph(folder, "k-refused")
    tiny = {"class_type": "OneStepLoadTinyModel", "inputs": {"name": "tiny"}}
    told["distil"]["inputs"]["clip"] = ["tiny", 1]
    said = server.run({**told, "tiny": tiny}).error
    assert re.search(r"the text encoder gives tokens of \d+ numbers, and this model reads 120: load", said), said
    for name, why in WRONG.items():
        sister(server.base / "models" / "loras", name)
        told = graph(folder, "k-refused")
        told["distil"]["inputs"]["initial_lora"] = f"k-{name}.safetensors"
        assert why in server.run(told).error, name
    told = graph(folder, "k-refused")
    told["distil"]["inputs"]["sizes"] = "40x64"
    assert "multiples of 16 pixels" in server.run(told).error
    assert not (server.base / "output" / "onestep" / "k-refused").exists()


def test_the_workflow_trains_and_draws(folder: Path, server: Any, root: Path) -> None:
    """Workflow 15 with ComfyUI's own loader's MODEL and the tiny folder in the place of a person's files, cut short."""
    check_drawn(server, with_model(folder, cut_short(root, "15 distil Krea 2", folder)))
