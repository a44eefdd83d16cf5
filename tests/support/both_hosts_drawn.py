"""What is hung on a model and drawn with it, in diffusers' host and in ComfyUI's (support/comfy_drawn.py): negatives,
adapters, a base's first part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from both_hosts import RUNS, Hosts, gap
from diffusers import DiffusionPipeline
from lora_files import random_lora
from safetensors.torch import load_file, save_file
from small_networks import seeded
from torch import Tensor, nn

from onestep.core import control, control_copy, guidance_adapter
from onestep.core.adapter_file import load_adapter, read_told, save_adapter
from onestep.core.features import Features
from onestep.core.recipe import Recipe
from onestep.pipelines import diverse
from onestep.pipelines.adapt import DiffusersHost, denoiser_of
from onestep.pipelines.distill import distill
from onestep.pipelines.guidance_adapter import load_guidance_adapter
from onestep.pipelines.load import load
from onestep.pipelines.one_step import OneStepPipeline
from onestep.pipelines.steer import steered

MAKERS = guidance_adapter.MAKERS | control_copy.MAKERS
SHARE, SEED, BASE_STEPS, GUIDANCE = 0.3, 7, 8, 3.0
SHORT_RUN = {"batch": 2, "steps": 3, "sizes": "32x32", "watch_every": 0, "preview_every": 0, "learning_rate": 0.01}
ADAPTERS: dict[str, dict[str, Any]] = {
    "agd": {**SHORT_RUN, "teacher_steps": 2, "states": 1, "guidance_high": 5.0},
    "nct": {**SHORT_RUN, "pairs": 4, "control": "canny", "control_width": 8, "noise_levels": 2},
}


def told(
    folder: Path, recipe: Recipe, negatives: Sequence[Sequence[str]], prompt: str, guidance: float = GUIDANCE
) -> dict[str, Any]:
    """What ComfyUI is asked besides. negatives: (mode, prompt, negative)."""
    asked: dict[str, Any] = {"runs": RUNS | ADAPTERS, "steered": negatives, "share": SHARE}
    return asked | diverse_told(folder, recipe, prompt, guidance)


def diverse_told(
    folder: Path, recipe: Recipe, prompt: str, guidance: float = GUIDANCE, negative: str = ""
) -> dict[str, Any]:
    """What ComfyUI is asked for check_diverse, with a random few-step LoRA beside ``folder``."""
    few = random_lora(load(folder), folder.parent / "few.safetensors", recipe, 0.1, loader="comfyui")
    return {"diverse": [str(few), prompt, SEED, BASE_STEPS, guidance, negative]}


@torch.no_grad()
def check_steered(hosts: Hosts, number: int, told: Sequence[str], share: float = SHARE) -> None:
    """x0 at one level away from a negative, by text encoders of both hosts."""
    host, mode, prompt, negative = hosts.host, *told
    schedule = host.denoiser.schedule
    sigma = schedule.sigma_at(torch.tensor([1 - share], dtype=torch.float64))
    x, cond = hosts.inputs["x"][:1] * sigma.float(), host.encode([prompt], (32, 32))
    plain = host.denoiser(x, sigma, cond)
    with steered(host.pipe, negative, mode):
        found = host.denoiser(x, sigma, cond)
    assert gap(hosts.comfys[f"steered/{number}"], found) < 5e-5 and gap(found, plain) > 1e-2


@torch.no_grad()
def check_features(hosts: Hosts) -> None:
    """What a discriminator's head would see of the student."""
    host, inputs = hosts.host, hosts.inputs
    roles = host.denoiser.roles
    features = Features(roles.targets, host.blocks, 2, roles.active_here)
    with roles.use("student"), features.kept(inputs["x"]) as found:
        host.denoiser(inputs["x"], inputs["sigma"], hosts.cond)
    for name, value in zip(features.names, found, strict=True):
        assert gap(hosts.comfys[f"feature/{name}"], value) < 5e-5, name


