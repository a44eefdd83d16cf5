"""Negative steering as a person types it: OneStepPipeline's arguments, `steered` around diffusers' own pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from narrowed import narrowed
from tiny_pipelines import make
from torch import Tensor

from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.pipelines import OneStepPipeline, Steering, steered

PROMPTS, NEGATIVES = ["a cat", "red dog"], ["red", "dog"]
CALL: dict[str, Any] = {"width": 16, "height": 16, "output_type": "latent"}
FAMILIES = {"sd": "unet", "sdxl": "unet", "sd3": "sd3", "flux": "flux"}
STEERINGS: list[Any] = ["nasa", "nag", "vsf", "perp", Steering("nag", 8.0, tau=4.0, alpha=0.5, order=2)]


def recipe_for(name: str, **more: Any) -> Recipe:
    family = FAMILIES[name]
    return Recipe((999.0,) if family == "unet" else (1000.0,), family=family, **more)


def tokens(name: str, pipe: Any, prompts: list[str]) -> Tensor:
    """By the pipeline's own encode_prompt, as the documentation of `steered` has it."""
    with torch.no_grad():
        if name == "sd":
            return pipe.encode_prompt(prompts, "cpu", 1, False)[0]
        if name == "sdxl":
            return pipe.encode_prompt(prompts, do_classifier_free_guidance=False)[0]
        if name == "flux":
            return pipe.encode_prompt(prompts, None)[0]
        return pipe.encode_prompt(prompts, None, None, max_sequence_length=0)[0]  # it has no T5


def unpacked(pipe: Any, images: Tensor) -> Tensor:
    return pipe._unpack_latents(images, 16, 16, pipe.vae_scale_factor) if "Flux" in type(pipe).__name__ else images


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.std())


@pytest.mark.parametrize("steering", STEERINGS, ids=str)
def test_scale_and_mode_reach_the_network(steering: Any) -> None:
    ours = OneStepPipeline.from_pipe(make("sd"))
    more = {"recipe": "sd-turbo-1", "seed": 1, "negative_prompt": "red", **CALL}
    usual, strong = (ours("a cat", steering=steering, scale=scale, **more).images for scale in (None, 2.5))
    assert error(strong, usual) > 1e-2


OWN = {
    ("sd", "nasa"): {"scale": 0.25},
    ("sd", "vsf"): {"scale": 1.0, "offset": 0.1},
    ("sdxl", "nag"): {"scale": 3.0, "tau": 2.5, "alpha": 0.5, "order": 1},
    ("sd3", "nag"): {"scale": 5.0, "tau": 2.5, "alpha": 0.125, "order": 1},
    ("sd3", "vsf"): {"scale": 3.5, "offset": 0.1},
    ("flux", "nag"): {"scale": 5.0, "tau": 2.5, "alpha": 0.25, "order": 2},
    ("flux", "vsf"): {"scale": 3.5, "offset": 0.0},
}


@pytest.mark.parametrize(("name", "mode"), OWN)
def test_what_is_not_given_is_the_familys(name: str, mode: str) -> None:
    """Each of its numbers matters: another one draws another picture. A norm is limited where the push is strong."""
    ours, own = OneStepPipeline.from_pipe(make(name)), OWN[name, mode]
    more = {"recipe": recipe_for(name), "seed": 1, "negative_prompt": "red", **CALL}
    usual = ours("a cat", steering=mode, **more).images
    assert torch.equal(usual, ours("a cat", steering=mode, scale=own["scale"], **more).images)
    for number, value in own.items():
        given = own | ({"scale": 60.0} if number in ("tau", "order") else {})
        other = {"order": 3 - value, "tau": 1.05}.get(number, value + 0.2)
        drawn = [
            ours("a cat", steering=Steering(mode, **numbers), **more).images
            for numbers in ({key: given[key] for key in given if key != number}, given, given | {number: other})
        ]
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2]), number


@pytest.mark.parametrize("name", list(FAMILIES))
def test_without_steering_nothing_has_changed(name: str) -> None:
    """At guidance 1 the negative prompt says nothing, and neutral steering draws bit for bit the same."""
    ours = OneStepPipeline.from_pipe(make(name))
    more = {"recipe": recipe_for(name), "seed": 1, **CALL}
    plain = ours("a cat", **more).images
    assert torch.equal(ours("a cat", negative_prompt="red", **more).images, plain)
    assert torch.equal(ours("a cat", negative_prompt="red", steering="nasa", scale=0, **more).images, plain)
    assert not torch.equal(ours("a cat", negative_prompt="red", steering="nasa", **more).images, plain)
    assert torch.equal(ours("a cat", **more).images, plain)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_with_guidance_both_act(name: str) -> None:
    """D_u + k (D_c - D_u), where the prompt's half D_c is steered and the negative's D_u is not."""
    ours = OneStepPipeline.from_pipe(make(name))
    more = {"seed": 1, **CALL}
    steered_alone = ours(PROMPTS, negative_prompt=NEGATIVES, steering="nag", recipe=recipe_for(name), **more).images
    null = ours(NEGATIVES, recipe=recipe_for(name), **more).images
    both = ours(
        PROMPTS, negative_prompt=NEGATIVES, steering="nag", recipe=recipe_for(name, guidance=3.0), **more
    ).images
    assert error(both, null + 3 * (steered_alone - null)) < 1e-4
    single = ours(PROMPTS, negative_prompt="red", recipe=recipe_for(name, guidance=3.0), **more).images
    listed = ours(PROMPTS, negative_prompt=["red", "red"], recipe=recipe_for(name, guidance=3.0), **more).images
    assert error(single, listed) < 1e-5


