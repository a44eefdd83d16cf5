"""One LoRA, the same latents: core's LoraLoader + KSampler, our nodes, diffusers alone; 1e-5 of their std."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from onestep.core.families import bind_diffusers, detect
from onestep.core.lora_file import save_lora
from onestep.core.recipe import Recipe
from onestep.core.roles import Roles
from onestep.core.schedule import FlowSchedule, VPSchedule

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]
SEED, PROMPT, TOLERANCE = 11, "a red dragon", 1e-5


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
    schedule = VPSchedule.scaled_linear() if name == "tiny" else FlowSchedule(3.0)
    recipe = Recipe.for_student(schedule, 1, detect(network), ((32, 32),))
    folder = comfy_server.base / "models" / "loras" / "onestep"
    folder.mkdir(parents=True, exist_ok=True)
    for steps, suffix in ((1, ""), (4, "-4")):
        many = Recipe.for_student(schedule, steps, detect(network), ((32, 32),))
        save_lora(folder / f"same-{name}{suffix}.safetensors", roles.state("student"), detect(network), many.to_json())
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


def ksampler(lora: str, steps: int = 1, sampler: str = "euler", strength: float = 1.0) -> dict[str, Any]:
    told = {"lora_name": lora, "strength_model": strength, "model": ["model", 0]}
    widgets = {"seed": SEED, "steps": steps, "cfg": 1.0, "sampler_name": sampler, "scheduler": "simple", "denoise": 1.0}
    plugs = {"model": ["lora", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0]}
    return {
        "lora": {"class_type": "LoraLoaderModelOnly", "inputs": told},
        "sample": {"class_type": "KSampler", "inputs": widgets | plugs},
    }


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
def drawn_by_diffusers(pipe: Any, file: Path) -> torch.Tensor:
    """Ten lines without our classes."""
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(file)
    more = {"max_sequence_length": 0, "sigmas": [1.0]} if hasattr(pipe, "transformer") else {}
    drawn = pipe(
        [PROMPT] * 2,
        num_inference_steps=1,
        guidance_scale=1.0,
        latents=noise(),
        width=32,
        height=32,
        output_type="latent",
        **more,
    )
    pipe.unload_lora_weights()
    return drawn.images


def test_one_lora_draws_the_same_everywhere(case: Any, comfy_server: Any) -> None:
    name, pipe, file, _ = case
    lora = f"onestep/{file.name}"
    core = latents(comfy_server, pipe, graph(name, ksampler(lora)))
    scale = float(core.std())
    without = latents(comfy_server, pipe, graph(name, ksampler(lora, strength=0.0)))
    assert float((core - without).abs().max()) > 100 * TOLERANCE * scale, "the LoRA's effect must be seen"
    others = {
        "One-Step Sample": latents(comfy_server, pipe, graph(name, one_step(lora))),
        "SamplerCustomAdvanced": latents(comfy_server, pipe, graph(name, custom(lora))),
        "diffusers": drawn_by_diffusers(pipe, file),
    }
    apart = {where: float((other - core).abs().max()) / scale for where, other in others.items()}
    assert max(apart.values()) < TOLERANCE, apart


def test_four_steps_with_fresh_noise_are_ksamplers_lcm(case: Any, comfy_server: Any) -> None:
    name, pipe, file, _ = case
    lora = f"onestep/{file.stem}-4.safetensors"
    core = latents(comfy_server, pipe, graph(name, ksampler(lora, steps=4, sampler="lcm")))
    ours = latents(comfy_server, pipe, graph(name, one_step(lora)))
    assert float((ours - core).abs().max()) < TOLERANCE * float(core.std())


def test_a_recipe_below_the_noisiest_level_is_fed_what_it_says(case: Any, comfy_server: Any) -> None:
    """KSampler would feed another noise there: told and fed are the recipe's own, as in our diffusers sampler."""
    from onestep.core.lora_file import load_lora
    from onestep.core.sampling import sample
    from onestep.pipelines.adapt import adapt

    name, pipe, file, _ = case
    lora = file.with_name(f"{file.stem}-low.safetensors")
    host, read = adapt(pipe), load_lora(lora)
    host.denoiser.roles.load("student", read.state)
    cond = host.encode([PROMPT] * 2, (32, 32))
    with torch.no_grad(), host.denoiser.roles.use("student"):
        expected = sample(host.denoiser, Recipe.from_json(read.recipe), cond, noise(), lambda step: noise())
    host.release()
    ours = latents(comfy_server, pipe, graph(name, one_step(f"onestep/{lora.name}")))
    assert float((ours - expected).abs().max()) < TOLERANCE * float(expected.std())


def test_the_loader_says_how_to_sample(case: Any, comfy_server: Any) -> None:
    name, _, file, _ = case
    for suffix, words in (("", ["steps 1", "cfg 1", "euler", "simple", "32x32"]), ("-low", ["Use One-Step Sample"])):
        finished = comfy_server.run(graph(name, one_step(f"onestep/{file.stem}{suffix}.safetensors")))
        said = finished.outputs["lora"]["text"][0]
        assert all(word in said for word in words), said


def test_what_does_not_fit_is_refused_with_a_word(case: Any, comfy_server: Any) -> None:
    name, _, file, _ = case
    other = {"tiny": "tiny-flow", "tiny-flow": "tiny"}[name]
    finished = comfy_server.run(graph(other, one_step(f"onestep/{file.name}")))
    assert "choose the base it was made for" in finished.error and len(finished.error) < 400
    bare = one_step(f"onestep/{file.name}")
    bare["lora"]["inputs"]["lora_name"] = "none (the model is few-step itself)"
    assert "choose the preset" in comfy_server.run(graph(name, bare)).error
