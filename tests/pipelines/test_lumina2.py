"""Lumina 2 in diffusers: D is the network's own answer, texts of any lengths share a batch, guidance is its pipeline's,
and one file draws one picture by OneStepPipeline and by diffusers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapted import noisy
from lora_files import random_lora
from narrowed import narrowed
from tiny_pipelines import make

from onestep.core.cond import Cond
from onestep.core.denoiser import guided
from onestep.core.errors import OneStepError
from onestep.core.lora_second import second_file
from onestep.core.recipe import Recipe
from onestep.core.schedule import FlowSchedule
from onestep.pipelines.adapt import adapt, denoiser_of
from onestep.pipelines.distill import distill
from onestep.pipelines.encode import encode_text
from onestep.pipelines.one_step import OneStepPipeline

PROMPTS = ["a cat", "red dog " + 4 * "a cat ", "a", "dog a cat"]
SIZE = (64, 64)
SIGMAS = torch.tensor([0.9, 0.2, 0.5, 1.0], dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("adapted", [True, False])
def test_texts_of_any_lengths_share_a_batch_and_are_the_pipelines_own(adapted: bool) -> None:
    """By hand as Lumina2Pipeline asks its network. Without adapters it is one call under a mask, with them one for each
    length."""
    pipe = make("lumina2")
    host = adapt(pipe)
    denoise = host.denoiser if adapted else denoiser_of(pipe)
    cond, x, calls = host.encode(PROMPTS, SIZE), noisy(host, 4), []
    assert cond.mask is not None and denoise.guidance == "cfg" and len(set(cond.mask.sum(1).tolist())) == 4
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    found = denoise(x, SIGMAS, cond)
    assert len(calls) == (4 if adapted else 1)
    text, mask, *_ = pipe.encode_prompt(list(PROMPTS), False)
    for row in range(4):
        one = text[row : row + 1], mask[row : row + 1]
        minus = pipe.transformer(x[row : row + 1], 1 - SIGMAS[row : row + 1].float(), *one).sample[0]
        expected = x[row] + SIGMAS[row].float() * minus
        assert float((found[row] - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@torch.no_grad()
def test_guidance_brings_each_row_of_a_channel_to_the_prompts_norm() -> None:
    """By hand as Lumina2Pipeline (cfg_normalization, its default), whose negative is read without the system prompt."""
    pipe = make("lumina2")
    host = adapt(pipe)
    cond, null = host.encode(["a cat"], SIZE), host.encode(["red"], SIZE, negative=True)
    x, sigma = noisy(host, 1), SIGMAS[:1]
    found = guided(host.denoiser, x, sigma, cond, null, 4.0)
    text, mask, negative, hidden = pipe.encode_prompt(["a cat"], negative_prompt=["red"])
    v_c, v_u = (-pipe.transformer(x, 1 - sigma.float(), *told).sample for told in ((text, mask), (negative, hidden)))
    v = v_u + 4.0 * (v_c - v_u)
    v = v * np.linalg.norm(v_c, axis=-1, keepdims=True) / np.linalg.norm(v, axis=-1, keepdims=True)
    expected = x - float(sigma) * v
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    host.denoiser.token_norm = 0
    assert float((guided(host.denoiser, x, sigma, cond, null, 4.0) - expected).abs().max()) > 0.1


@pytest.mark.parametrize("guidance", narrowed([1.0, 3.0], 3.0))
def test_one_file_draws_one_picture_with_and_without_guidance(guidance: float, tmp_path: Path) -> None:
    times = FlowSchedule(6.0).trailing(3)
    recipe = Recipe.at(FlowSchedule(6.0), times, family="lumina2", guidance=guidance, sizes=(SIZE,))
    path = random_lora(make("lumina2"), tmp_path / "a.safetensors", recipe, size=0.1)
    fast, plain = OneStepPipeline.from_pipe(make("lumina2")), make("lumina2")
    fast.load_one_step_lora(path)
    ours = fast("a cat", negative_prompt="red", seed=3, output_type="np").images
    plain.load_lora_weights(str(tmp_path), weight_name=path.name)
    call = fast.diffusers_settings().apply(plain)
    draw = torch.Generator().manual_seed(3)
    theirs = plain("a cat", negative_prompt="red", generator=draw, output_type="np", **call).images
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * float(np.abs(theirs).max()))
    without = make("lumina2")("a cat", generator=torch.Generator().manual_seed(3), output_type="np", **call).images
    assert np.abs(ours - without).max() > 0.01


@pytest.mark.parametrize("loader", ["comfyui", "diffusers"])
def test_either_file_of_two_draws_the_same(loader: Any, tmp_path: Path) -> None:
    recipe = Recipe((1000.0,), family="lumina2", shift=6.0, sizes=(SIZE,))
    drawn = []
    for each in (loader, "diffusers"):
        fast = OneStepPipeline.from_pipe(make("lumina2"))
        fast.load_one_step_lora(random_lora(make("lumina2"), tmp_path / f"{each}.safetensors", recipe, loader=each))
        drawn.append(fast("a cat", seed=3, output_type="latent").images)
    assert torch.equal(*drawn)


def test_a_run_leaves_two_files_and_says_which_is_whose(tmp_path: Path) -> None:
    settings = {"pairs": 2, "batch": 2, "steps": 1, "rank": 2, "sizes": "64x64", "teacher_steps": 2}
    made = distill(make("lumina2"), PROMPTS[:2], "regression", out=tmp_path, **settings, watch_every=0, preview_every=0)
    second = second_file(made.path, "lumina2", "diffusers")
    assert second is not None and second.is_file() and second.name == "result_comfyui.safetensors"
    assert "diffusers 0" in made.check and "result_comfyui.safetensors is the same 37 layers for ComfyUI, which is" in (
        made.check
    )
    with pytest.raises(OneStepError, match="result_comfyui"):
        adapt(make("lumina2")).check_file(second)


def test_embeddings_of_several_lengths_draw_what_their_prompts_do() -> None:
    fast = OneStepPipeline.from_pipe(make("lumina2"))
    told: dict[str, Any] = {"recipe": Recipe((1000.0, 857.0), family="lumina2", guidance=3.0, sizes=(SIZE,))}
    told |= {"seed": 3, "output_type": "latent"}
    drawn = fast(PROMPTS, negative_prompt="red", **told).images
    texts, negatives, *pooled = fast.encode_prompt(PROMPTS, "red")
    assert len({len(text) for text in texts}) == 4 and pooled == [None, None] and len(negatives[0]) == 4
    assert torch.equal(fast(prompt_embeds=texts, negative_prompt_embeds=negatives, **told).images, drawn)


def test_a_system_prompt_of_ones_own_is_not_put_behind_the_usual_one() -> None:
    """As Lumina2Pipeline's system_prompt; a pipeline with another usual one keeps it."""
    pipe = make("lumina2")
    own = encode_text(pipe, ["Draw. <Prompt Start> a cat"])
    text, mask, *_ = pipe.encode_prompt(["a cat"], False, system_prompt="Draw.")
    assert torch.equal(own.text, text[:, mask[0].bool()])
    pipe.system_prompt = "Draw."
    assert torch.equal(encode_text(pipe, ["a cat"]).text, own.text)
    assert isinstance(own, Cond) and encode_text(pipe, ["a cat"], negative=True).text.shape[1] == 6


def test_sizes_that_cut_a_token_are_refused() -> None:
    host = adapt(make("lumina2"))
    assert host.latent_shape((80, 48))[1:] == (6, 10)
    with pytest.raises(OneStepError, match="multiples of 16 pixels, not 72x64: take 64x64"):
        host.latent_shape((72, 64))