def test_diffusers_own_guidance_puts_the_prompt_last() -> None:
    pipe = make("sd")
    negative, call = tokens("sd", pipe, ["red"]), {"output_type": "latent", "num_inference_steps": 1, "height": 16}
    call["width"] = 16
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    answers: list[Tensor] = []
    pipe.unet.register_forward_hook(lambda _, __, answer: answers.append(answer[0]))
    pipe(PROMPTS, latents=noise, guidance_scale=3.0, **call)
    with steered(pipe, negative, "nag", rows="second half"):
        pipe(PROMPTS, latents=noise, guidance_scale=3.0, **call)
    with steered(pipe, negative, "nag"):
        pipe(PROMPTS, latents=noise, guidance_scale=1.0, **call)
    plain, guided, alone = answers
    assert error(guided[:2], plain[:2]) < 1e-5 and error(guided[2:], alone) < 1e-5 and error(plain[2:], alone) > 1e-2


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_a_pipelines_own_guidance_is_not_steered_unawares(name: str) -> None:
    """Only its prompt's half may be, and the word says how; without guidance, before or after, nothing stands."""
    pipe = make(name)
    call: dict[str, Any] = {"output_type": "latent", "num_inference_steps": 1, "width": 16, "height": 16}
    call |= {"max_sequence_length": 0} if name == "sd3" else {}
    with steered(pipe, tokens(name, pipe, ["red"]), "nag"):
        pipe("a cat", guidance_scale=1.0, **call)
        with pytest.raises(OneStepError, match='guidance_scale=1, or say .*rows="second half"'):
            pipe("a cat", guidance_scale=3.0, **call)
        pipe("a cat", guidance_scale=1.0, **call)


def test_true_cfg_of_flux_is_refused() -> None:
    pipe = make("flux")
    call: dict[str, Any] = {"output_type": "latent", "num_inference_steps": 2, "width": 16, "height": 16}
    with steered(pipe, tokens("flux", pipe, ["red"]), "nag"):
        pipe("a cat", negative_prompt="dog", true_cfg_scale=1.0, **call)
        with pytest.raises(OneStepError, match="call it with true_cfg_scale=1"):
            pipe("a cat", negative_prompt="dog", true_cfg_scale=2.0, **call)


# the steps lie at shares 0, 1/4, 1/2, 3/4 of the schedule, each end of a range included
RANGES = [
    ((0.0, 1.0), [1, 1, 1, 1]),
    ((0.0, 0.2), [1, 0, 0, 0]),
    ((0.25, 1.0), [0, 1, 1, 1]),
    ((0.2, 0.6), [0, 1, 1, 0]),
    ((0.9, 1.0), [0, 0, 0, 0]),
]


@pytest.mark.parametrize("dtype", narrowed([torch.float32, torch.bfloat16], torch.bfloat16))
@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_it_acts_in_its_share_of_the_schedule(name: str, dtype: torch.dtype) -> None:
    pipe = make(name).to(dtype)
    network = pipe.unet if name == "sd" else pipe.transformer
    negative, lengths = tokens(name, pipe, ["red"]), []
    layer = next(
        module for path, module in network.named_modules() if path.endswith(("attn2.to_k", "context_embedder"))
    )
    layer.register_forward_hook(lambda _, given, __: lengths.append(given[0].shape[1]))
    more: dict[str, Any] = {"max_sequence_length": 0} if name == "sd3" else {}
    call = {"output_type": "latent", "num_inference_steps": 4, "width": 16, "height": 16, "guidance_scale": 1.0}
    call |= {"sigmas": [1.0, 0.75, 0.5, 0.25]} if name != "sd" else {}
    plain = pipe("a cat", generator=torch.Generator().manual_seed(1), **call, **more).images
    usual = lengths[0]
    for (start, end), expected in RANGES:
        lengths.clear()
        with steered(pipe, negative, "nag", start=start, end=end):
            drawn = pipe("a cat", generator=torch.Generator().manual_seed(1), **call, **more).images
        # a U-Net's layer reads the negative by itself, after the positive; the others read both at once
        found = [lengths.count(usual) - 4] if name == "sd" else [int(length != usual) for length in lengths]
        assert found == ([sum(expected)] if name == "sd" else expected)
        assert torch.equal(drawn, plain) == (not any(expected))


def test_an_idle_negative_prompt_is_said(caplog: pytest.LogCaptureFixture) -> None:
    ours = OneStepPipeline.from_pipe(make("sd"))
    for said, told in ((0, {"negative_prompt": "red", "steering": "nag"}), (0, {}), (1, {"negative_prompt": ["red"]})):
        ours("a cat", recipe="sd-turbo-1", seed=1, **told, **CALL)
        assert caplog.text.count("negative prompt does nothing at guidance 1: give steering too") == said


def test_what_does_not_fit_is_said() -> None:
    ours = OneStepPipeline.from_pipe(make("sd"))
    more = {"recipe": "sd-turbo-1", "seed": 1, **CALL}
    plain = ours(PROMPTS, **more).images
    for changes, why in (
        ({"steering": "nasa", "negative_prompt": ["a", "b", "c"]}, "3 negative prompts for 2 prompts"),
        ({"steering": "nasa", "scale": float("nan")}, "scale is nan"),
        ({"steering": "cfg"}, "no steering mode 'cfg'"),
        ({"scale": 3.0}, "nothing is steered"),
    ):
        with pytest.raises(OneStepError, match=why):
            ours(PROMPTS, **changes, **more)
    assert torch.equal(ours(PROMPTS, **more).images, plain)
