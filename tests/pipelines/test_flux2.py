"""FLUX.2 in diffusers: D is the network's own answer, latents are the autoencoder's folded and normed, steps are moved
as its pipelines move them, and one file draws one picture by OneStepPipeline and by diffusers alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapted import SIZE, noisy
from diffusers import DiffusionPipeline, Flux2KleinKVPipeline, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from lora_files import random_lora
from narrowed import narrowed
from small_host import small
from tiny_pipelines import folded_vae, make, randomise

from onestep.core.cond import Cond
from onestep.core.errors import OneStepError
from onestep.core.families import FAMILIES
from onestep.core.recipe import Recipe
from onestep.core.schedule import FlowSchedule, of_size
from onestep.pipelines import diverse
from onestep.pipelines.adapt import DiffusersHost, adapt, denoiser_of
from onestep.pipelines.one_step import OneStepPipeline
from onestep.training.engine.inputs import base_note


def dev() -> Any:
    """Flux2Pipeline without its text encoder, which embeds its guidance."""
    torch.manual_seed(3)
    transformer = Flux2Transformer2DModel(
        **{"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16},
        **{"num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 4, 4, 4)},
    )
    randomise(transformer)
    randomise(vae := folded_vae())
    scheduler = make("klein").scheduler
    pipe = Flux2Pipeline(
        scheduler=scheduler, vae=vae.eval(), text_encoder=None, tokenizer=None, transformer=transformer
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
@pytest.mark.parametrize("maker", [lambda: make("klein"), dev], ids=["klein", "dev"])
def test_d_is_what_its_own_pipeline_asks_of_its_network(maker: Any) -> None:
    pipe = maker()
    host, text = DiffusersHost(pipe, denoiser_of(pipe), torch.device("cpu")), torch.randn(2, 512, 24)
    x = noisy(host, 2)
    assert host.denoiser.guidance == ("embedded" if type(pipe) is Flux2Pipeline else "cfg")
    cond = host.with_sizes(Cond(text), SIZE)
    sigma = torch.tensor([0.9, 0.2], dtype=torch.float64)
    predicted = pipe.transformer(
        **{"hidden_states": pipe._pack_latents(x), "encoder_hidden_states": text, "timestep": sigma.float()},
        **{"img_ids": pipe._prepare_latent_ids(x), "txt_ids": pipe._prepare_text_ids(text)},
        guidance=torch.tensor([4.0, 4.0]) if host.denoiser.guidance == "embedded" else None,
    ).sample
    velocity = pipe._unpack_latents_with_ids(predicted, pipe._prepare_latent_ids(x))
    expected = x - sigma.float()[:, None, None, None] * velocity
    torch.testing.assert_close(host.denoiser(x, sigma, cond), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_text_is_klein_s_512_tokens_whatever_it_says() -> None:
    pipe = make("klein")
    cond = adapt(pipe).encode(["a cat", "red dog " + 20 * "a cat "], SIZE)
    assert cond.text.shape == (2, 512, 24) and cond.mask is None
    assert torch.equal(cond.text, pipe.encode_prompt(["a cat", "red dog " + 20 * "a cat "])[0])


@torch.no_grad()
def test_latents_are_the_pipelines_own_and_decode_as_it_decodes() -> None:
    pipe = make("klein")
    host, pictures = adapt(pipe), torch.rand(2, 3, 16, 24)
    assert host.latent_shape((24, 16)) == (16, 4, 6)
    latents = host.latents_of(pictures)
    torch.testing.assert_close(latents, pipe._encode_vae_image(2 * pictures - 1, None), rtol=1e-5, atol=1e-5)
    mean = pipe.vae.bn.running_mean.view(1, -1, 1, 1)
    deviation = (pipe.vae.bn.running_var.view(1, -1, 1, 1) + pipe.vae.config.batch_norm_eps).sqrt()
    own = pipe.vae.decode(pipe._unpatchify_latents(latents * deviation + mean)).sample
    torch.testing.assert_close(host.decode(latents), (own / 2 + 0.5).clamp(0, 1), rtol=1e-5, atol=1e-5)
    with pytest.raises(OneStepError, match="multiples of 8"):
        host.latent_shape((20, 16))


@pytest.mark.parametrize("steps", [1, 4, 20, 50])
@pytest.mark.parametrize("side", [32, 64, 96])
def test_equal_steps_are_moved_by_their_number_and_the_pictures_tokens(side: int, steps: int) -> None:
    """diffusers' compute_empirical_mu, and its scheduler's shift by it."""
    found = of_size(FAMILIES["flux2"].schedule, (1, 128, side, side)).trailing(steps)
    scheduler = make("klein").scheduler
    sigmas = np.linspace(1.0, 1 / steps, steps)
    scheduler.set_timesteps(sigmas=sigmas, mu=compute_empirical_mu(side * side, steps))
    np.testing.assert_allclose(found, scheduler.timesteps, rtol=1e-6)


def test_a_scheduler_with_a_shift_of_its_own_keeps_it() -> None:
    assert adapt(make("klein", use_dynamic_shifting=False)).denoiser.schedule == FlowSchedule(3.0)
    assert adapt(make("klein")).denoiser.schedule == FAMILIES["flux2"].schedule


@pytest.mark.parametrize("guidance", narrowed([1.0, 3.0], 3.0))
def test_one_file_draws_one_picture_with_and_without_guidance(guidance: float, tmp_path: Path) -> None:
    times = torch.tensor([1000.0, 900.0, 750.0], dtype=torch.float64)
    recipe = Recipe.at(FlowSchedule(3.0), times, family="flux2", guidance=guidance, sizes=(SIZE,))
    path = random_lora(make("klein"), tmp_path / "a.safetensors", recipe, size=0.1)
    fast, plain = OneStepPipeline.from_pipe(make("klein")), make("klein")
    fast.load_one_step_lora(path)
    ours = fast("a cat", seed=3, output_type="np").images
    plain.load_lora_weights(str(tmp_path), weight_name=path.name)
    call = fast.diffusers_settings().apply(plain)
    draw = torch.Generator().manual_seed(3)
    theirs = plain(prompt="a cat", generator=draw, output_type="np", **call).images
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * float(np.abs(theirs).max()))
    without = make("klein")(prompt="a cat", generator=torch.Generator().manual_seed(3), output_type="np", **call).images
    assert np.abs(ours - without).max() > 0.01


def test_fresh_noise_between_steps_is_in_the_schedulers_order(tmp_path: Path) -> None:
    """FlowMatchEulerDiscreteScheduler draws a row of tokens, from torch's own generator."""
    times = torch.tensor([1000.0, 700.0], dtype=torch.float64)
    recipe = replace(Recipe.at(FlowSchedule(3.0), times, family="flux2", sizes=(SIZE,)), renoise=True)
    fast, plain = OneStepPipeline.from_pipe(make("klein")), make("klein")
    call = fast.diffusers_settings(recipe).apply(plain)
    torch.manual_seed(5)
    ours = fast("a cat", recipe=recipe, output_type="np").images
    torch.manual_seed(5)
    theirs = plain(prompt="a cat", output_type="np", **call).images
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * float(np.abs(theirs).max()))


