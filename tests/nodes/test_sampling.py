"""One LoRA, the same latents: core's LoraLoader + KSampler, our nodes, diffusers alone; to float32's rounding.

The bundled models in a running server; `test_one_picture.py` has the published layouts.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from rounding import between_hosts
from safetensors.torch import load_file

from onestep.core.families import bind_diffusers, detect
from onestep.core.ksampler import core_nodes
from onestep.core.lora_file import load_lora, save_lora
from onestep.core.recipe import Recipe
from onestep.core.roles import Roles
from onestep.core.schedule import FlowSchedule, VPSchedule
from onestep.pipelines.plain import diffusers_settings
from onestep.training.engine.inputs import automatic_start

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]
SEED, PROMPT = 11, "a red dragon"
SCHEDULES = {"tiny": VPSchedule.scaled_linear(), "tiny-flow": FlowSchedule(3.0)}


@pytest.fixture(scope="module", params=["tiny", "tiny-flow"])
def case(request: Any, comfy_server: Any, bundled: dict[str, Path]) -> Any:
    """(model's name, its diffusers pipeline, the file of a LoRA with a large effect, its recipe)."""
    name = request.param
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "tiny-flow" else {}
    pipe = DiffusionPipeline.from_pretrained(bundled[name], **absent)
    network = pipe.unet if name == "tiny" else pipe.transformer
    roles, draw = Roles(bind_diffusers(network)), torch.Generator().manual_seed(1)
    roles.add("student", 4, 0)
    for _, b in roles.state("student").values():
        b.copy_(torch.randn(b.shape, generator=draw) * 0.2)
    schedule = SCHEDULES[name]
    recipe = Recipe.for_student(schedule, 1, detect(network), ((32, 32),), automatic_start(schedule, 1))
    folder = comfy_server.base / "models" / "loras" / "onestep"
    folder.mkdir(parents=True, exist_ok=True)
    many = Recipe.for_student(schedule, 4, detect(network), ((32, 32),))
    for drawn, suffix in ((recipe, ""), (many, "-4")):
        save_lora(folder / f"same-{name}{suffix}.safetensors", roles.state("student"), detect(network), drawn.to_json())
    low = recipe.retimed((recipe.timesteps[0] * 0.6,), 0.8)
    save_lora(folder / f"same-{name}-low.safetensors", roles.state("student"), detect(network), low.to_json())
    return name, pipe, folder / f"same-{name}.safetensors", recipe


def graph(name: str, sampling: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": {"class_type": "OneStepLoadTinyModel", "inputs": {"name": name}},
        "text": {"class_type": "CLIPTextEncode", "inputs": {"text": PROMPT, "clip": ["model", 1]}},
        "empty": {"class_type": "EmptyLatentImage", "inputs": {"width": 32, "height": 32, "batch_size": 2}},
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["sample", 0], "filename_prefix": "latents/same"}},
        **sampling,
    }


def core_lora(lora: str, strength: float = 1.0) -> dict[str, Any]:
    inputs = {"lora_name": lora, "strength_model": strength, "model": ["model", 0]}
    return {"lora": {"class_type": "LoraLoaderModelOnly", "inputs": inputs}}


def ksampler(lora: str, recipe: Recipe, schedule: Any, strength: float = 1.0) -> dict[str, Any]:
    """core's nodes alone, by the values that the recipe names."""
    node: Any = core_nodes(recipe, schedule).simple
    plugs = {"model": ["lora", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0]}
    kind, seed = type(node).__name__, "noise_seed" if "start_at_step" in asdict(node) else "seed"
    sampled = {"class_type": kind, "inputs": {**asdict(node), seed: SEED, **plugs}}
    return {**core_lora(lora, strength), "sample": sampled}


