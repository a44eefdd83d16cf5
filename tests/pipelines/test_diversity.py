"""The base's first part and the few-step rest in diffusers, against the loops of diffusers' own schedulers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from lora_files import random_lora
from narrowed import narrowed
from tiny_pipelines import make, vae
from torch import Tensor

from onestep.core.errors import OneStepError
from onestep.core.recipe import PRESETS, Recipe
from onestep.pipelines import diverse
from onestep.pipelines.one_step import OneStepPipeline

PROMPT, SEED, SIZE = "a cat", 3, {"width": 16, "height": 16}
ZERO = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


def noise() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(SEED))


def base_state(pipe: Any, steps: int, taken: int, guidance: float) -> Tensor:
    """diffusers' own pipeline, its latents after ``taken`` of ``steps``."""
    seen: list[Tensor] = []
    more: dict[str, Any] = {"sigmas": np.linspace(1, 1 / steps, steps)} if hasattr(pipe, "transformer") else {}
    if type(pipe).__name__.startswith("ZImage"):
        guidance -= 1  # which it counts from 0
    elif more:
        more["max_sequence_length"] = 0
    pipe(
        **{"prompt": [PROMPT] * 2, "num_inference_steps": steps, "guidance_scale": guidance, "latents": noise()},
        callback_on_step_end=lambda pipe, step, time, kept: seen.append(kept["latents"].clone()) or kept,
        **{"output_type": "latent", "negative_prompt": [""] * 2, **SIZE, **more},
    )
    return seen[taken - 1]


@torch.no_grad()
def rest_of_unet(pipe: Any, x: Tensor) -> Tensor:
    """DDIM from its second of four steps on, without guidance."""
    text = pipe.encode_prompt([PROMPT] * 2, "cpu", 1, False)[0]
    pipe.scheduler.set_timesteps(4)
    for time in pipe.scheduler.timesteps[1:]:
        x = pipe.scheduler.step(pipe.unet(x, time, text).sample, time, x).prev_sample
    return x


def rest_of_flow(pipe: Any, x: Tensor) -> Tensor:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    told: dict[str, Any] = {"sigmas": [0.9, 0.75, 0.5], "guidance_scale": 0.0, "output_type": "latent"}
    told |= {} if type(pipe).__name__.startswith("ZImage") else {"max_sequence_length": 0}
    return pipe([PROMPT] * 2, latents=x, num_inference_steps=3, **told, **SIZE).images


QUARTERS = Recipe((1000.0, 900.0, 750.0, 500.0), family="sd3", shift=3.0)
RECIPES = PRESETS | {"quarters": QUARTERS, "z quarters": replace(QUARTERS, family="z_image")}
CASES = [
    ("sd", {"set_alpha_to_one": True}, 20, 5, "sdxl-lightning-4"),
    ("sd", {"set_alpha_to_one": True}, 4, 1, "sdxl-lightning-4"),
    ("sd", {"set_alpha_to_one": True, **ZERO}, 8, 2, "sdxl-lightning-4"),
    ("sd3", {}, 8, 2, "quarters"),
    ("z_image", {}, 8, 2, "z quarters"),
]


BOTH = [(*case, styled) for case in CASES for styled in (False, True)]


@pytest.mark.parametrize(
    ("name", "scheduler", "steps", "taken", "preset", "styled"),
    narrowed(BOTH, BOTH[2], BOTH[5], BOTH[9]),
)
def test_the_base_draws_without_the_one_step_lora_and_the_rest_with_it(
    name: str, scheduler: Any, steps: int, taken: int, preset: str, styled: bool, tmp_path: Path
) -> None:
    """A style's LoRA is on in both parts."""
    file = random_lora(make(name), tmp_path / "x.safetensors", RECIPES[preset])
    style = random_lora(make(name), tmp_path / "style.safetensors", None, 0.1, seed=2)
    fast = OneStepPipeline.from_pipe(make(name, **scheduler))
    fast.load_one_step_lora(file)
    pipe = make(name, **scheduler)
    if styled:
        fast.plain().load_lora_weights(style, adapter_name="style")
        pipe.load_lora_weights(style, adapter_name="style")
        both = ["onestep", "style"]
        fast.plain().set_adapters(both)
    call: dict[str, Any] = {"base_steps": steps, "guidance": 3.0, "output_type": "latent", "seed": SEED, **SIZE}
    found = diverse(fast, PROMPT, num_images_per_prompt=2, **call).images

    x = base_state(pipe, steps, taken, 3.0)
    pipe.load_lora_weights(file, adapter_name="onestep")
    if styled:
        pipe.set_adapters(both)
    wanted = rest_of_unet(pipe, x) if name == "sd" else rest_of_flow(pipe, x)
    scale = float(wanted.std())
    assert float((found - wanted).abs().max()) < 2e-4 * scale
    again = diverse(fast, PROMPT, num_images_per_prompt=2, **call).images
    assert torch.equal(found, again), "the LoRA is on again afterwards, at its scale"


def test_a_base_of_its_own_begins_where_the_few_step_model_is_a_checkpoint() -> None:
    many, few = make("sd"), OneStepPipeline.from_pipe(make("sd", set_alpha_to_one=True))
    torch.manual_seed(5)
    for parameter in few.unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    call = {"recipe": "sdxl-lightning-4", "base_steps": 8, "guidance": 2.0, "output_type": "latent", "seed": SEED}
    found = diverse(few, PROMPT, base=many, num_images_per_prompt=2, **call, **SIZE).images
    wanted = rest_of_unet(few.plain(), base_state(many, 8, 2, 2.0))
    assert float((found - wanted).abs().max()) < 2e-4 * float(wanted.std())


def test_what_cannot_be_split_is_refused_with_a_word(tmp_path: Path) -> None:
    pipe = make("sd")
    fast, recipe = OneStepPipeline.from_pipe(pipe), {"recipe": "dmd2-4"}
    with pytest.raises(OneStepError, match="no LoRA 'onestep' that can be taken off"):
        diverse(fast, PROMPT, **recipe)
    with pytest.raises(OneStepError, match="share one network"):
        diverse(fast, PROMPT, base=pipe, **recipe)
    for steps in (0, 1001, 2.5, True):
        with pytest.raises(OneStepError, match="base_steps is"):
            diverse(fast, PROMPT, base_steps=steps, **recipe)
    other = make("sd")
    other.vae = vae(scaling_factor=0.5)
    with pytest.raises(OneStepError, match="one autoencoder"):
        diverse(fast, PROMPT, base=other, **recipe)
    with pytest.raises(OneStepError, match="leaves nothing to the base"):
        diverse(fast, PROMPT, base=make("sd"), recipe="sd-turbo-1")
    fast.load_one_step_lora(random_lora(make("sd"), tmp_path / "x.safetensors", PRESETS["dmd2-4"]))
    fast.plain().fuse_lora()
    with pytest.raises(OneStepError, match="do not fuse it"):
        diverse(fast, PROMPT)


def test_flux_is_told_the_bases_guidance(tmp_path: Path) -> None:
    """Flux-dev's base has no classifier-free guidance: the scale is what it is told."""
    fast = OneStepPipeline.from_pipe(make("flux"))
    fast.load_one_step_lora(random_lora(make("flux"), tmp_path / "x.safetensors", PRESETS["flux-schnell-4"]))
    call = {"base_steps": 4, "output_type": "latent", "seed": SEED, **SIZE}
    usual, same, other = (diverse(fast, PROMPT, guidance=scale, **call).images for scale in (None, 3.5, 6.0))
    assert torch.equal(usual, same) and float((other - usual).abs().max()) > 1e-3 * float(usual.std())
