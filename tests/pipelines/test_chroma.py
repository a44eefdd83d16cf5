"""Chroma in diffusers: D is the network's own answer, texts of any lengths share a batch under a mask and show no
padding, guidance and steps are its own pipeline's, and one file draws one picture by OneStepPipeline and by diffusers
alone."""

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

from onestep.cli.inspect import in_diffusers
from onestep.core.denoiser import guided
from onestep.core.errors import OneStepError
from onestep.core.families import FAMILIES
from onestep.core.recipe import Recipe
from onestep.core.sampling import teacher_sample
from onestep.core.schedule import FlowSchedule
from onestep.pipelines.adapt import adapt
from onestep.pipelines.one_step import OneStepPipeline

SIZE = (16, 24)
PROMPTS = ["a cat", "red dog " + 20 * "a cat ", "", "dog a cat"]


def text_of(pipe: Any, prompt: str) -> torch.Tensor:
    """T5's states of a prompt's own tokens, the one that ends it among them."""
    return pipe.text_encoder(pipe.tokenizer(prompt, return_tensors="pt").input_ids)[0]


def asked_by_hand(pipe: Any, x: torch.Tensor, sigma: torch.Tensor, prompt: str) -> torch.Tensor:
    """The velocity [1, 4, h, w], as ChromaPipeline asks its network for one prompt that is not padded."""
    text, (height, width) = text_of(pipe, prompt), x.shape[2:]
    velocity = pipe.transformer(
        pipe._pack_latents(x, 1, 4, height, width),
        text,
        sigma.float(),
        img_ids=pipe._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32),
        txt_ids=torch.zeros(text.shape[1], 3),
    ).sample
    return pipe._unpack_latents(velocity, height * pipe.vae_scale_factor, width * pipe.vae_scale_factor, 2)


