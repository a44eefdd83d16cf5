"""OneStepPipeline with a LoRA for each step: what the run's own roles draw, and everything back in its place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import random_lora
from narrowed import narrowed
from tiny_pipelines import make

from onestep.core.errors import OneStepError
from onestep.core.lora_file import load_lora, save_lora
from onestep.core.recipe import Recipe, step_names
from onestep.core.sampling import sample
from onestep.core.step_roles import part_of
from onestep.pipelines.adapt import adapt
from onestep.pipelines.one_step import OneStepPipeline

PROMPTS = ["a cat", "red dog"]
CALL: dict[str, Any] = {"width": 16, "height": 16, "output_type": "latent"}
RECIPES = {
    "sd": Recipe((999.0, 499.0)),
    "sdxl": Recipe((999.0, 666.0, 333.0)),
    "sd3": Recipe((1000.0, 500.0), family="sd3"),
    "flux": Recipe((1000.0, 500.0), family="flux"),
}


def files(name: str, folder: Path) -> tuple[Path, Recipe]:
    """A file for each step, of different factors, under the names that a run gives."""
    recipe = replace(RECIPES[name], lora_scale=0.5)
    recipe = replace(recipe, files=step_names("made.safetensors", recipe.steps))
    for step, file in enumerate(recipe.files):
        drawn = load_lora(random_lora(make(name), folder / "drawn.safetensors", None))
        state = {layer: (a, (step + 1) * b.roll(step, 0)) for layer, (a, b) in drawn.state.items()}
        save_lora(folder / file, state, drawn.family, recipe.to_json())
    return folder / recipe.files[0], recipe


def by_roles(name: str, first: Path, recipe: Recipe, noise: torch.Tensor) -> torch.Tensor:
    """The same by the roles that a run trains."""
    host = adapt(make(name))
    roles = host.denoiser.roles
    for step, file in enumerate(recipe.files):
        state = {layer: (a, recipe.lora_scale * b) for layer, (a, b) in load_lora(first.with_name(file)).state.items()}
        roles.load(part_of("student", step), state)
    roles.steps.split("student", recipe.timesteps)
    cond = host.encode(PROMPTS, (16, 16))
    with torch.no_grad(), roles.installed(), roles.use("student"):
        return sample(host.denoiser, recipe, cond, noise, lambda step: noise)


@pytest.mark.parametrize("name", narrowed(RECIPES, "sd", "flux"))
def test_each_step_is_drawn_with_its_own_file(name: str, tmp_path: Path) -> None:
    first, recipe = files(name, tmp_path)
    pipe = OneStepPipeline.from_pipe(make(name))
    before = pipe(PROMPTS, recipe=RECIPES[name], seed=1, **CALL).images
    assert pipe.load_one_step_lora(first) == recipe
    shape = (2, *pipe.host(recipe).latent_shape((16, 16)))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = pipe(PROMPTS, latents=noise, **CALL).images
    wanted = by_roles(name, first, recipe, noise)
    assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.std())
    # one file alone would draw another picture
    one = OneStepPipeline.from_pipe(make(name))
    one.load_one_step_lora(first, replace(recipe, files=()))
    alone = one(PROMPTS, latents=noise, **CALL).images
    assert float((alone - wanted).abs().max()) > 1e-2 * float(wanted.std())
    # a second call is the first; and without LoRAs the base is itself
    again = pipe(PROMPTS, latents=noise, **CALL).images
    assert torch.equal(again, found)
    pipe.unload_lora_weights()
    torch.testing.assert_close(pipe(PROMPTS, recipe=RECIPES[name], seed=1, **CALL).images, before)


@pytest.mark.broad
def test_another_lora_takes_all_of_them_off(tmp_path: Path) -> None:
    first, _ = files("sd", tmp_path)
    other = random_lora(make("sd"), tmp_path / "other.safetensors", None)
    pipe, plain = (OneStepPipeline.from_pipe(make("sd")) for _ in range(2))
    pipe.load_one_step_lora(first)
    for one in (pipe, plain):
        one.load_one_step_lora(other, RECIPES["sd"])
    drawn = [one(PROMPTS, seed=2, **CALL).images for one in (pipe, plain)]
    assert torch.equal(*drawn)
    names = {name for module in pipe.unet.modules() for name in getattr(module, "lora_A", {})}
    assert names == {"onestep"}


def test_a_step_that_fails_leaves_the_first_ones_lora_acting(tmp_path: Path) -> None:
    first, _ = files("sd", tmp_path)
    pipe = OneStepPipeline.from_pipe(make("sd"))
    pipe.load_one_step_lora(first)

    def fail(*told: Any) -> Any:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        pipe(PROMPTS, callback_on_step_end=fail, **CALL)
    acting = {tuple(module.active_adapters) for module in pipe.unet.modules() if hasattr(module, "lora_A")}
    assert acting == {("onestep",)}


def test_what_one_lora_alone_can_do_is_refused(tmp_path: Path) -> None:
    first, recipe = files("sd", tmp_path)
    pipe = OneStepPipeline.from_pipe(make("sd"))
    pipe.load_one_step_lora(first)
    with pytest.raises(OneStepError, match="drawing at the card's limit with a LoRA for each of 2 steps"):
        pipe.fast()
    with pytest.raises(OneStepError, match="saving a pipeline"):
        pipe.save_pretrained(tmp_path / "saved")
    with pytest.raises(OneStepError, match="drawing in diffusers alone"):
        pipe.diffusers_settings()
    (tmp_path / recipe.files[1]).unlink()
    with pytest.raises(OneStepError, match="made-2.safetensors is not beside it"):
        pipe.load_one_step_lora(first)
