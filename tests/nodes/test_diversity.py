"""Diversity Sigmas in a real ComfyUI: levels in NumPy, and the pictures that diffusers draws from the same noise."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from lora_files import random_lora
from safetensors.torch import load_file

from onestep.core.recipe import Recipe
from onestep.core.schedule import FlowSchedule, VPSchedule
from onestep.pipelines import diverse
from onestep.pipelines.one_step import OneStepPipeline

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]
SEED, PROMPT = 7, "a red dragon"
Array = np.ndarray[Any, np.dtype[np.float64]]


# -- the levels -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(run_inside: Callable[..., str]) -> Any:
    return json.loads(run_inside("diversity").strip().splitlines()[-1])


def noise_levels(zero_terminal: bool = False) -> Array:
    """sigma / alpha at the 1000 times of Stable Diffusion; zero-terminal as arXiv:2305.08891, Algorithm 1."""
    root = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2) ** 0.5
    if zero_terminal:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        root[-1] = 4.8973451890853435e-08**0.5  # ComfyUI's own floor
    return np.sqrt(1 / root**2 - 1)


def flow_level(time: float) -> float:
    """sigma at a share of SD3's time, shift 3 (arXiv:2403.03206, Eq. 23)."""
    return 3 * time / (1 + 2 * time)


VP, ZERO = noise_levels(), noise_levels(zero_terminal=True)


@pytest.mark.parametrize(
    ("name", "base", "distilled"),
    [
        ("one model", VP[[999, 949, 899, 849, 799, 749]], [*VP[[749, 499, 249]], 0]),
        ("off the base's levels", VP[[999, 874, 799]], [VP[799], 0]),
        ("flow", [1.0, flow_level(7 / 8), 0.9], [0.9, 0.75, 0.5, 0]),
        ("a share", [*map(flow_level, (1, 7 / 8, 6 / 8, 5 / 8)), 0.75], [0.75, 0.5, 0]),
        ("one step", VP[[999, 749]], [*VP[[749, 499, 249]], 0]),
        # of one log-SNR: sigma / alpha is s / (1 - s) of a flow's s
        ("noise, then flow", [*VP[[999, 899, 799]], 3.0], [0.75, 0.5, 0]),
        ("zero-terminal, then noise", [ZERO[999], VP[759]], [*VP[[759, 499, 259]], 0]),
    ],
)
def test_the_levels_of_both(told: Any, name: str, base: Any, distilled: Any) -> None:
    found = told[name]
    np.testing.assert_allclose(found[0], base, rtol=2e-5)
    np.testing.assert_allclose(found[1], distilled, rtol=2e-5)


def test_a_flow_hands_over_to_a_noise_predicting_model_at_one_log_snr(told: Any) -> None:
    (*steps, last), (first, *_) = told["flow, then noise"]
    assert last / (1 - last) == pytest.approx(first, rel=2e-5) and first == pytest.approx(VP[599], rel=2e-5)
    np.testing.assert_allclose(steps, [flow_level(1 - at / 10) for at in range(len(steps))], rtol=2e-5)
    assert len(steps) > 1 and steps[-1] > last > flow_level(0.9 - len(steps) / 10)


def test_any_scheduler_ends_at_the_hand_over(told: Any) -> None:
    base, distilled = told["karras"]
    rho = np.linspace(VP[999] ** (1 / 7), VP[0] ** (1 / 7), 10) ** 7  # arXiv:2206.00364, Eq. 5
    np.testing.assert_allclose(base[:-1], rho[: len(base) - 1], rtol=1e-4)
    assert base[-1] == pytest.approx(distilled[0], rel=1e-6) and base[-2] > base[-1]


@pytest.mark.parametrize(
    ("name", "words"),
    [("nothing left", "set hand_over"), ("above the base", "set hand_over lower"), ("no share", "hand_over is nan")],
)
def test_what_cannot_be_split_is_refused_with_a_word(told: Any, name: str, words: str) -> None:
    assert words in told[name] and len(told[name]) < 400


# -- the pictures -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tiny", "tiny-flow"])
def case(request: Any, comfy_server: Any, bundled: dict[str, Path]) -> Any:
    """(model's name, its pipeline with a four-step LoRA and a style, the folder of both files)."""
    name = request.param
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "tiny-flow" else {}
    made = [DiffusionPipeline.from_pretrained(bundled[name], **absent) for _ in range(2)]
    schedule = VPSchedule.scaled_linear() if name == "tiny" else FlowSchedule(3.0)
    family = "unet" if name == "tiny" else "sd3"
    recipe = replace(Recipe.for_student(schedule, 4, family, ((32, 32),)), renoise=False)
    folder = comfy_server.base / "models" / "loras" / "onestep"
    folder.mkdir(parents=True, exist_ok=True)
    few, style = folder / f"four-{name}.safetensors", folder / f"style-{name}.safetensors"
    random_lora(made[0], few, recipe, 0.1)
    random_lora(made[0], style, None, 0.1, seed=2)
    fast = OneStepPipeline.from_pipe(made[1])
    fast.load_one_step_lora(few)
    return name, fast, few, style