def manual(lora: str, recipe: Recipe, schedule: Any) -> dict[str, Any]:
    """core's nodes alone, by the sigmas that the recipe names."""
    node: Any = core_nodes(recipe, schedule).general
    parts = custom(lora) | core_lora(lora)
    parts["sigmas"] = {"class_type": "ManualSigmas", "inputs": {"sigmas": node.sigmas}}
    parts["sampler"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": node.sampler_name}}
    return parts


def one_step(lora: str) -> dict[str, Any]:
    loaded = {"model": ["model", 0], "lora_name": lora, "recipe": "from the file"}
    plugs = {
        "model": ["lora", 0],
        "positive": ["text", 0],
        "latent_image": ["empty", 0],
        "recipe": ["lora", 1],
        "seed": SEED,
    }
    return {
        "lora": {"class_type": "OneStepLoadLoRA", "inputs": loaded},
        "sample": {"class_type": "OneStepSample", "inputs": plugs},
    }


def custom(lora: str) -> dict[str, Any]:
    """SamplerCustomAdvanced with our two parts."""
    parts = one_step(lora)
    plugs = {"noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["sampler", 0], "sigmas": ["sigmas", 0]}
    return {
        "lora": parts["lora"],
        "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": SEED}},
        "guider": {"class_type": "BasicGuider", "inputs": {"model": ["lora", 0], "conditioning": ["text", 0]}},
        "sampler": {"class_type": "OneStepSampler", "inputs": {"recipe": ["lora", 1]}},
        "sigmas": {"class_type": "OneStepSigmas", "inputs": {"model": ["lora", 0], "recipe": ["lora", 1]}},
        "sample": {"class_type": "SamplerCustomAdvanced", "inputs": plugs | {"latent_image": ["empty", 0]}},
    }


def latents(server: Any, pipe: Any, workflow: dict[str, Any]) -> torch.Tensor:
    """What the workflow draws, in the model's own scale."""
    finished = server.run(workflow)
    assert finished.status == "success", finished.error
    entry = finished.outputs["save"]["latents"][0]
    saved = load_file(server.base / "output" / entry["subfolder"] / entry["filename"])["latent_tensor"]
    return (saved - (pipe.vae.config.shift_factor or 0)) * pipe.vae.config.scaling_factor


def noise() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.manual_seed(SEED))


@torch.no_grad()
def drawn_by_diffusers(pipe: Any, file: Path, recipe: Recipe) -> torch.Tensor:
    """diffusers alone, by the settings that are printed."""
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(file)
    before, arguments = pipe.scheduler, diffusers_settings(recipe).apply(pipe)
    drawn = pipe([PROMPT] * 2, latents=noise(), output_type="latent", **arguments)
    pipe.unload_lora_weights()
    pipe.scheduler = before
    return drawn.images


def test_one_lora_draws_the_same_everywhere(case: Any, comfy_server: Any) -> None:
    name, pipe, file, recipe = case
    lora, schedule = f"onestep/{file.name}", SCHEDULES[name]
    core = latents(comfy_server, pipe, graph(name, ksampler(lora, recipe, schedule)))
    scale = float(core.std())
    without = latents(comfy_server, pipe, graph(name, ksampler(lora, recipe, schedule, strength=0.0)))
    tolerance = between_hosts(schedule, recipe.timesteps[0])
    assert float((core - without).abs().max()) > 100 * tolerance * scale, "the LoRA's effect must be seen"
    others = {
        "One-Step Sample": latents(comfy_server, pipe, graph(name, one_step(lora))),
        "SamplerCustomAdvanced": latents(comfy_server, pipe, graph(name, custom(lora))),
        "ManualSigmas": latents(comfy_server, pipe, graph(name, manual(lora, recipe, schedule))),
        "diffusers": drawn_by_diffusers(pipe, file, recipe),
    }
    apart = {where: float((other - core).abs().max()) / scale for where, other in others.items()}
    assert max(apart.values()) < tolerance, apart


def test_four_steps_with_fresh_noise_are_ksamplers_lcm(case: Any, comfy_server: Any) -> None:
    name, pipe, file, recipe = case
    lora, schedule = f"onestep/{file.stem}-4.safetensors", SCHEDULES[name]
    many = Recipe.for_student(schedule, 4, recipe.family, recipe.sizes)
    core = latents(comfy_server, pipe, graph(name, ksampler(lora, many, schedule)))
    ours = latents(comfy_server, pipe, graph(name, one_step(lora)))
    assert float((ours - core).abs().max()) < between_hosts(schedule) * float(core.std())


