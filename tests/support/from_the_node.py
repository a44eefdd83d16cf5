"""A family's student of four steps from the trainer's node: the facts that its tests differ in, and what each of them
checks. The node runs in a real ComfyUI on the family's tiny folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from comfy_graphs import distil, latents
from diffusers import DiffusionPipeline
from killed_server import factors, lora_of, resumed
from safetensors.torch import save_file
from student_drawing import drawing

from onestep.core.lora_file import LoraFile, load_lora
from onestep.core.recipe import Recipe
from onestep.core.sampling import sample
from onestep.pipelines.adapt import adapt

SEED = 11
SETTINGS = {"learning_rate": 1e-2, "ema": 0.5, "save_every": 1}
TINY = {"class_type": "OneStepLoadTinyModel", "inputs": {"name": "tiny"}}
"""A U-Net and a text encoder that are none of the families'."""


@dataclass(frozen=True)
class Sister:
    """A LoRA of one layer, of another family or width, and what is said of it."""

    layer: str
    width: int
    why: str


def scaled(vae: Any, x0: torch.Tensor) -> torch.Tensor:
    """x0 as its autoencoder reads it, by one number for all channels, or by two."""
    return x0 / vae.scaling_factor + (vae.shift_factor or 0)


def by_channel(vae: Any, x0: torch.Tensor) -> torch.Tensor:
    """x0 as its autoencoder reads it, which has a mean and a deviation of every channel."""
    mean, deviation = (torch.tensor(value)[:, None, None] for value in (vae.latents_mean, vae.latents_std))
    return x0 * deviation + mean


def folder_model(folder: Path, nodes: dict[str, Any]) -> dict[str, Any]:
    """``nodes``, whose "model" is the folder's MODEL, CLIP and VAE."""
    return {**nodes, "model": {"class_type": "LoadTinyFolder", "inputs": {"folder": str(folder)}}}


@dataclass(frozen=True)
class Facts:
    """layers: that the result is said to load. sizes: that it trains at. latents: [channels, height, width] of a
    picture of ``size``, which is (width, height) in pixels; shape: theirs in ComfyUI. tokens: how wide the network
    reads each of a text's."""

    name: str
    layers: int
    size: tuple[int, int]
    latents: tuple[int, int, int]
    shape: tuple[int, ...]
    tokens: int = 0
    sisters: dict[str, Sister] = field(default_factory=dict)
    unscaled: Callable[[Any, torch.Tensor], torch.Tensor] = scaled
    opened: Callable[[Path], Any] = DiffusionPipeline.from_pretrained
    model: Callable[[Path, dict[str, Any]], dict[str, Any]] = folder_model
    empty: str = "EmptyLatentImage"
    prompt: str = "a red dragon"
    others: tuple[str, ...] = ("a wall", "an old wall of blue stones beside a red dragon that sleeps")
    sizes: str = "32x32"
    updates: int = 12
    seen: float = 0.3

    def run(self, of: str) -> str:
        return f"{self.name}-{of}"


def graph(facts: Facts, folder: Path, of: str) -> dict[str, Any]:
    told = {"preset": "Balanced", "steps": facts.updates, "student_steps": "4", "sizes": facts.sizes}
    told |= {"existing": "continue"}
    prompts = "\n".join((facts.prompt, *facts.others))
    return facts.model(folder, {"distil": distil(facts.run(of), "dmd", SETTINGS, prompts=prompts, **told)})


def trained(facts: Facts, folder: Path, server: Any, *said: str) -> Path:
    """The LoRA of a run that nothing cut. said: what its last words have in them besides."""
    finished = server.run(graph(facts, folder, "uncut"))
    assert finished.status == "success", finished.error
    words = finished.outputs["distil"]["text"][0]
    assert all(part in words for part in (f"loads all {facts.layers} layers", *said)), words
    return lora_of(server, facts.run("uncut"))


