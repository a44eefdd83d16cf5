"""callback_on_step_end, interrupt and guidance that changes, as diffusers' own pipelines have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.callbacks import SD3CFGCutoffCallback, SDCFGCutoffCallback, SDXLCFGCutoffCallback
from tiny_pipelines import make
from torch import Tensor

from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.pipelines.one_step import OneStepPipeline

CALL: dict[str, Any] = {"width": 16, "height": 16, "output_type": "latent", "seed": 3}


def recipe(kind: str, steps: int = 3, **more: Any) -> Recipe:
    family = kind if kind in ("sd3", "flux") else "unet"
    times = tuple((1000.0 if family != "unet" else 999.0) * left / steps for left in range(steps, 0, -1))
    times = times if family != "unet" else tuple(float(round(time)) for time in times)
    return Recipe(times, renoise=True, family=family, **more)


PLAIN = [(kind, None) for kind in ("sd", "sdxl", "sd3", "flux")]
GUIDED = [(kind, 3.0) for kind in ("sd", "sdxl", "sd3")]


@pytest.mark.parametrize(("kind", "guidance"), PLAIN + GUIDED)
def test_it_sees_what_the_familys_own_callback_sees(kind: str, guidance: float | None) -> None:
    """Step, time and every tensor of the plain pipeline's callback under the scheduler that we print: 1e-5."""
    pipe, seen = make(kind), {"ours": [], "plain": []}
    ours = OneStepPipeline.from_pipe(pipe)
    chosen = recipe(kind, guidance=guidance or 1.0)
    names = list(ours._callback_tensor_inputs)
    assert names == pipe._callback_tensor_inputs[: len(names)] and len(names) >= 2

    def note(which: str) -> Any:
        def note_step(owner: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            assert sorted(tensors) == sorted(names) and owner.num_timesteps == 3
            seen[which].append((step, float(time), {name: value for name, value in tensors.items()}))
            return tensors

        return note_step

    inputs = {"callback_on_step_end_tensor_inputs": names}
    ours("a cat", recipe=chosen, callback_on_step_end=note("ours"), **inputs, **CALL)
    arguments = ours.diffusers_settings(chosen).apply(pipe)
    torch.manual_seed(3)
    sizes = {name: CALL[name] for name in ("width", "height", "output_type")}
    pipe("a cat", callback_on_step_end=note("plain"), **inputs, **{**sizes, **arguments})
    assert [step for step, *_ in seen["ours"]] == [0, 1, 2]
    for (step, time, mine), (again, plain_time, theirs) in zip(seen["ours"], seen["plain"], strict=True):
        assert step == again and time == pytest.approx(plain_time, rel=1e-5)
        for name in names:
            expected = theirs[name]
            if name == "latents" and kind == "flux":
                expected = pipe._unpack_latents(expected, 16, 16, pipe.vae_scale_factor)
            if expected is None or mine[name] is None:
                assert name == "negative_prompt_embeds" and guidance is None
                continue
            assert float((mine[name] - expected).abs().max()) <= 2e-5 * float(expected.std()) + 1e-6, (name, step)


def test_what_it_returns_goes_on() -> None:
    """Latents and prompts: a run whose second step is given another prompt ends as one whose steps are done apart."""
    ours, chosen = OneStepPipeline.from_pipe(make("sd")), recipe("sd", 2)
    other = ours.encode_prompt("red dog")[0]

    def swap(_: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": torch.zeros_like(tensors["latents"]), "prompt_embeds": other}

    names = ["latents", "prompt_embeds"]
    found: list[Tensor] = []

    def watch(owner: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found.append(tensors["latents"])
        return swap(owner, step, time, tensors) if step == 0 else tensors

    last = ours("a cat", recipe=chosen, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=names, **CALL)
    alone = Recipe((chosen.timesteps[1],), family="unet")
    noise = torch.zeros(1, 4, 8, 8)
    expected = ours("red dog", recipe=alone, latents=noise, **{**CALL, "seed": None}).images
    torch.testing.assert_close(last.images, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], last.images)
    with_zeros = ours(
        "a cat",
        recipe=chosen,
        callback_on_step_end=lambda _, step, time, tensors: {"latents": 0 * tensors["latents"]},
        **CALL,
    )
    assert float(with_zeros.images.abs().max()) == 0


def test_interrupt_ends_with_the_latents_of_its_step() -> None:
    ours, seen = OneStepPipeline.from_pipe(make("sd")), []

    def stop(owner: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"])
        owner._interrupt = step == 1
        return tensors

    found = ours("a cat", recipe=recipe("sd"), callback_on_step_end=stop, **CALL).images
    assert len(seen) == 2
    torch.testing.assert_close(found, seen[1])
    # the next call begins anew
    assert ours("a cat", recipe=recipe("sd"), **CALL).images.shape == found.shape and not ours.interrupt


CUTOFFS = {"sd": SDCFGCutoffCallback, "sdxl": SDXLCFGCutoffCallback, "sd3": SD3CFGCutoffCallback}


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("kind", CUTOFFS)
def test_diffusers_own_callbacks_turn_guidance_off(kind: str, steered: bool) -> None:
    """From the first step on: as the plain pipeline with that callback; the doubled batch ends, but for what acts on
    half of it."""
    pipe, batches = make(kind), []
    ours, chosen = OneStepPipeline.from_pipe(pipe), recipe(kind, guidance=3.0)
    network = pipe.transformer if kind == "sd3" else pipe.unet
    cutoff = CUTOFFS[kind](cutoff_step_ratio=None, cutoff_step_index=0)
    more = {"steering": "nag", "scale": 1.0, "negative_prompt": "red"} if steered else {}
    handle = network.register_forward_hook(lambda _, given, answer: batches.append(len(answer[0])))
    found = ours("a cat", recipe=chosen, callback_on_step_end=cutoff, **more, **CALL).images
    handle.remove()
    assert batches == ([2, 2, 2] if steered else [2, 1, 1]) and ours.guidance_scale == 0
    arguments = ours.diffusers_settings(chosen).apply(pipe)
    torch.manual_seed(3)
    sizes = {name: CALL[name] for name in ("width", "height", "output_type")}
    arguments |= {"negative_prompt": "red"} if steered else {}
    plain = pipe("a cat", callback_on_step_end=cutoff, **{**sizes, **arguments}).images
    assert float((found - plain).abs().max()) <= 2e-5 * float(plain.std())


def test_guidance_may_be_raised_and_is_told() -> None:
    ours, chosen = OneStepPipeline.from_pipe(make("sd")), recipe("sd", guidance=2.0)

    def raised(owner: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        owner._guidance_scale += 1
        return tensors

    plain = ours("a cat", recipe=chosen, **CALL).images
    found = ours("a cat", recipe=chosen, callback_on_step_end=raised, **CALL).images
    assert ours.guidance_scale == 5 and not torch.allclose(found, plain, atol=1e-3)
    with pytest.raises(OneStepError, match="began without"):
        ours("a cat", recipe=recipe("sd"), callback_on_step_end=raised, **CALL)


def test_guidance_scale_and_steps_of_a_call() -> None:
    """guidance_scale is the recipe's guidance; up to 1 it is none; of Flux it is what is embedded."""
    ours = OneStepPipeline.from_pipe(make("sd"))
    for scale, same in ((3.0, 3.0), (0.0, 1.0), (1, 1.0)):
        found = ours("a", recipe=recipe("sd", 2), negative_prompt="red", guidance_scale=scale, **CALL).images
        expected = ours("a", recipe=recipe("sd", 2, guidance=same), negative_prompt="red", **CALL).images
        torch.testing.assert_close(found, expected)
    flux = OneStepPipeline.from_pipe(make("flux"))
    usual = flux("a", recipe=recipe("flux", 1), **CALL).images
    torch.testing.assert_close(flux("a", recipe=recipe("flux", 1), guidance_scale=3.5, **CALL).images, usual)
    assert not torch.allclose(flux("a", recipe=recipe("flux", 1), guidance_scale=1.0, **CALL).images, usual, atol=1e-4)
    assert ours("a", recipe=recipe("sd", 2), num_inference_steps=2, **CALL).images.shape == (1, 4, 8, 8)


def bad(value: Any) -> Any:
    return lambda _, step, time, tensors: value


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing returned": ({"callback_on_step_end": bad(None)}, "returned None"),
    "latents of another shape": ({"callback_on_step_end": bad({"latents": torch.zeros(1, 4, 4, 4)})}, "keep the shape"),
    "a row too few": ({"callback_on_step_end": bad({"prompt_embeds": torch.zeros(1, 5, 32)})}, "1 rows for 2 pictures"),
    "an unknown tensor": ({"callback_on_step_end": bad({"noise": torch.zeros(2)})}, "returned noise"),
    "an unknown name": (
        {"callback_on_step_end": bad({}), "callback_on_step_end_tensor_inputs": ["pooled_prompt_embeds"]},
        "holds 'pooled_prompt_embeds': choose from latents, prompt_embeds",
    ),
    "other steps": ({"num_inference_steps": 30}, "num_inference_steps is 30, and the recipe has 2 steps"),
    "a negative scale": ({"guidance_scale": -1}, "guidance_scale is -1"),
    "a scale that is a text": ({"guidance_scale": "7"}, "guidance_scale is '7'"),
    "a transformer's arguments": ({"joint_attention_kwargs": {"scale": 1.0}}, "is a transformer's"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    changes, why = REFUSED[case]
    with pytest.raises(OneStepError, match=why):
        OneStepPipeline.from_pipe(make("sd"))(["a cat", "red dog"], recipe=recipe("sd", 2), **changes, **CALL)
