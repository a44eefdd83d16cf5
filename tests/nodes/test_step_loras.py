"""A LoRA for each step in a running server: our loader's MODEL under our sampler and core's, against a plain chain of
KSampler (Advanced), each behind its own LoraLoader; and from the trainer's node to the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from small_runs import small

from onestep.core.families import bind_diffusers, detect
from onestep.core.lora_file import load_lora, save_lora
from onestep.core.recipe import Recipe, step_names
from onestep.core.roles import Roles
from onestep.core.schedule import FlowSchedule, VPSchedule

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]
SEED, PROMPT = 11, "a red dragon"
SCHEDULES = {"tiny": VPSchedule.scaled_linear(), "tiny-flow": FlowSchedule(3.0)}


@pytest.fixture(scope="module", params=["tiny", "tiny-flow"])
def case(request: Any, comfy_server: Any, bundled: dict[str, Path]) -> str:
    """The model's name; a LoRA with a large effect for each of two steps, in the server's folder."""
    name = request.param
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "tiny-flow" else {}
    pipe = DiffusionPipeline.from_pretrained(bundled[name], **absent)
    network = pipe.unet if name == "tiny" else pipe.transformer
    roles, draw = Roles(bind_diffusers(network)), torch.Generator().manual_seed(1)
    recipe = Recipe.for_student(
        SCHEDULES[name], 2, detect(network), ((32, 32),), files=step_names(f"two-{name}.safetensors", 2)
    )
    recipe = Recipe.from_json(recipe.to_json().replace('"renoise": true', '"renoise": false'))
    folder = comfy_server.base / "models" / "loras" / "onestep"
    folder.mkdir(parents=True, exist_ok=True)
    for file in recipe.files:
        roles.add("student", 4, 0)
        for _, b in roles.state("student").values():
            b.copy_(torch.randn(b.shape, generator=draw) * 0.2)
        save_lora(folder / file, roles.state("student"), detect(network), recipe.to_json())
    return name


def graph(name: str, nodes: dict[str, Any], sample: str = "sample") -> dict[str, Any]:
    return {
        "model": {"class_type": "OneStepLoadTinyModel", "inputs": {"name": name}},
        "text": {"class_type": "CLIPTextEncode", "inputs": {"text": PROMPT, "clip": ["model", 1]}},
        "empty": {"class_type": "EmptyLatentImage", "inputs": {"width": 32, "height": 32, "batch_size": 2}},
        "save": {"class_type": "SaveLatent", "inputs": {"samples": [sample, 0], "filename_prefix": "latents/two"}},
        **nodes,
    }


PLUGS = {"positive": ["text", 0], "negative": ["text", 0]}


def loaded(lora: str) -> dict[str, Any]:
    inputs = {"model": ["model", 0], "lora_name": lora, "recipe": "from the file"}
    return {"lora": {"class_type": "OneStepLoadLoRA", "inputs": inputs}}


def ours(lora: str) -> dict[str, Any]:
    plugs = {"model": ["lora", 0], "positive": ["text", 0], "latent_image": ["empty", 0], "recipe": ["lora", 1]}
    return loaded(lora) | {"sample": {"class_type": "OneStepSample", "inputs": {**plugs, "seed": SEED}}}


def ksampler(lora: str) -> dict[str, Any]:
    """core's KSampler on our loader's MODEL."""
    values = {"steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0, "seed": SEED}
    plugs = {"model": ["lora", 0], "latent_image": ["empty", 0], **PLUGS}
    return loaded(lora) | {"sample": {"class_type": "KSampler", "inputs": {**values, **plugs}}}


def chain(first: str, second: str) -> dict[str, Any]:
    """core's nodes alone: one KSampler (Advanced) for each step, behind that step's LoRA."""
    nodes: dict[str, Any] = {}
    for step, lora in enumerate((first, second)):
        inputs = {"lora_name": lora, "strength_model": 1.0, "model": ["model", 0]}
        nodes[f"lora {step}"] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
        values = {"steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "noise_seed": SEED}
        values |= {"start_at_step": step, "end_at_step": step + 1}
        values |= {
            "add_noise": "disable" if step else "enable",
            "return_with_leftover_noise": "disable" if step else "enable",
        }
        plugs = {"model": [f"lora {step}", 0], "latent_image": ["step 0", 0] if step else ["empty", 0], **PLUGS}
        nodes[f"step {step}"] = {"class_type": "KSamplerAdvanced", "inputs": {**values, **plugs}}
    return nodes


def latents(server: Any, built: dict[str, Any]) -> torch.Tensor:
    finished = server.run(built)
    assert finished.status == "success", finished.error
    file = finished.outputs["save"]["latents"][0]
    return load_file(server.base / "output" / file["subfolder"] / file["filename"])["latent_tensor"]


def test_every_way_draws_each_step_with_its_own(case: str, comfy_server: Any) -> None:
    """To float32's rounding; and with the first file alone another picture."""
    first, second = (f"onestep/{name}" for name in step_names(f"two-{case}.safetensors", 2))
    wanted = latents(comfy_server, graph(case, chain(first, second), "step 1"))
    alone = latents(comfy_server, graph(case, chain(first, first), "step 1"))
    spread = float(wanted.std())
    assert float((alone - wanted).abs().max()) > 1e-2 * spread
    for way in (ours, ksampler):
        found = latents(comfy_server, graph(case, way(first)))
        assert float((found - wanted).abs().max()) <= 1e-4 * spread, way.__name__


def test_the_loader_says_so(case: str, comfy_server: Any) -> None:
    first = f"onestep/two-{case}.safetensors"
    finished = comfy_server.run(graph(case, ours(first)))
    assert "Each step has a LoRA of its own" in finished.outputs["lora"]["text"][0]
    assert f"two-{case}-2.safetensors" in finished.outputs["lora"]["text"][0]


def test_a_file_that_is_missing_is_named(case: str, comfy_server: Any) -> None:
    folder = comfy_server.base / "models" / "loras" / "onestep"
    (folder / f"lost-{case}.safetensors").write_bytes((folder / f"two-{case}.safetensors").read_bytes())
    finished = comfy_server.run(graph(case, ours(f"onestep/lost-{case}.safetensors")))
    assert finished.status == "error" and f"lost-{case}-2.safetensors is not beside it" in finished.error


@pytest.mark.broad
def test_from_the_trainer_to_the_picture(comfy_server: Any) -> None:
    """Two files in the loras' folder, which the loader takes as one."""
    plugs = {"model": ["model", 0], "clip": ["model", 1], "vae": ["model", 2], "prompts": "a red dragon\na wall"}
    plan = {"preset": "Balanced", "steps": 4, "student_steps": "2", "rank": 2, "sizes": "32x32", "name": "by-step"}
    more = {"teacher_steps": 2, "guidance": 2.0, "existing": "continue"}
    told = {**small("dmd", step_loras="yes", learning_rate=1e-2), **plugs, **plan, **more}
    trained = comfy_server.run(
        {
            "model": {"class_type": "OneStepLoadTinyModel", "inputs": {"name": "tiny"}},
            "distil": {"class_type": "OneStepDistil", "inputs": told},
        }
    )
    assert trained.status == "success", trained.error
    folder = comfy_server.base / "models" / "loras" / "onestep"
    made = [load_lora(folder / name) for name in step_names("by-step.safetensors", 2)]
    assert any(not torch.equal(made[0].state[name][1], made[1].state[name][1]) for name in made[0].state)
    found = latents(comfy_server, graph("tiny", ours("onestep/by-step.safetensors")))
    assert bool(found.isfinite().all())