def check_resumed(facts: Facts, folder: Path, uncut: Path, comfy: Any, pack: Path, base: Path) -> None:
    """Killed half-way and gone on with, it ends as the uncut one, to the bit. base: an empty folder."""
    told = (lambda: graph(facts, folder, "killed"), facts.run("killed"), facts.updates // 2)
    assert factors(resumed(comfy, pack, base, *told)) == factors(uncut)


def drawn_in_comfyui(facts: Facts, folder: Path, file: Path, server: Any) -> dict[str, torch.Tensor]:
    """What core's nodes draw, with the LoRA and without ("base"), and what ours draw."""
    told = drawing(folder, load_lora(file), file, facts.prompt, SEED, facts.size, facts.empty)
    return latents(server, facts.model(folder, told))


@torch.no_grad()
def drawn_in_diffusers(facts: Facts, folder: Path, file: LoraFile) -> torch.Tensor:
    """Four steps of the same network in diffusers, from KSampler's noise, which goes on from the next seed."""
    host = adapt(facts.opened(folder), device="cpu")
    first, later = (torch.Generator().manual_seed(seed) for seed in (SEED, SEED + 1))
    host.denoiser.roles.load("student", file.state)
    with host.denoiser.roles.use("student"):
        noise = torch.randn(1, *facts.latents, generator=first)
        recipe, cond = Recipe.from_json(str(file.recipe)), host.encode([facts.prompt], facts.size)
        x0 = sample(host.denoiser, recipe, cond, noise, lambda step: torch.randn(noise.shape, generator=later))
    return facts.unscaled(host.pipe.vae.config, x0).reshape(facts.shape)


def check_one_picture(facts: Facts, folder: Path, uncut: Path, server: Any, **more: torch.Tensor) -> None:
    """more: the picture by other ways."""
    check_alike(facts, folder, uncut, drawn_in_comfyui(facts, folder, uncut, server) | more)


def check_alike(facts: Facts, folder: Path, uncut: Path, drawn: dict[str, torch.Tensor]) -> None:
    """``drawn``, of the LoRA ``uncut`` by several ways and without it as "base", are diffusers' picture."""
    assert {tuple(latent.shape) for latent in drawn.values()} == {facts.shape}
    scale = float(drawn["ours"].std())
    drawn = {**drawn, "diffusers": drawn_in_diffusers(facts, folder, load_lora(uncut))}
    apart = {way: float((latent - drawn["ours"]).abs().max()) / scale for way, latent in drawn.items()}
    assert apart.pop("base") > facts.seen, "the LoRA's effect must be seen"
    assert {"core", "ours", "diffusers"} <= apart.keys() and max(apart.values()) < 1e-4, apart


def refused(facts: Facts, folder: Path) -> dict[str, Any]:
    """The graph of a run that nothing is to be left of."""
    return graph(facts, folder, "refused")


def check_text_encoder_refused(facts: Facts, folder: Path, server: Any) -> None:
    told = refused(facts, folder)
    told["distil"]["inputs"]["clip"] = ["tiny", 1]
    said = server.run({**told, "tiny": TINY}).error
    wanted = rf"the text encoder gives tokens of \d+ numbers, and this model reads {facts.tokens}: load"
    assert re.search(wanted, said), said


def check_sisters_refused(facts: Facts, folder: Path, server: Any) -> None:
    for name, sister in facts.sisters.items():
        wide, file = torch.ones(2, sister.width), facts.run(f"{name}.safetensors")
        state = {f"{sister.layer}.lora_A.weight": wide, f"{sister.layer}.lora_B.weight": wide.T.contiguous()}
        save_file(state, server.base / "models" / "loras" / file)
        told = refused(facts, folder)
        told["distil"]["inputs"]["initial_lora"] = file
        assert sister.why in server.run(told).error, name


def check_nothing_written(facts: Facts, server: Any) -> None:
    assert not (server.base / "output" / "onestep" / facts.run("refused")).exists()