def check_diverse(hosts: Hosts, prompt: str, base: Any = None, guidance: float = GUIDANCE, negative: str = "") -> None:
    """Two SamplerCustom in ComfyUI and `diverse` in diffusers. base: a pipeline whose levels are ComfyUI's."""
    fast = OneStepPipeline.from_pipe(load(hosts.work / "model"))
    fast.load_one_step_lora(hosts.work / "few.safetensors")
    call: dict[str, Any] = {"seed": SEED, "output_type": "latent", "negative_prompt": negative}
    wanted = diverse(fast, prompt, base=base, base_steps=BASE_STEPS, guidance=guidance, **call).images
    assert gap(hosts.comfys["diverse"], wanted) < 1e-4 and gap(fast(prompt, **call).images, wanted) > 0.01


def check_adapter(hosts: Hosts, method: str, prompts: Sequence[str], **more: Any) -> None:
    """Both hosts train the same one, to a twentieth of the way that training has taken it. more: settings beside those
    of ADAPTERS, which ComfyUI was told too."""
    work, (name, said) = hosts.work, hosts.report["files"][method]
    assert "bit for bit" in said
    pipe = DiffusionPipeline.from_pretrained(work / "model")
    ours = distill(pipe, prompts, method, out=work / method, **ADAPTERS[method] | more)
    files = ours.path, work / f"comfy-{method}" / name
    mine, theirs = (load_adapter(path, MAKERS, hosts.host.family).module for path in files)
    start = type(mine).from_config(**read_told(ours.path)["config"])
    moved = 0.0
    for (layer, one), (_, other), (_, first) in zip(*map(_parameters, (mine, theirs, start)), strict=True):
        moved += float((one - first).norm())
        assert float((one - other).norm()) < 0.05 * float((one - first).norm()) + 1e-6, layer
    assert moved > 0


def _parameters(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, value.detach()) for name, value in module.named_parameters()]


@torch.no_grad()
def check_guidance(hosts: Hosts) -> None:
    """Both adapters, once trained, draw nearly alike."""
    host, inputs, work, cond = hosts.host, hosts.inputs, hosts.work, hosts.cond
    plain, drawn = denoiser_of(host.pipe)(inputs["x"], inputs["sigma"], cond), []
    for path in (work / "agd" / "result.safetensors", work / "comfy-agd" / hosts.report["files"]["agd"][0]):
        with load_guidance_adapter(host.pipe, path, 4.0):
            drawn.append(denoiser_of(host.pipe)(inputs["x"], inputs["sigma"], cond))
    assert gap(drawn[1], drawn[0]) < 0.1 * gap(drawn[0], plain)


@torch.no_grad()
def control_file(host: DiffusersHost, work: Path, size: tuple[int, int]) -> None:
    """A control adapter away from its start, a new one, and a control picture, in ``work``."""
    places = host.denoiser.roles.modules.places
    module = control.new_adapter(host.family, places, ("canny", 1), size, host.latent_shape(size), width=16)
    save_adapter(work / "new.safetensors", module, host.family)
    draw = seeded(2)
    for _, value in sorted(module.named_parameters()):
        value.add_(0.1 * draw(*value.shape).float())
    save_adapter(work / "control.safetensors", module, host.family)
    picture = torch.rand(1, 1, *size[::-1], generator=torch.Generator().manual_seed(4))
    save_file({"picture": picture}, work / "picture.safetensors")


@torch.no_grad()
def check_control(hosts: Hosts, prompt: str, recipe: Recipe, size: tuple[int, int]) -> None:
    """A picture under it is the same in both hosts; a new adapter changes nothing, to the bit, nor strength 0 does."""
    pipe = OneStepPipeline.from_pipe(load(hosts.work / "model"))
    noise = torch.randn(1, *hosts.host.latent_shape(size), generator=torch.Generator().manual_seed(5))
    call: dict[str, Any] = {"recipe": recipe, "latents": noise, "output_type": "latent"}
    picture = {"control_image": load_file(hosts.work / "picture.safetensors")["picture"]}
    plain = pipe(prompt, **call).images
    pipe.load_control(hosts.work / "new.safetensors")
    assert torch.equal(pipe(prompt, **picture, **call).images, plain)
    assert torch.equal(hosts.comfys["control new"], hosts.comfys["control none"])
    pipe.load_control(hosts.work / "control.safetensors")
    drawn = pipe(prompt, **picture, **call).images
    assert gap(hosts.comfys["control none"], plain) < 1e-4 and gap(hosts.comfys["control"], drawn) < 1e-4
    assert torch.equal(pipe(prompt, control_strength=0, **picture, **call).images, plain) and gap(drawn, plain) > 1e-2
