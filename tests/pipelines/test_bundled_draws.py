"""The bundled models and a LoRA: our sampler and diffusers alone draw the same, to 1e-5 of the latents' std."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from narrowed import narrowed

from onestep.cli.model import at_native_size
from onestep.core.families import FAMILIES
from onestep.core.lora_file import save_lora
from onestep.core.recipe import Recipe
from onestep.core.sampling import teacher_sample
from onestep.pipelines.adapt import adapt
from onestep.pipelines.bundled import MODELS, path_of
from onestep.pipelines.load import load
from onestep.pipelines.one_step import OneStepPipeline
from onestep.training.methods import settings_for

PROMPTS = ["monster: orc, green", "wall: brick brown"]
TINY = Path(__file__).resolve().parents[2] / "pipelines" / "tiny"
NAMES = [name for name in MODELS if (TINY / name).is_dir()]


@pytest.mark.parametrize("name", narrowed(NAMES, "tiny", "tiny-dit"))
@pytest.mark.parametrize("steps", narrowed([1, 4], 1))
def test_one_file_one_picture(name: str, steps: int, tmp_path: Path) -> None:
    host = adapt(load(name))
    host.denoiser.roles.add("student", 8, 0)
    for parameter in host.denoiser.roles.parameters("student"):
        torch.nn.init.normal_(parameter, std=0.05)
    recipe = Recipe.for_student(host.denoiser.schedule, steps, host.family, ((32, 32),))
    save_lora(tmp_path / "x.safetensors", host.denoiser.roles.state("student"), host.family, recipe.to_json())
    assert host.check_file(tmp_path / "x.safetensors").endswith("difference 0")

    ours = OneStepPipeline.from_pipe(load(name))
    base = ours(PROMPTS, recipe=recipe, seed=1, output_type="latent").images
    ours.load_one_step_lora(tmp_path / "x.safetensors")
    drawn = ours(PROMPTS, seed=1, output_type="latent").images

    pipe = load(name)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    arguments = ours.diffusers_settings().apply(pipe)
    torch.manual_seed(1)
    plain = pipe(PROMPTS, output_type="latent", **arguments).images
    error, effect = (float((drawn - other).abs().max() / plain.std()) for other in (plain, base))
    assert error <= 1e-5 and effect >= 100 * 1e-5, (error, effect)


@pytest.mark.parametrize("name", narrowed(NAMES, "tiny", "tiny-dit"))
@torch.no_grad()
def test_our_teacher_is_the_plain_pipeline(name: str) -> None:
    """25 guided steps by the pipeline's own scheduler, as the models are measured."""
    pipe = load(name)
    pipe.set_progress_bar_config(disable=True)
    host = adapt(pipe)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, *host.latent_shape((32, 32)), generator=generator)
    cond, null = host.encode(PROMPTS, (32, 32)), host.encode([""], (32, 32)).repeat(2)
    ours = teacher_sample(host.denoiser, cond, null, noise, 25, 3.0)
    more = {"latents": noise, "width": 32, "height": 32, "output_type": "latent"}
    if host.family != "unet":
        # equal shares of its time, where diffusers' own steps would end above zero
        more["sigmas"] = [left / 25 for left in range(25, 0, -1)]
    if host.family == "sd3":
        more["max_sequence_length"] = 0
    # diffusers' Z-Image counts from 0, which is no guidance
    scale = 3.0 - 1.0 + FAMILIES[host.family].unguided
    plain = pipe(PROMPTS, num_inference_steps=25, guidance_scale=scale, **more).images
    assert float((ours - plain).abs().max() / plain.std()) <= 1e-4


def test_a_bundled_model_is_found_by_name() -> None:
    for name in NAMES:
        assert path_of(name) == TINY / name


@pytest.mark.parametrize("name", NAMES)
def test_a_bundled_model_draws_at_its_own_size(name: str) -> None:
    """Also one whose network does not say its size, which is its autoencoder's: in Python, and where a command asks."""
    host = adapt(load(name, device="cpu"), device="cpu")
    assert host.native_size == (32, 32)
    assert at_native_size(settings_for(), set(), host).sizes == "32x32"