@torch.no_grad()
def test_texts_of_any_lengths_share_a_batch_and_are_their_own_tokens() -> None:
    pipe = make("chroma")
    host = adapt(pipe)
    cond, x = host.encode(PROMPTS, SIZE), noisy(host, 4)
    assert cond.mask is not None and host.denoiser.guidance == "cfg"
    assert [int(count) for count in cond.mask.sum(1)] == [text_of(pipe, prompt).shape[1] for prompt in PROMPTS]
    sigma = torch.tensor([0.9, 0.2, 0.5, 1.0], dtype=torch.float64)
    found = host.denoiser(x, sigma, cond)
    for row, prompt in enumerate(PROMPTS):
        velocity = asked_by_hand(pipe, x[row : row + 1], sigma[row : row + 1], prompt)[0]
        expected = x[row] - sigma[row].float() * velocity
        assert float((found[row] - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_gradients_under_a_mask_are_those_of_each_text_alone() -> None:
    """Padding's own rows of the attention see nothing: no number of theirs may come back."""
    host = adapt(make("chroma"))
    cond, x, weight = host.encode(PROMPTS, SIZE), noisy(host, 4), noisy(host, 4)
    sigma = torch.tensor([0.9, 0.2, 0.5, 0.7], dtype=torch.float64)
    host.denoiser.roles.load(
        "student",
        {
            t.name: (torch.randn(t.shape_a(2)), 0.1 * torch.randn(t.shape_b(2)))
            for t in host.denoiser.roles.targets.values()
        },
    )
    factors = host.denoiser.roles.parameters("student")
    assert cond.mask is not None
    lengths = cond.mask.sum(1).tolist()
    with host.training(), host.denoiser.roles.use("student"):
        together = torch.autograd.grad((weight * host.denoiser(x, sigma, cond)).sum(), factors)
        rows = [(slice(i, i + 1), type(cond)(cond.text[i : i + 1, :length])) for i, length in enumerate(lengths)]
        alone = sum((weight[row] * host.denoiser(x[row], sigma[row], one)).sum() for row, one in rows)
        for found, wanted in zip(together, torch.autograd.grad(alone, factors), strict=True):
            assert bool(found.isfinite().all()) and float((found - wanted).norm()) < 1e-4 * float(wanted.norm()) + 1e-5


@torch.no_grad()
@pytest.mark.parametrize("k", [1.0, 4.0])
def test_guidance_is_its_pipelines(k: float) -> None:
    """v_u + k (v_c - v_u), written from ChromaPipeline; its network reads a guidance of 0 whatever k is."""
    pipe = make("chroma")
    host = adapt(pipe)
    x, sigma = noisy(host, 1), torch.tensor([0.7], dtype=torch.float64)
    found = guided(host.denoiser, x, sigma, host.encode(["a cat"], SIZE), host.encode(["red"], SIZE), torch.tensor([k]))
    v_c, v_u = (asked_by_hand(pipe, x, sigma, prompt).double().numpy() for prompt in ("a cat", "red"))
    expected = x.double().numpy() - 0.7 * (v_u + k * (v_c - v_u))
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def own(pipe: Any, name: str, prompt: str) -> dict[str, torch.Tensor]:
    text = text_of(pipe, prompt)
    return {f"{name}_embeds": text, f"{name}_attention_mask": torch.ones(text.shape[:2], dtype=torch.bool)}


@torch.no_grad()
@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_the_teacher_draws_what_its_pipeline_draws(shift: float) -> None:
    pipe = make("chroma", shift=shift)
    host, steps = adapt(pipe), 5
    noise = torch.randn(1, *host.latent_shape(SIZE), generator=torch.Generator().manual_seed(3))
    cond, null = host.encode(["a cat"], SIZE), host.encode(["red"], SIZE)
    x0 = teacher_sample(host.denoiser, cond, null, noise, steps, 4.0)
    start = pipe._pack_latents(noise, 1, 4, *noise.shape[2:])
    call = {"num_inference_steps": steps, "guidance_scale": 4.0, "width": SIZE[0], "height": SIZE[1]}
    texts = own(pipe, "prompt", "a cat") | own(pipe, "negative_prompt", "red")
    theirs = pipe(**texts, latents=start, output_type="latent", **call).images
    theirs = pipe._unpack_latents(theirs, SIZE[1], SIZE[0], pipe.vae_scale_factor)
    torch.testing.assert_close(x0, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


def test_the_published_schedule_is_the_familys() -> None:
    assert adapt(make("chroma")).denoiser.schedule == FAMILIES["chroma"].schedule == FlowSchedule(1.0)


@pytest.mark.parametrize("guidance", narrowed([1.0, 3.0], 3.0))
def test_the_script_that_is_printed_draws_the_picture(
    guidance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the text's own tokens under a mask of booleans: what ChromaPipeline makes of a prompt is another text."""
    times = torch.tensor([1000.0, 900.0, 750.0], dtype=torch.float64)
    recipe = Recipe.at(FlowSchedule(1.0), times, family="chroma", guidance=guidance, sizes=(SIZE,))
    make("chroma").save_pretrained(tmp_path / "model")
    path = random_lora(make("chroma"), tmp_path / "a.safetensors", recipe, size=0.1)
    fast = OneStepPipeline.from_pipe(make("chroma"))
    fast.load_one_step_lora(path)
    monkeypatch.chdir(tmp_path)
    script = fast.diffusers_settings().script(make("chroma"), str(tmp_path / "model"), str(path), "a cat")
    assert len(script.splitlines()) <= 10 and "onestep" not in script
    exec(script, {})  # what a person would run
    from PIL import Image

    drawn = np.asarray(Image.open(tmp_path / "picture.png"), dtype=np.float64)
    torch.manual_seed(0)
    ours = np.asarray(fast("a cat").images[0], dtype=np.float64)
    assert np.abs(ours - drawn).max() <= 1 and drawn.std() > 1
    plain = make("chroma")
    plain.load_lora_weights(str(tmp_path), weight_name=path.name)
    call = fast.diffusers_settings().apply(plain)
    torch.manual_seed(0)
    padded = np.asarray(plain("a cat", **call).images[0], dtype=np.float64)
    assert np.abs(padded - ours).max() > 1, "the padding that its pipeline shows must be seen here"
    assert "given('prompt', \"your prompt\")" in "\n".join(in_diffusers(recipe, path))


def test_embeddings_of_several_lengths_draw_what_their_prompts_do() -> None:
    fast = OneStepPipeline.from_pipe(make("chroma"))
    times = torch.tensor([1000.0, 750.0], dtype=torch.float64)
    told: dict[str, Any] = {"recipe": Recipe.at(FlowSchedule(1.0), times, family="chroma", guidance=3.0, sizes=(SIZE,))}
    told |= {"seed": 3, "output_type": "latent"}
    drawn = fast(PROMPTS, negative_prompt="red", **told).images
    texts, negatives, *pooled = fast.encode_prompt(PROMPTS, "red")
    assert pooled == [None, None] and len({len(text) for text in texts}) > 2
    torch.testing.assert_close(fast(prompt_embeds=texts, negative_prompt_embeds=negatives, **told).images, drawn)
    alone = torch.cat([fast(prompt_embeds=[text], negative_prompt_embeds=negatives, **told).images for text in texts])
    assert float((drawn[:1] - alone[:1]).abs().max()) < 1e-4 * float(drawn.abs().max())


def test_embeddings_that_its_own_pipeline_padded_are_refused() -> None:
    """Nothing tells their padding from the text."""
    fast, pipe = OneStepPipeline.from_pipe(make("chroma")), make("chroma")
    padded = pipe.encode_prompt(["a cat"], do_classifier_free_guidance=False)[0]
    with pytest.raises(OneStepError, match="prompt_embeds has 512 tokens a text, to which its own pipeline pads"):
        fast(prompt_embeds=padded, recipe=Recipe((900.0,), family="chroma"), seed=3)


def test_long_prompts_are_cut_as_its_pipeline_cuts_them() -> None:
    host = adapt(make("chroma"))
    cond = host.encode(["a cat " * 400, "a"], SIZE)
    assert cond.mask is not None and cond.mask.sum(1).tolist() == [512, len(host.pipe.tokenizer("a").input_ids)]
