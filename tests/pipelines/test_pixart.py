"""PixArt-Sigma in diffusers: D is the network's own answer without its variance, texts of any lengths share a batch
under a mask; a LoRA, which diffusers has no loader for, is put on the network by peft and taken off again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pixart
import torch
from lora_files import random_lora
from tiny_folders import shaken

from onestep.core.adapter_file import save_adapter
from onestep.core.errors import OneStepError
from onestep.core.families import FAMILIES, detect, refuse_name, refuse_pipeline
from onestep.core.guidance_adapter import new_adapter, with_guidance
from onestep.core.recipe import Recipe
from onestep.core.sampling import teacher_sample
from onestep.core.schedule import VPSchedule
from onestep.pipelines.adapt import adapt, denoiser_of
from onestep.pipelines.guidance_adapter import load_guidance_adapter
from onestep.pipelines.one_step import OneStepPipeline
from onestep.pipelines.plain import diffusers_settings

SIZE = (40, 48)
PROMPTS = ["a cat", "red dog " + 20 * "a cat ", "", "Dog a cat"]


def make(**scheduler: Any) -> Any:
    torch.manual_seed(0)
    pipe = tiny_pixart.pixart(**scheduler)
    for seed, part in enumerate((pipe.vae, pipe.transformer, pipe.text_encoder), 2):
        shaken(part, seed).requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise_by_hand(pipe: Any, x: torch.Tensor, time: int, prompt: str) -> torch.Tensor:
    """The noise [1, 4, h, w], as PixArtSigmaPipeline asks its network for one prompt."""
    text, mask, *_ = pipe.encode_prompt([prompt], do_classifier_free_guidance=False)
    told = {"resolution": None, "aspect_ratio": None}
    answer = pipe.transformer(x, text, torch.tensor([time]), told, encoder_attention_mask=mask).sample
    return answer.chunk(2, 1)[0]


@torch.no_grad()
def test_texts_of_any_lengths_share_a_batch_and_are_the_pipelines_own() -> None:
    pipe = make()
    host = adapt(pipe)
    cond, x = host.encode(PROMPTS, SIZE), torch.randn(4, 4, *SIZE[::-1])
    assert cond.mask is not None and host.denoiser.guidance == "cfg"
    lengths = [len(pipe.tokenizer(prompt.lower().strip()).input_ids) for prompt in PROMPTS]
    assert [int(count) for count in cond.mask.sum(1)] == lengths
    times = [801, 37, 400, 999]
    sigma = host.denoiser.schedule.sigma_of_time(torch.tensor(times, dtype=torch.float64))
    found = host.denoiser(x, sigma, cond).double()
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for row, (prompt, time) in enumerate(zip(PROMPTS, times, strict=True)):
        noise = noise_by_hand(pipe, x[row : row + 1], time, prompt)[0].double()
        expected = (x[row].double() - np.sqrt(1 - abar[time]) * noise) / np.sqrt(abar[time])
        assert float((found[row] - expected).abs().max()) < 2e-5 * float(expected.abs().max())


def test_the_published_schedule_is_the_familys() -> None:
    known = FAMILIES["pixart"].schedule
    assert isinstance(known, VPSchedule)
    found = adapt(make()).denoiser.schedule
    assert isinstance(found, VPSchedule)
    torch.testing.assert_close(found.alphas_cumprod, known.alphas_cumprod, rtol=1e-5, atol=0)


@torch.no_grad()
def test_the_teacher_guides_as_its_pipeline_does() -> None:
    """eps_u + k (eps_c - eps_u), one step of DDIM by hand to x0."""
    host, k = adapt(make()), 4.0
    noise = torch.randn(1, 4, *SIZE[::-1], generator=torch.Generator().manual_seed(3))
    x0 = teacher_sample(host.denoiser, host.encode(["a cat"], SIZE), host.encode(["red"], SIZE), noise, 1, k)
    sigma = host.denoiser.schedule.sigma_of_time(torch.tensor([999.0], dtype=torch.float64))
    start = noise * float(sigma) if float(x0.std()) else noise
    c, u = (noise_by_hand(host.pipe, start, 999, prompt) for prompt in ("a cat", "red"))
    alpha = float(host.denoiser.schedule.alpha(sigma))
    expected = (start - float(sigma) * (u + k * (c - u))) / alpha
    assert float((x0 - expected).norm()) < 1e-3 * float(expected.norm())


def test_a_lora_is_put_on_by_peft_and_taken_off_again(tmp_path: Path) -> None:
    times = torch.tensor([999.0, 499.0], dtype=torch.float64)
    recipe = Recipe.at(FAMILIES["pixart"].schedule, times, family="pixart", sizes=(SIZE,), renoise=True)
    path = random_lora(make(), tmp_path / "a.safetensors", recipe, size=0.1)
    host = adapt(make())
    assert "which has no loader of LoRAs for this model, loads all 27 layers" in host.check_file(path)
    fast = OneStepPipeline.from_pipe(make())
    told: dict[str, Any] = {"recipe": recipe, "seed": 3, "output_type": "latent"}
    plain = fast("a cat", **told).images
    fast.load_one_step_lora(path)
    drawn = fast("a cat", **told).images
    assert float((drawn - plain).abs().max()) > 0.01 * float(plain.abs().max())
    fast.unload_lora_weights()
    torch.testing.assert_close(fast("a cat", **told).images, plain)
    with pytest.raises(OneStepError, match="diffusers has no loader of LoRAs for PixArt-Sigma: draw with OneStep"):
        diffusers_settings(recipe)


def test_alpha_is_refused_by_name() -> None:
    """It reads the picture's size besides, and has other latents."""
    with pytest.raises(OneStepError, match="^PixArt-Alpha models cannot be adapted yet"):
        detect(tiny_pixart.transformer(use_additional_conditions=True, attention_head_dim=36))
    with pytest.raises(OneStepError, match="^PixArt-Alpha models cannot be adapted yet"):
        refuse_pipeline("PixArtAlphaPipeline")
    for name in ("PixArt-XL-2-512x512", "pixart_alpha_512", "PixArt-α"):
        with pytest.raises(OneStepError, match="is PixArt-Alpha, which is not served"):
            refuse_name("pixart", name)
    refuse_name("pixart", "PixArt-Sigma-XL-2-1024-MS")