@torch.no_grad()
def test_dev_is_told_its_guidance_by_both() -> None:
    """2.5 as it is given, and its pipeline's own 4 where nothing is."""
    times = torch.tensor([1000.0, 750.0], dtype=torch.float64)
    recipe = Recipe.at(FlowSchedule(3.0), times, family="flux2", sizes=(SIZE,))
    text, pictures = torch.randn(1, 512, 24), {}
    for guidance in (2.5, None):
        fast, plain = OneStepPipeline.from_pipe(dev(), embedded_guidance=guidance), dev()
        ours = fast(recipe=recipe, prompt_embeds=text, seed=3, output_type="np").images
        call = fast.diffusers_settings(recipe).apply(plain)
        assert call["guidance_scale"] == (guidance or 4.0)
        draw = torch.Generator().manual_seed(3)
        theirs = plain(prompt_embeds=text, generator=draw, output_type="np", **call).images
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * float(np.abs(theirs).max()))
        pictures[guidance] = ours
    assert np.abs(pictures[2.5] - pictures[None]).max() > 1e-3


@torch.no_grad()
def test_the_bases_first_part_goes_by_its_own_steps_at_the_pictures_size() -> None:
    """By the klein pipeline itself: its own levels of 16 tokens down to the hand-over, then the few-step rest."""
    recipe = Recipe.at(FlowSchedule(3.0), torch.tensor([1000.0, 900, 750, 500]), family="flux2", sizes=(SIZE,))
    noise = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(3))
    fast = OneStepPipeline.from_pipe(make("klein"))
    own = fast.plain()
    ours = diverse(
        *(fast, "a cat"),
        **{"recipe": recipe, "base": make("klein"), "base_steps": 4, "guidance": 4.0, "num_images_per_prompt": 2},
        **{"generator": torch.Generator().manual_seed(3), "output_type": "latent"},
    ).images
    moved = np.exp(compute_empirical_mu(16, 4))
    levels = moved / (moved + 1 / np.array([1, 0.75, 0.5, 0.25]) - 1)
    levels = [*levels[: int(np.abs(levels - 0.9).argmin())], 0.9]
    own.scheduler = type(own.scheduler)(shift=1.0)
    seen: list[Any] = []
    keep: Any = lambda pipe, step, time, kept: seen.append(kept["latents"].clone()) or kept  # noqa: E731
    told = {"prompt": ["a cat"] * 2, "output_type": "latent", "width": SIZE[0], "height": SIZE[1]}
    own(**told, latents=noise, sigmas=levels, num_inference_steps=len(levels), callback_on_step_end=keep)
    x = seen[len(levels) - 2].transpose(1, 2).reshape(noise.shape)
    rest = {"sigmas": [0.9, 0.75, 0.5], "num_inference_steps": 3, "guidance_scale": 1.0}
    own(**told, **rest, latents=x, callback_on_step_end=keep)
    theirs = seen[-1].transpose(1, 2).reshape(noise.shape)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.std()))


def test_a_distilled_klein_is_known_by_its_folder_and_what_to_do_is_said(tmp_path: Path) -> None:
    make("klein", distilled=True).save_pretrained(tmp_path / "mine")
    host = adapt(DiffusionPipeline.from_pretrained(tmp_path / "mine"))
    said = base_note(host, small(guidance=4.0))
    assert said.startswith("mine draws in few steps already (distilled, by is_distilled in its model_index.json)")
    assert said.endswith("set guidance=1")


def test_a_model_that_edits_is_refused_by_name() -> None:
    pipe = Flux2KleinKVPipeline(**make("klein").components)
    with pytest.raises(OneStepError, match=r"FLUX.2 klein KV \(editing\) models cannot be adapted yet: use SD1.5"):
        adapt(pipe)