def nodes(name: str, few: str, base: Any) -> dict[str, Any]:
    """base: the base's MODEL, which the few-step LoRA is merged into."""
    noisy = {"add_noise": True, "noise_seed": SEED, "cfg": 3.0, "positive": ["text", 0], "negative": ["empty text", 0]}
    loaded = {"model": base, "lora_name": few, "recipe": "from the file"}
    split = {"base": base, "distilled": ["few", 0], "recipe": ["few", 1], "base_steps": 8, "scheduler": "simple"}
    first = {**noisy, "model": base, "sampler": ["euler", 0], "sigmas": ["split", 0], "latent_image": ["size", 0]}
    second = {**noisy, "add_noise": False, "cfg": 1.0, "model": ["few", 0], "sampler": ["ours", 0]}
    return {
        "model": {"class_type": "OneStepLoadTinyModel", "inputs": {"name": name}},
        "text": {"class_type": "CLIPTextEncode", "inputs": {"text": PROMPT, "clip": ["model", 1]}},
        "empty text": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["model", 1]}},
        "size": {"class_type": "EmptyLatentImage", "inputs": {"width": 32, "height": 32, "batch_size": 2}},
        "few": {"class_type": "OneStepLoadLoRA", "inputs": loaded},
        "split": {"class_type": "OneStepDiversitySigmas", "inputs": {**split, "hand_over": 0.0}},
        "euler": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "ours": {"class_type": "OneStepSampler", "inputs": {"recipe": ["few", 1]}},
        "first": {"class_type": "SamplerCustom", "inputs": first},
        "second": {
            "class_type": "SamplerCustom",
            "inputs": {**second, "sigmas": ["split", 1], "latent_image": ["first", 0]},
        },
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["second", 0], "filename_prefix": "latents/div"}},
    }


def latents(server: Any, pipe: Any, graph: dict[str, Any]) -> torch.Tensor:
    finished = server.run(graph)
    assert finished.status == "success", finished.error
    entry = finished.outputs["save"]["latents"][0]
    saved = load_file(server.base / "output" / entry["subfolder"] / entry["filename"])["latent_tensor"]
    return (saved - (pipe.vae.config.shift_factor or 0)) * pipe.vae.config.scaling_factor


def test_both_hosts_draw_the_same(case: Any, comfy_server: Any) -> None:
    name, fast, few, _ = case
    found = latents(comfy_server, fast, nodes(name, f"onestep/{few.name}", ["model", 0]))
    call: dict[str, Any] = {"base_steps": 8, "guidance": 3.0, "seed": SEED, "num_images_per_prompt": 2}
    wanted = diverse(fast, PROMPT, **call, output_type="latent").images
    alone = fast(PROMPT, seed=SEED, num_images_per_prompt=2, output_type="latent").images
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.std())
    assert float((found - alone).abs().max()) > 0.1 * float(wanted.std()), "the base has drawn"


def test_a_style_of_the_base_stacks_with_the_few_step_lora(case: Any, comfy_server: Any) -> None:
    """Core's LoraLoader before Load One-Step LoRA; in diffusers two adapters."""
    name, fast, few, style = case
    graph = nodes(name, f"onestep/{few.name}", ["style", 0])
    told = {"model": ["model", 0], "lora_name": f"onestep/{style.name}", "strength_model": 0.8}
    found = latents(comfy_server, fast, graph | {"style": {"class_type": "LoraLoaderModelOnly", "inputs": told}})
    plain = fast.plain()
    plain.load_lora_weights(style, adapter_name="style")
    plain.set_adapters(["onestep", "style"], [1.0, 0.8])
    call: dict[str, Any] = {"base_steps": 8, "guidance": 3.0, "seed": SEED, "num_images_per_prompt": 2}
    wanted = diverse(fast, PROMPT, **call, output_type="latent").images
    plain.set_adapters(["onestep"])
    unstyled = diverse(fast, PROMPT, **call, output_type="latent").images
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.std())
    assert float((wanted - unstyled).abs().max()) > 0.1 * float(wanted.std())
