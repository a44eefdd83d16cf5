"""A guidance adapter on diffusers networks: the trainer's own numbers, beside LoRAs, and off again without a trace."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import noisy
from loaded_adapters import in_either_order, on_another_checkpoint
from narrowed import narrowed
from tiny_pipelines import flux, klein, krea2, sd, sd3, sdxl, z_image
from torch import Tensor

from onestep.core.adapter_file import save_adapter
from onestep.core.errors import OneStepError
from onestep.core.guidance_adapter import new_adapter, with_guidance
from onestep.core.recipe import Recipe
from onestep.pipelines.adapt import adapt, denoiser_of, network_of
from onestep.pipelines.guidance_adapter import load_guidance_adapter
from onestep.pipelines.one_step import OneStepPipeline
from onestep.pipelines.steer import steered

PIPES = {"sd": sd, "sdxl": sdxl, "sd3": sd3, "flux": lambda: flux(embedded=False), "z_image": z_image}
PIPES |= {"klein": klein, "krea2": krea2}
PROMPTS = ["a cat", "a red dog"]


def made(name: str, folder: Path, seed: int = 0) -> tuple[Any, Any, Path]:
    """A pipeline, an adapter for it away from its start, and its file."""
    torch.manual_seed(seed)
    pipe = PIPES[name]()
    host = adapt(pipe, device="cpu")
    side = new_adapter(host.denoiser.roles.targets, host.family, 1)
    draw = torch.Generator().manual_seed(2)
    for _, value in sorted(side.named_parameters()):
        value.detach().add_(0.2 * torch.randn(value.shape, generator=draw))
    host.release()
    save_adapter(folder / "x.safetensors", side, host.family)
    return pipe, side, folder / "x.safetensors"


def asked(pipe: Any) -> tuple[Tensor, Tensor, Any]:
    host = adapt(pipe, device="cpu")
    host.release()
    sigma = host.denoiser.schedule.sigma_at(torch.tensor([0.3, 0.8]))
    torch.manual_seed(5)
    return noisy(host), sigma, host.encode(PROMPTS, (16, 16))


@torch.no_grad()
def answer(pipe: Any, inputs: tuple[Tensor, Tensor, Any]) -> Tensor:
    """The plain network's, whatever hangs on it."""
    return denoiser_of(pipe)(*inputs)


@torch.no_grad()
@pytest.mark.parametrize("name", narrowed(PIPES, "sd", "sd3", "z_image"))
def test_the_dial_gives_the_trainers_own_numbers_and_leaves_no_trace(name: str, tmp_path: Path) -> None:
    pipe, side, file = made(name, tmp_path)
    inputs = x, sigma, cond = asked(pipe)
    plain = answer(pipe, inputs)
    host = adapt(pipe, device="cpu")
    host.denoiser.roles.add_module("student", side)
    with host.denoiser.roles.use("student"):
        wanted = host.denoiser(x, sigma, with_guidance(cond, 5.0))
    host.release()
    with load_guidance_adapter(pipe, file, guidance=5) as dial:
        found = answer(pipe, inputs)
        assert not torch.allclose(found, plain)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        dial.guidance = 1
        assert torch.equal(answer(pipe, inputs), plain)
    assert torch.equal(answer(pipe, inputs), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network_of(pipe).modules())


@torch.no_grad()
def test_beside_a_lora_in_either_order(tmp_path: Path) -> None:
    pipe, _, file = made("sd", tmp_path)
    inputs = asked(pipe)
    load = partial(load_guidance_adapter, file=file, guidance=4)
    in_either_order(lambda: made("sd", tmp_path)[0], load, lambda pipe: answer(pipe, inputs))


@torch.no_grad()
def test_the_pipeline_itself_draws_with_it_on_another_checkpoint(tmp_path: Path) -> None:
    *_, file = made("sd", tmp_path)
    other, *_ = made("sd", tmp_path.parent, seed=9)
    on_another_checkpoint(other, lambda pipe: load_guidance_adapter(pipe.unet, file, guidance=3))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    pipe, _, file = made("sd", tmp_path)
    with pytest.raises(OneStepError, match="this adapter is for another base"):
        load_guidance_adapter(sdxl(), file)
    with pytest.raises(OneStepError, match="made for 'unet' models, this one is 'sd3'"):
        load_guidance_adapter(sd3(), file)
    for value in (0.5, 31, float("nan"), "3"):
        with pytest.raises(OneStepError, match="must lie in 1"):
            load_guidance_adapter(pipe, file, guidance=value)  # type: ignore[arg-type]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())
    with pytest.raises(OneStepError, match="has no U-Net"):
        load_guidance_adapter(object(), file)


