"""Krea 2 in diffusers: D is the network's own answer, texts of any lengths share a batch, guidance and steps are its
own pipeline's, and one file draws one picture by OneStepPipeline and by diffusers alone."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapted import noisy
from diffusers import UniPCMultistepScheduler
from diffusers.pipelines.krea2.pipeline_krea2 import calculate_shift
from lora_files import random_lora
from narrowed import narrowed
from tiny_pipelines import make

from onestep.core.errors import OneStepError
from onestep.core.families import FAMILIES
from onestep.core.recipe import Recipe
from onestep.core.sampling import teacher_sample
from onestep.core.schedule import FlowSchedule, of_size
from onestep.pipelines.adapt import adapt
from onestep.pipelines.one_step import OneStepPipeline
from onestep.pipelines.plain import diffusers_settings

SIZE = (64, 96)
PROMPTS = ["a cat", "red dog " + 20 * "a cat ", "", "dog a cat"]
SHIFT = float(np.exp(1.15))


def asked_by_hand(pipe: Any, x: torch.Tensor, sigma: torch.Tensor, prompt: str) -> torch.Tensor:
    """The velocity [1, 16, h, w], as Krea2Pipeline asks its network for one prompt, with all of its padding."""
    text, mask = pipe.encode_prompt([prompt])
    height, width = x.shape[2:]
    tokens = pipe._pack_latents(x, 1, 16, height, width)
    places = pipe.prepare_position_ids(text.shape[1], height // 2, width // 2, x.device)
    answer = pipe.transformer(tokens, text, sigma.float(), places, mask).sample
    return pipe._unpack_latents(answer, 8 * height, 8 * width)[:, :, 0]  # type: ignore[no-any-return]


@torch.no_grad()
def test_texts_of_any_lengths_share_a_batch_and_are_the_pipelines_own() -> None:
    pipe = make("krea2")
    host = adapt(pipe)
    cond, x = host.encode(PROMPTS, SIZE), noisy(host, 4)
    assert cond.mask is not None and host.denoiser.guidance == "cfg"
    assert cond.text.shape[2] == 3 * 8 and cond.text.shape[1] < 512, "padding is not kept"
    assert cond.mask.sum(1).tolist() == [int(pipe.encode_prompt([text])[1].sum()) for text in PROMPTS]
    sigma = torch.tensor([0.9, 0.2, 0.5, 1.0], dtype=torch.float64)
    found = host.denoiser(x, sigma, cond)
    for row, prompt in enumerate(PROMPTS):
        velocity = asked_by_hand(pipe, x[row : row + 1], sigma[row : row + 1], prompt)[0]
        expected = x[row] - sigma[row].float() * velocity
        assert float((found[row] - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("distilled", [False, True])
def test_the_teacher_draws_what_its_pipeline_draws(distilled: bool) -> None:
    """Its shift by the picture's size, Turbo's at every size; v_c + g (v_c - v_u) is our guidance g + 1."""
    pipe = make("krea2", distilled=distilled)
    host, steps = adapt(pipe), 5
    noise = torch.randn(1, *host.latent_shape(SIZE), generator=torch.Generator().manual_seed(3))
    cond, null = host.encode(["a cat"], SIZE), host.encode(["red"], SIZE)
    x0 = teacher_sample(host.denoiser, cond, null, noise, steps, 4.5)
    start = pipe._pack_latents(noise, 1, 16, *noise.shape[2:])
    call = {"num_inference_steps": steps, "guidance_scale": 3.5, "width": SIZE[0], "height": SIZE[1]}
    theirs = pipe("a cat", "red", latents=start, output_type="latent", **call).images
    theirs = pipe._unpack_latents(theirs, SIZE[1], SIZE[0])[:, :, 0]
    torch.testing.assert_close(x0, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("side", [32, 128, 200])
@pytest.mark.parametrize("steps", [2, 8, 28])
def test_the_steps_are_its_schedulers(distilled: bool, side: int, steps: int) -> None:
    """diffusers' scheduler itself, told mu as Krea2Pipeline tells it."""
    pipe = make("krea2", distilled=distilled)
    told, found = pipe.scheduler.config, adapt(pipe).denoiser.schedule
    sizes = (told[f"{end}_image_seq_len"] for end in ("base", "max"))
    mu = 1.15 if distilled else calculate_shift((side // 2) ** 2, *sizes, told.base_shift, told.max_shift)
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    ours = of_size(found, (16, side, side)).trailing(steps)
    np.testing.assert_allclose(ours.numpy(), pipe.scheduler.timesteps.numpy(), rtol=0, atol=1e-3)


def test_the_published_schedule_is_the_familys() -> None:
    schedule = adapt(make("krea2")).denoiser.schedule
    assert schedule == FAMILIES["krea2"].schedule
    recipe = Recipe.for_student(schedule, 4, "krea2", ((1024, 1024),))
    mu, shares = 0.5 + 0.65 * (4096 - 256) / (6400 - 256), np.array([1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(recipe.timesteps, 1000 * np.exp(mu) * shares / (1 + (np.exp(mu) - 1) * shares))
    assert adapt(make("krea2", distilled=True)).denoiser.schedule == FlowSchedule(SHIFT)


@pytest.mark.parametrize("guidance", narrowed([1.0, 3.0], 3.0))
def test_one_file_draws_one_picture_with_and_without_guidance(guidance: float, tmp_path: Path) -> None:
    times = torch.tensor([1000.0, 900.0, 750.0], dtype=torch.float64)
    recipe = Recipe.at(FlowSchedule(SHIFT), times, family="krea2", guidance=guidance, sizes=(SIZE,))
    path = random_lora(make("krea2"), tmp_path / "a.safetensors", recipe, size=0.1)
    fast, plain = OneStepPipeline.from_pipe(make("krea2")), make("krea2")
    fast.load_one_step_lora(path)
    ours = fast("a cat", seed=3, output_type="np").images
    plain.load_lora_weights(str(tmp_path), weight_name=path.name)
    call = fast.diffusers_settings().apply(plain)
    assert call["guidance_scale"] == guidance - 1
    theirs = plain("a cat", generator=torch.Generator().manual_seed(3), output_type="np", **call).images
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * float(np.abs(theirs).max()))
    without = make("krea2")("a cat", generator=torch.Generator().manual_seed(3), output_type="np", **call).images
    assert np.abs(ours - without).max() > 0.01


@pytest.mark.parametrize("sizes", [(SIZE,), ()])
def test_noise_of_another_scale_is_made_by_its_pipeline_in_packed_rows(sizes: tuple[Any, ...]) -> None:
    """Without a size at that which its call has by itself."""
    recipe = Recipe((900.0,), initial_noise_scale=0.8, family="krea2", sizes=sizes)
    found: dict[str, Any] = {"pipe": make("krea2"), "torch": torch}
    exec(diffusers_settings(recipe).noise_line(), found)  # noqa: S102
    assert found["noise"].shape == (1, 4 * 6 if sizes else 64 * 64, 64)


def test_embeddings_of_several_lengths_draw_what_their_prompts_do() -> None:
    fast = OneStepPipeline.from_pipe(make("krea2"))
    times = torch.tensor([1000.0, 750.0], dtype=torch.float64)
    told: dict[str, Any] = {"recipe": Recipe.at(FlowSchedule(3.0), times, family="krea2", guidance=3.0, sizes=(SIZE,))}
    told |= {"seed": 3, "output_type": "latent"}
    drawn = fast(PROMPTS, negative_prompt="red", **told).images
    texts, negatives, *pooled = fast.encode_prompt(PROMPTS, "red")
    assert pooled == [None, None] and len({len(text) for text in texts}) > 2
    torch.testing.assert_close(fast(prompt_embeds=texts, negative_prompt_embeds=negatives, **told).images, drawn)
    alone = torch.cat([fast(prompt_embeds=[text], negative_prompt_embeds=negatives, **told).images for text in texts])
    assert float((drawn[:1] - alone[:1]).abs().max()) < 1e-4 * float(drawn.abs().max())


def test_embeddings_with_padding_are_refused_with_what_to_give() -> None:
    """Of Krea2Pipeline's encode_prompt, which has the padding in the midst of a text and an axis of layers."""
    pipe, times = make("krea2"), torch.tensor([1000.0], dtype=torch.float64)
    fast, recipe = OneStepPipeline.from_pipe(pipe), Recipe.at(FlowSchedule(3.0), times, family="krea2")
    padded, mask = pipe.encode_prompt(["a cat"])
    call: dict[str, Any] = {"recipe": recipe, "seed": 3, "width": 64, "height": 64, "output_type": "latent"}
    for given in (padded, [padded[0][mask[0]]]):
        with pytest.raises(OneStepError, match=r"an axis of layers .* give a list of each text's own tokens, \[tokens"):
            fast(prompt_embeds=given, **call)
    own = fast(prompt_embeds=[padded[0][mask[0]].flatten(1)], **call).images
    torch.testing.assert_close(own, fast("a cat", **call).images)


@pytest.mark.parametrize("size", [(64, 100), (24, 64), (64, 8)])
def test_sizes_of_half_a_token_are_refused_with_what_to_take(size: tuple[int, int]) -> None:
    taken = tuple(max(16, 16 * round(side / 16)) for side in size)
    with pytest.raises(OneStepError, match=rf"multiples of 16 pixels, .*: take {taken[0]}x{taken[1]}$"):
        adapt(make("krea2")).latent_shape(size)
    assert adapt(make("krea2")).latent_shape((48, 80)) == (16, 10, 6)


@torch.no_grad()
def test_a_scheduler_that_tells_no_line_has_its_pipelines_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mu that Krea2Pipeline tells a scheduler without such entries."""
    pipe, told = make("krea2"), []
    pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, use_dynamic_shifting=True
    )
    set_timesteps = pipe.scheduler.set_timesteps

    @wraps(set_timesteps)
    def heard(*args: Any, mu: float, **more: Any) -> None:
        told.append(mu)
        set_timesteps(*args, mu=mu, **more)

    monkeypatch.setattr(pipe.scheduler, "set_timesteps", heard)
    pipe("a cat", num_inference_steps=2, width=256, height=384, output_type="latent")
    found = of_size(adapt(pipe).denoiser.schedule, (16, 48, 32))
    assert isinstance(found, FlowSchedule) and found.by_steps is not None
    assert found.by_steps(2) == pytest.approx(np.exp(told[0]))