def test_pictures_too_small_for_comfyui_are_refused() -> None:
    host = adapt(make())
    assert host.latent_shape((40, 32)) == (4, 32, 40)
    with pytest.raises(OneStepError, match="draws from 33 pixels on"):
        host.latent_shape((32, 32))
    with pytest.raises(OneStepError, match="multiples of 8 pixels, not 34x34: take 40x40"):
        host.latent_shape((34, 34))


def guidance_adapter(folder: Path) -> tuple[Any, Path]:
    """One away from its start, and its file."""
    host = adapt(make())
    side = new_adapter(host.denoiser.roles.targets, host.family, 1)
    draw = torch.Generator().manual_seed(2)
    for _, value in sorted(side.named_parameters()):
        value.detach().add_(0.2 * torch.randn(value.shape, generator=draw))
    save_adapter(folder / "guide.safetensors", side, host.family)
    return side, folder / "guide.safetensors"


@torch.no_grad()
def test_a_guidance_adapter_gives_the_trainers_own_numbers(tmp_path: Path) -> None:
    """Of texts of several lengths."""
    side, file = guidance_adapter(tmp_path)
    host, x = adapt(make()), torch.randn(4, 4, *SIZE[::-1])
    sigma, cond = host.denoiser.schedule.sigma_at(torch.tensor([0.3, 0.8, 0.5, 0.1])), host.encode(PROMPTS, SIZE)
    host.denoiser.roles.add_module("student", side)
    with host.denoiser.roles.use("student"):
        wanted = host.denoiser(x, sigma, with_guidance(cond, 5.0))
    host.release()
    plain = denoiser_of(host.pipe)(x, sigma, cond)
    with load_guidance_adapter(host.pipe, file, guidance=5):
        found = denoiser_of(host.pipe)(x, sigma, cond)
    assert float((wanted - plain).norm()) > 0.01 * float(plain.norm())
    assert float((found - wanted).abs().max()) < 2e-5 * float(wanted.abs().max())
    assert torch.equal(denoiser_of(host.pipe)(x, sigma, cond), plain)


def test_guidance_of_its_own_is_refused_unless_told_the_prompts_half(tmp_path: Path) -> None:
    """Two prompts from one noise are not mistaken for a prompt and its negative."""
    _, file = guidance_adapter(tmp_path)
    pipe, prompts = make(), ["a cat", "red dog"]
    noise = torch.randn(1, 4, *SIZE[::-1], generator=torch.Generator().manual_seed(1)).repeat(2, 1, 1, 1)
    told: dict[str, Any] = {"output_type": "latent", "width": SIZE[0], "height": SIZE[1], "latents": noise}
    told |= {"num_inference_steps": 1, "use_resolution_binning": False}
    answers: list[torch.Tensor] = []
    pipe.transformer.register_forward_hook(lambda _, __, answer: answers.append(answer[0]))
    pipe(prompts, guidance_scale=3.0, **told)
    with load_guidance_adapter(pipe, file, 5, rows="second half"):
        pipe(prompts, guidance_scale=3.0, **told)
    with load_guidance_adapter(pipe, file, 5):
        pipe(prompts, guidance_scale=1.0, **told)
        with pytest.raises(OneStepError, match="guidance_scale=1, or say which half"):
            pipe(prompts, guidance_scale=3.0, **told)
    plain, guided, alone = answers

    def gap(found: torch.Tensor, wanted: torch.Tensor) -> float:
        return float((found - wanted).abs().max() / wanted.std())

    assert gap(guided[:2], plain[:2]) < 1e-5 and gap(guided[2:], alone) < 1e-5 and gap(plain[2:], alone) > 1e-2


def test_ours_draws_under_a_guidance_adapter(tmp_path: Path) -> None:
    _, file = guidance_adapter(tmp_path)
    recipe = Recipe((999.0,), family="pixart")
    fast = OneStepPipeline.from_pipe(make())
    told: dict[str, Any] = {"recipe": recipe, "seed": 3, "output_type": "latent", "width": 40, "height": 40}
    plain = fast("a cat", **told).images
    fast.load_guidance_adapter(file, guidance=5)
    assert float((fast("a cat", **told).images - plain).abs().max()) > 1e-2 * float(plain.std())
    assert torch.equal(fast("a cat", guidance=1, **told).images, plain)
