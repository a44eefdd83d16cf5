"""Qwen-Image in diffusers: D is the network's own answer, texts of any lengths share a batch under a mask, guidance and
steps are its own pipeline's, and one file draws one picture by OneStepPipeline and by diffusers alone."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_qwen
import torch
from adapted import noisy
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from lora_files import random_lora
from tiny_pipelines import make

from onestep.core.cond import Cond
from onestep.core.denoiser import guided
from onestep.core.errors import OneStepError
from onestep.core.families import FAMILIES
from onestep.core.recipe import Recipe
from onestep.core.sampling import teacher_sample
from onestep.core.schedule import FlowSchedule, SizeShift, of_size
from onestep.pipelines import steered
from onestep.pipelines.adapt import adapt
from onestep.pipelines.one_step import OneStepPipeline
from onestep.pipelines.plain import diffusers_settings

SIZE = (64, 96)
PROMPTS = ["a cat", "red dog " + 20 * "a cat ", "", "dog a cat"]


def asked_by_hand(pipe: Any, x: torch.Tensor, sigma: torch.Tensor, prompt: str) -> torch.Tensor:
    """The velocity [1, tokens, 64], as QwenImagePipeline asks its network for one prompt."""
    text, mask = pipe.encode_prompt([prompt])
    height, width = x.shape[2:]
    tokens = pipe._pack_latents(x, 1, 16, height, width)
    shapes = [[(1, height // 2, width // 2)]]
    return pipe.transformer(tokens, text, mask, sigma.float(), shapes).sample


@torch.no_grad()
def test_texts_of_any_lengths_share_a_batch_and_are_the_pipelines_own() -> None:
    pipe = make("qwen_image")
    host = adapt(pipe)
    cond, x = host.encode(PROMPTS, SIZE), noisy(host, 4)
    assert cond.mask is not None and host.denoiser.guidance == "cfg"
    assert [int(count) for count in cond.mask.sum(1)] == [len(pipe.encode_prompt(text)[0][0]) for text in PROMPTS]
    sigma = torch.tensor([0.9, 0.2, 0.5, 1.0], dtype=torch.float64)
    found = host.denoiser(x, sigma, cond)
    for row, prompt in enumerate(PROMPTS):
        velocity = asked_by_hand(pipe, x[row : row + 1], sigma[row : row + 1], prompt)
        velocity = pipe._unpack_latents(velocity, 8 * x.shape[2], 8 * x.shape[3], 8)[0, :, 0]
        expected = x[row] - sigma[row].float() * velocity
        assert float((found[row] - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("k", [1.0, 4.0])
def test_guidance_keeps_each_tokens_norm_as_its_pipeline_does(k: float) -> None:
    """v_k ||v_c|| / ||v_k|| over a token's 64 numbers, v_k = v_u + k (v_c - v_u), written from QwenImagePipeline."""
    pipe = make("qwen_image")
    host = adapt(pipe)
    x, sigma = noisy(host, 1), torch.tensor([0.7], dtype=torch.float64)
    found = guided(host.denoiser, x, sigma, host.encode(["a cat"], SIZE), host.encode(["red"], SIZE), torch.tensor([k]))
    v_c, v_u = (asked_by_hand(pipe, x, sigma, prompt).double().numpy() for prompt in ("a cat", "red"))
    v_k = v_u + k * (v_c - v_u)
    v_k = v_k * np.linalg.norm(v_c, axis=-1, keepdims=True) / np.linalg.norm(v_k, axis=-1, keepdims=True)
    height, width = x.shape[2:]
    velocity = v_k.reshape(1, height // 2, width // 2, 16, 2, 2).transpose(0, 3, 1, 4, 2, 5).reshape(x.shape)
    expected = x.double().numpy() - 0.7 * velocity
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@torch.no_grad()
def test_the_teacher_draws_what_its_pipeline_draws() -> None:
    """Its shift by the picture's size, steps stretched to end at 0.02, guidance with each token's norm."""
    pipe = make("qwen_image")
    host, steps = adapt(pipe), 5
    noise = torch.randn(1, *host.latent_shape(SIZE), generator=torch.Generator().manual_seed(3))
    cond, null = host.encode(["a cat"], SIZE), host.encode(["red"], SIZE)
    x0 = teacher_sample(host.denoiser, cond, null, noise, steps, 4.0)
    start = pipe._pack_latents(noise, 1, 16, *noise.shape[2:])
    call = {"num_inference_steps": steps, "true_cfg_scale": 4.0, "width": SIZE[0], "height": SIZE[1]}
    theirs = pipe("a cat", "red", latents=start, output_type="latent", **call).images
    theirs = pipe._unpack_latents(theirs, SIZE[1], SIZE[0], 8)[:, :, 0]
    torch.testing.assert_close(x0, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


SCHEDULERS = [
    tiny_qwen.PUBLISHED,
    {**tiny_qwen.PUBLISHED, "max_shift": 1.15, "max_image_seq_len": 4096, "shift_terminal": None},
    {**tiny_qwen.PUBLISHED, "time_shift_type": "linear", "base_shift": 1.5, "max_shift": 3.0},
    {"shift": 3.0, "shift_terminal": 0.05},
]


@pytest.mark.parametrize("config", SCHEDULERS)
@pytest.mark.parametrize("side", [32, 128, 200])
@pytest.mark.parametrize("steps", [2, 7, 50])
def test_the_steps_are_its_schedulers(config: dict[str, Any], side: int, steps: int) -> None:
    """diffusers' scheduler itself, told mu as QwenImagePipeline tells it."""
    pipe = make("qwen_image", **{"use_dynamic_shifting": False, **config})
    told, found = pipe.scheduler.config, adapt(pipe).denoiser.schedule
    mu = calculate_shift(
        (side // 2) ** 2, *(told[f"{end}_image_seq_len"] for end in ("base", "max")), told.base_shift, told.max_shift
    )
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    ours = of_size(found, (16, side, side)).trailing(steps)
    np.testing.assert_allclose(ours.numpy(), pipe.scheduler.timesteps.numpy(), rtol=0, atol=1e-3)


def test_the_published_schedule_is_the_familys_and_a_student_is_not_stretched() -> None:
    """A last step from 0.02 would be one step wasted: Lightning leaves shift_terminal out too."""
    schedule = adapt(make("qwen_image")).denoiser.schedule
    assert schedule == FAMILIES["qwen_image"].schedule and schedule.terminal == 0.02
    recipe = Recipe.for_student(schedule, 4, "qwen_image", ((1024, 1024),))
    mu = 0.5 + 0.4 * (4096 - 256) / (8192 - 256)
    shares = np.array([1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(recipe.timesteps, 1000 * np.exp(mu) * shares / (1 + (np.exp(mu) - 1) * shares))
    assert SizeShift(4096, (256, 0.5), (8192, 0.9))(3) == pytest.approx(np.exp(mu))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_one_file_draws_one_picture_with_and_without_guidance(guidance: float, tmp_path: Path) -> None:
    times = torch.tensor([1000.0, 900.0, 750.0], dtype=torch.float64)
    recipe = Recipe.at(FlowSchedule(3.0), times, family="qwen_image", guidance=guidance, sizes=(SIZE,))
    path = random_lora(make("qwen_image"), tmp_path / "a.safetensors", recipe, size=0.1)
    fast, plain = OneStepPipeline.from_pipe(make("qwen_image")), make("qwen_image")
    fast.load_one_step_lora(path)
    ours = fast("a cat", seed=3, output_type="np").images
    plain.load_lora_weights(str(tmp_path), weight_name=path.name)
    call = fast.diffusers_settings().apply(plain)
    draw = torch.Generator().manual_seed(3)
    theirs = plain("a cat", generator=draw, output_type="np", **call).images
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * float(np.abs(theirs).max()))
    without = make("qwen_image")("a cat", generator=torch.Generator().manual_seed(3), output_type="np", **call).images
    assert np.abs(ours - without).max() > 0.01


def test_noise_of_another_scale_is_made_by_its_pipeline_in_packed_rows() -> None:
    recipe = Recipe((900.0,), initial_noise_scale=0.8, family="qwen_image", sizes=(SIZE,))
    found: dict[str, Any] = {"pipe": make("qwen_image"), "torch": torch}
    exec(diffusers_settings(recipe).noise_line(), found)  # noqa: S102
    assert found["noise"].shape == (1, 4 * 6, 64)


def test_embeddings_of_several_lengths_draw_what_their_prompts_do() -> None:
    fast = OneStepPipeline.from_pipe(make("qwen_image"))
    times = torch.tensor([1000.0, 750.0], dtype=torch.float64)
    told: dict[str, Any] = {
        "recipe": Recipe.at(FlowSchedule(3.0), times, family="qwen_image", guidance=3.0, sizes=(SIZE,))
    }
    told |= {"seed": 3, "output_type": "latent"}
    drawn = fast(PROMPTS, negative_prompt="red", **told).images
    texts, negatives, *pooled = fast.encode_prompt(PROMPTS, "red")
    assert pooled == [None, None] and len({len(text) for text in texts}) > 2
    torch.testing.assert_close(fast(prompt_embeds=texts, negative_prompt_embeds=negatives, **told).images, drawn)
    alone = torch.cat([fast(prompt_embeds=[text], negative_prompt_embeds=negatives, **told).images for text in texts])
    assert float((drawn[:1] - alone[:1]).abs().max()) < 1e-4 * float(drawn.abs().max())


@pytest.mark.parametrize("size", [(48, 64), (1328, 1328), (64, 16)])
def test_sizes_that_the_hosts_place_differently_are_refused_with_what_to_take(size: tuple[int, int]) -> None:
    taken = tuple(max(32, 32 * round(side / 32)) for side in size)
    with pytest.raises(OneStepError, match=rf"multiples of 32 pixels \(at others .*: take {taken[0]}x{taken[1]}$"):
        adapt(make("qwen_image")).latent_shape(size)


def test_padding_among_embeddings_is_refused_with_what_to_give() -> None:
    """Of QwenImagePipeline's encode_prompt, which gives a mask beside them. Zeros alone are a text like another."""
    pipe, times = make("qwen_image"), torch.tensor([1000.0], dtype=torch.float64)
    fast, recipe = OneStepPipeline.from_pipe(pipe), Recipe.at(FlowSchedule(3.0), times, family="qwen_image")
    call = {"recipe": recipe, "seed": 3, "width": SIZE[0], "height": SIZE[1], "output_type": "latent"}
    padded, mask = pipe.encode_prompt(["a cat", "a red dragon"])
    assert mask is not None
    for given in (padded, padded[:1]):
        with pytest.raises(OneStepError, match="prompt_embeds ends in zeros.*give a list of each text's own tokens"):
            fast(prompt_embeds=given, **call)
        with pytest.raises(OneStepError, match="the negative ends in zeros.*own tokens"), steered(pipe, given, "nag"):
            pass
        for empty in (given[:1], Cond(given[:1])):
            with pytest.raises(OneStepError, match="the empty text ends in"), steered(pipe, "a", "perp", empty=empty):
                pass
    for given in (padded[1:], torch.zeros_like(padded[:1])):
        assert len(fast(prompt_embeds=given, **call).images) == 1
        with steered(pipe, given, "nag"):
            pass
    with steered(pipe, Cond(padded, mask.bool()), "nag"):
        pass


def test_a_prompt_is_read_as_far_as_its_pipelines_call_reads_it() -> None:
    pipe, prompt = make("qwen_image"), 120 * "a cat "
    most = signature(type(pipe).__call__).parameters["max_sequence_length"].default
    read, _ = pipe.encode_prompt([prompt], max_sequence_length=most)
    assert read.shape[1] == most < pipe.encode_prompt([prompt])[0].shape[1]
    assert torch.equal(adapt(pipe).encode([prompt], SIZE).text, read.float())


@pytest.mark.parametrize("cls", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_a_scheduler_that_tells_no_line_has_its_pipelines_own(cls: Any) -> None:
    pipe = make("qwen_image")
    pipe.scheduler = cls(prediction_type="flow_prediction", use_flow_sigmas=True, use_dynamic_shifting=True)
    assert "base_image_seq_len" not in pipe.scheduler.config
    found = of_size(adapt(pipe).denoiser.schedule, (16, 64, 64))
    assert isinstance(found, FlowSchedule) and isinstance(found.by_steps, SizeShift)
    assert found.by_steps(7) == pytest.approx(np.exp(calculate_shift(32 * 32)))


@pytest.mark.parametrize(("start", "end", "acting"), [(0.0, 0.3, [1, 1, 0, 0]), (0.3, 0.57, [0, 0, 1, 0])])
def test_steering_acts_in_its_share_of_the_steps(start: float, end: float, acting: list[int]) -> None:
    """By the shift of a megapixel; those of so small a picture lie at 0, 0.29, 0.55 and 0.79 of it."""
    pipe, tokens = make("qwen_image", shift_terminal=None), []
    pipe.transformer.txt_in.register_forward_hook(lambda _, args, __: tokens.append(args[0].shape[1]))
    with steered(pipe, "red", "nag", start=start, end=end):
        call = {"width": 32, "height": 32, "output_type": "latent", "true_cfg_scale": 1.0}
        pipe("a cat", num_inference_steps=4, **call)
    assert [int(count > min(tokens)) for count in tokens] == acting