# -- beside a pipeline's own guidance ---------------------------------------------------------------------------------

CALL: dict[str, Any] = {"width": 16, "height": 16, "output_type": "latent"}


def recipe_of(name: str, guidance: float = 1.0) -> Recipe:
    family = {"klein": "flux2"}.get(name, name if name in ("sd3", "flux", "z_image", "krea2") else "unet")
    return Recipe((999.0,) if family == "unet" else (1000.0,), guidance=guidance, family=family)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.std())


@pytest.mark.parametrize("name", narrowed(PIPES, "sd", "sd3", "z_image"))
def test_one_step_pipeline_draws_under_it(name: str, tmp_path: Path) -> None:
    """As with the dial on its network; at the scale it was loaded at, or the call's; 1 and taking it off are none."""
    pipe, _, file = made(name, tmp_path)
    if name == "flux":
        pipe.text_encoder_2.eval()  # T5 is made with dropout
    ours = OneStepPipeline.from_pipe(pipe)
    told = {"recipe": recipe_of(name), "seed": 1, **CALL}
    plain = ours(PROMPTS, **told).images
    with load_guidance_adapter(pipe, file, guidance=5):
        wanted = ours(PROMPTS, **told).images
    ours.load_guidance_adapter(file, guidance=5)
    assert torch.equal(ours(PROMPTS, **told).images, wanted) and error(wanted, plain) > 1e-2
    assert error(ours(PROMPTS, guidance=2, **told).images, wanted) > 1e-2
    assert torch.equal(ours(PROMPTS, guidance=1, **told).images, plain)
    ours.load_guidance_adapter(None)
    assert torch.equal(ours(PROMPTS, **told).images, plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network_of(pipe).modules())


@pytest.mark.parametrize("name", narrowed(["sd", "sd3", "z_image", "klein", "krea2"], "sd", "sd3"))
def test_beside_a_recipes_guidance_both_act(name: str, tmp_path: Path) -> None:
    """D_u + k (D_agd - D_u): the negative's own rows are nobody's."""
    pipe, _, file = made(name, tmp_path)
    ours = OneStepPipeline.from_pipe(pipe)
    more = {"seed": 1, **CALL}
    away = ours(["dog", "red"], recipe=recipe_of(name), **more).images
    ours.load_guidance_adapter(file, guidance=5)
    alone = ours(PROMPTS, recipe=recipe_of(name), **more).images
    both = ours(PROMPTS, negative_prompt=["dog", "red"], recipe=recipe_of(name, 3.0), **more).images
    assert error(both, away + 3 * (alone - away)) < 1e-4


def test_diffusers_own_guidance_is_refused_unless_told_the_prompts_half(tmp_path: Path) -> None:
    pipe, _, file = made("sd", tmp_path)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    call = {"output_type": "latent", "num_inference_steps": 1, "height": 16, "width": 16, "latents": noise}
    answers: list[Tensor] = []
    pipe.unet.register_forward_hook(lambda _, __, answer: answers.append(answer[0]))
    pipe(PROMPTS, guidance_scale=3.0, **call)
    with load_guidance_adapter(pipe, file, 5, rows="second half"):
        pipe(PROMPTS, guidance_scale=3.0, **call)
    with load_guidance_adapter(pipe, file, 5):
        pipe(PROMPTS, guidance_scale=1.0, **call)
        with pytest.raises(OneStepError, match="guidance_scale=1, or say which half"):
            pipe(PROMPTS, guidance_scale=3.0, **call)
    plain, guided, alone = answers
    assert error(guided[:2], plain[:2]) < 1e-5 and error(guided[2:], alone) < 1e-5 and error(plain[2:], alone) > 1e-2