def test_a_recipe_below_the_noisiest_level_is_fed_what_it_says(case: Any, comfy_server: Any) -> None:
    """KSampler would feed another noise there: told and fed are the recipe's own, as in our diffusers sampler."""
    from onestep.core.sampling import sample
    from onestep.pipelines.adapt import adapt

    name, pipe, file, _ = case
    lora = file.with_name(f"{file.stem}-low.safetensors")
    host, read = adapt(pipe), load_lora(lora)
    host.denoiser.roles.load("student", read.state)
    cond = host.encode([PROMPT] * 2, (32, 32))
    with torch.no_grad(), host.denoiser.roles.use("student"):
        low = Recipe.from_json(read.recipe)
        expected = sample(host.denoiser, low, cond, noise(), lambda step: noise())
    host.release()
    ours = latents(comfy_server, pipe, graph(name, one_step(f"onestep/{lora.name}")))
    assert float((ours - expected).abs().max()) < between_hosts(SCHEDULES[name], low.timesteps[0]) * float(
        expected.std()
    )


def test_the_loader_says_how_to_sample(case: Any, comfy_server: Any) -> None:
    name, _, file, _ = case
    one = {
        "tiny": ["KSampler (Advanced)", "steps 8", "start_at_step 3", "ManualSigmas 2.492"],
        "tiny-flow": ["steps 1"],
    }
    words = {"": [*one[name], "cfg 1", "euler", "simple", "32x32"], "-low": ["Use One-Step Sample"]}
    words["-4"] = ["KSampler with steps 4", "lcm"]
    for suffix, wanted in words.items():
        finished = comfy_server.run(graph(name, one_step(f"onestep/{file.stem}{suffix}.safetensors")))
        said = finished.outputs["lora"]["text"][0]
        assert all(word in said for word in wanted), said


def test_a_public_file_is_known_by_its_name(case: Any, comfy_server: Any) -> None:
    """It draws as its preset does, and the node says what it was taken for, and by what."""
    name, pipe, file, _ = case
    known = {"tiny": ("Hyper-SD15-2steps-lora", "hyper-sd-2-lora"), "tiny-flow": ("TDM_sd3_lora", "tdm-sd3-4")}
    unsure = {
        "tiny": ("pcm_sd15_4step", "pcm-4, pcm-4-cfg"),
        "tiny-flow": ("tdm_pcm_sd3_deterministic_2step", "pcm-sd"),
    }
    public, preset = known[name]
    family, state = detect(pipe.unet if name == "tiny" else pipe.transformer), load_lora(file).state
    for title in (public, unsure[name][0]):
        save_lora(file.with_name(f"{title}.safetensors"), state, family)
    by_name = one_step(f"onestep/{public}.safetensors")
    finished = comfy_server.run(graph(name, by_name))
    assert finished.outputs["lora"]["text"][0].startswith(
        f"It is taken for {preset}, by its name (another under 'recipe')."
    )
    chosen = one_step(f"onestep/{public}.safetensors")
    chosen["lora"]["inputs"]["recipe"] = preset
    drawn = latents(comfy_server, pipe, graph(name, chosen))
    assert torch.equal(latents(comfy_server, pipe, graph(name, by_name)), drawn)
    asked = comfy_server.run(graph(name, one_step(f"onestep/{unsure[name][0]}.safetensors"))).error
    assert f"may be one of {unsure[name][1]}" in asked and "by its name: choose the preset of its kind" in asked


def test_what_does_not_fit_is_refused_with_a_word(case: Any, comfy_server: Any) -> None:
    name, _, file, _ = case
    other = {"tiny": "tiny-flow", "tiny-flow": "tiny"}[name]
    finished = comfy_server.run(graph(other, one_step(f"onestep/{file.name}")))
    assert "choose the base it was made for" in finished.error and len(finished.error) < 400
    bare = one_step(f"onestep/{file.name}")
    bare["lora"]["inputs"]["lora_name"] = "none (the model is few-step itself)"
    assert "choose the preset" in comfy_server.run(graph(name, bare)).error