def test_kleins_own_guidance_is_refused(tmp_path: Path) -> None:
    """Its negative has a forward of its own."""
    pipe, _, file = made("klein", tmp_path)
    with (
        load_guidance_adapter(pipe, file, 5, rows="first half"),
        pytest.raises(OneStepError, match="call it with guidance_scale=1"),
    ):
        pipe(prompt=PROMPTS, guidance_scale=3.0, num_inference_steps=1, **CALL)


def test_z_images_own_guidance_puts_the_prompt_first(tmp_path: Path) -> None:
    """Its prompts are lists of tokens of several lengths, and it is told what is left of the noise."""
    pipe, _, file = made("z_image", tmp_path)
    pipe.set_progress_bar_config(disable=True)
    noise, prompts = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), ["a cat", "a red dog " * 12]
    call = {**CALL, "num_inference_steps": 1, "latents": noise}
    answers: list[Tensor] = []
    pipe.transformer.register_forward_hook(lambda _, __, answer: answers.append(torch.stack(answer[0])))
    pipe(list(prompts), guidance_scale=2.0, **call)
    with load_guidance_adapter(pipe, file, 5, rows="first half"):
        pipe(list(prompts), guidance_scale=2.0, **call)
    with load_guidance_adapter(pipe, file, 5):
        pipe(list(prompts), guidance_scale=0.0, **call)
        with pytest.raises(OneStepError, match="guidance_scale=0, or say which half"):
            pipe("a cat", guidance_scale=1.0, **CALL)
    plain, guided, alone = answers
    assert error(guided[2:], plain[2:]) < 1e-5 and error(guided[:2], alone) < 1e-5 and error(plain[:2], alone) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("name", narrowed(["z_image", "klein", "krea2"], "z_image", "krea2"))
def test_beside_a_negative_it_reads_the_prompt_alone(name: str, tmp_path: Path) -> None:
    """In either order; NAG away from the prompt itself is none, so that the adapter alone is left."""
    pipe, _, file = made(name, tmp_path)
    told: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 0.0, **CALL}

    def draw() -> Tensor:
        images: Tensor = pipe(prompt="a cat", generator=torch.Generator().manual_seed(1), **told).images
        return images

    pipe.set_progress_bar_config(disable=True)
    with load_guidance_adapter(pipe, file, 5):
        wanted = draw()
        with steered(pipe, "a cat", "nag"):
            assert error(draw(), wanted) < 1e-4
    with steered(pipe, "a cat", "nag"), load_guidance_adapter(pipe, file, 5):
        assert error(draw(), wanted) < 1e-4
    with steered(pipe, "red", "nag"), load_guidance_adapter(pipe, file, 5):
        assert error(draw(), wanted) > 1e-3


def test_flux_own_guidance_is_refused(tmp_path: Path) -> None:
    pipe, _, file = made("flux", tmp_path)
    pipe.set_progress_bar_config(disable=True)
    call = {"output_type": "latent", "num_inference_steps": 1, "height": 16, "width": 16, "negative_prompt": "dog"}
    with load_guidance_adapter(pipe, file):
        pipe("a cat", **call)
        with pytest.raises(OneStepError, match="true_cfg_scale=1"):
            pipe("a cat", true_cfg_scale=2.0, **call)


def test_bad_calls_are_said(tmp_path: Path) -> None:
    pipe, _, file = made("sd", tmp_path)
    ours = OneStepPipeline.from_pipe(pipe)
    told = {"recipe": recipe_of("sd"), "seed": 1, **CALL}
    with pytest.raises(OneStepError, match="guidance is 5, and no adapter has it: call load_guidance_adapter"):
        ours("a cat", guidance=5, **told)
    with pytest.raises(OneStepError, match="guidance is nan: it must lie in 1"):
        ours.load_guidance_adapter(file, guidance=float("nan"))
    ours.load_guidance_adapter(file)
    with pytest.raises(OneStepError, match="guidance is 0.5: it must lie in 1"):
        ours("a cat", guidance=0.5, **told)
    with pytest.raises(OneStepError, match="rows is 'last': choose one of all, first half, second half"):
        load_guidance_adapter(pipe, file, rows="last")  # type: ignore[arg-type]
    with (
        load_guidance_adapter(pipe, file, rows="first half"),
        pytest.raises(OneStepError, match="batch has 3 rows, no two halves"),
    ):
        ours(["a", "b", "c"], **told)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())
