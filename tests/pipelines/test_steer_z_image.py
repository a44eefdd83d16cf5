"""Z-Image steered in diffusers: one stream with two texts is the doubled form, whatever lengths the texts have."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from narrowed import narrowed, thinned
from one_stream_oracle import doubled_stream
from small_networks import seeded
from steered_networks import SCALES, away, pipe_of, run, texts
from tiny_pipelines import make
from torch import Tensor

from onestep.core.cond import Cond
from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.pipelines import OneStepPipeline, steered
from onestep.pipelines.encode import encode_text

# of the largest value: diffusers turns queries and keys in float32
EXACT = 1e-6


def close(found: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def ragged(lengths: list[int], seed: int) -> list[Tensor]:
    draw = seeded(seed)
    return [draw(length, 24) for length in lengths]


def cond_of(rows: list[Tensor]) -> Cond:
    return Cond.concat([Cond(row[None]) for row in rows])


def of_sizes(prompts: list[int], width: int = 12) -> dict[str, Any]:
    """Inputs of as many rows. A picture of 8 x ``width`` latents has 2 ``width`` tokens."""
    draw = seeded(2)
    x = draw(len(prompts), 16, 8, width)
    return {"x": x, "time": torch.linspace(0.8, 0.2, len(prompts)).double(), "text": ragged(prompts, 3)}


# tokens of the prompts and of the negatives, each filled up to 32 or 64 or 96
LENGTHS = {
    "alike": ([5, 5], [9, 9]),
    "filled exactly": ([32, 32], [32, 32]),
    "prompt longer": ([40, 40], [3, 3]),
    "negative longer": ([4, 4], [70, 70]),
    "each row its own": ([5, 40, 33], [40, 6, 64]),
}


@pytest.mark.parametrize(("lengths", "mode"), thinned(3, LENGTHS, SCALES))
def test_one_picture_stream_is_the_doubled_form(lengths: str, mode: str) -> None:
    prompts, negatives = LENGTHS[lengths]
    pipe, network = pipe_of("z_image")
    inputs, negative, empty = of_sizes(prompts), ragged(negatives, 7), texts(1, 6, seed=8)
    others = [negative, [empty[0]] * len(prompts)] if mode == "perp" else [negative]
    expected = doubled_stream(network, mode, inputs, others)
    plain = run("z_image", network, inputs)
    with away(pipe, cond_of(negative), mode):
        found = run("z_image", network, inputs)
    close(found, expected)
    assert (found - plain).abs().max() > 1e-2 * plain.abs().max()
    elsewhere = doubled_stream(network, mode, inputs, [[row + 1e-3 for row in negative], *others[1:]])
    with pytest.raises(AssertionError):
        close(found, elsewhere)


@pytest.mark.parametrize("mode", ["nag", "perp"])
def test_each_text_is_to_the_picture_as_if_alone(mode: str) -> None:
    """Where nothing fills the picture up, each row of the doubled form may lie where the network itself puts it."""
    pipe, network = pipe_of("z_image")
    inputs, negative = of_sizes([5, 40], width=16), ragged([40, 6], 7)
    others = [negative, [texts(1, 6, seed=8)[0]] * 2] if mode == "perp" else [negative]
    expected = doubled_stream(network, mode, inputs, others, placed=False)
    with away(pipe, cond_of(negative), mode):
        close(run("z_image", network, inputs), expected)


@pytest.mark.parametrize(
    ("rows", "mode"),
    narrowed(product(["first half", "second half"], SCALES), ("first half", "perp"), ("second half", "vsf")),
)
def test_half_of_a_batch_is_steered(rows: Any, mode: str) -> None:
    """Of prompts and negatives of several lengths, each row its own."""
    pipe, network = pipe_of("z_image")
    inputs, negative = of_sizes([5, 40]), cond_of(ragged([40, 6], 7))
    twice = {name: torch.cat([inputs[name]] * 2) for name in ("x", "time")} | {"text": inputs["text"] * 2}
    plain = run("z_image", network, inputs)
    with away(pipe, negative, mode):
        acting = run("z_image", network, inputs)
    with away(pipe, negative, mode, rows=rows):
        found = run("z_image", network, twice)
    close(found, torch.cat([acting, plain] if rows == "first half" else [plain, acting]))


def test_a_control_net_acts_beside_it() -> None:
    """On the picture and the prompt; the negative's tokens are no prompt's."""
    pipe, network = pipe_of("z_image")
    inputs, negative, residual = of_sizes([5, 9]), ragged([9, 4], 7), seeded(4)(2, 64, 288)
    expected = doubled_stream(network, "nag", inputs, [negative], residual=residual)
    with away(pipe, cond_of(negative), "nag"):
        found, without = (
            run("z_image", network, inputs, **more) for more in ({"controlnet_block_samples": {0: residual}}, {})
        )
    close(found, expected)
    assert (found - without).abs().max() > 1e-2 * found.abs().max()


def test_away_from_the_prompt_itself_nag_changes_nothing() -> None:
    """So the prompt is filled up, placed and refined as the network does it."""
    pipe, network = pipe_of("z_image")
    inputs = of_sizes([5, 40])
    plain = run("z_image", network, inputs)
    with away(pipe, cond_of(inputs["text"]), "nag"):
        close(run("z_image", network, inputs), plain)


def test_a_compiled_network_runs_uncompiled_within() -> None:
    """Its hooks would not be asked for."""
    pipe, network = pipe_of("z_image", torch.float32)
    negative, compiled = cond_of(ragged([6], 7)).to(torch.float32), torch.compile(network, backend="eager")
    with away(pipe, negative, "nag"):
        expected = run("z_image", network)
    pipe.transformer = compiled
    with away(pipe, negative, "nag"):
        assert torch.equal(run("z_image", compiled), expected)
    assert compiled.__dict__["forward"] is not network


# -- pipelines --------------------------------------------------------------------------------------------------------

PROMPTS, NEGATIVES = ["a cat", "red dog " + 20 * "a cat "], ["red", "a red dog " + 10 * "cat "]
CALL: dict[str, Any] = {"width": 16, "height": 16, "output_type": "latent"}


@pytest.mark.parametrize("mode", narrowed(SCALES, "nag", "vsf"))
def test_the_familys_own_pipeline_draws_the_same(mode: str) -> None:
    """OneStepPipeline's arguments, and `steered` around ZImagePipeline: two prompts with a negative each, whose lengths
    differ, two pictures of each: 1e-5 of the latents' std."""
    pipe, ours = make("z_image"), OneStepPipeline.from_pipe(make("z_image"))
    recipe = Recipe((1000.0,), family="z_image")
    call = {**CALL, "num_images_per_prompt": 2}
    given = {"recipe": recipe, "negative_prompt": NEGATIVES}
    drawn = ours(list(PROMPTS), steering=mode, generator=torch.Generator().manual_seed(3), **given, **call).images
    without = ours(list(PROMPTS), seed=3, recipe=recipe, **call).images
    arguments = ours.diffusers_settings(recipe).apply(pipe)
    torch.manual_seed(3)
    encoded, _ = pipe.encode_prompt(list(NEGATIVES), do_classifier_free_guidance=False)
    with steered(pipe, encoded, mode, empty=encode_text(pipe, [""])):
        plain = pipe(list(PROMPTS), **{**call, **arguments}).images
    assert (drawn - plain).abs().max() <= 1e-5 * plain.std() < 1e-2 * plain.std() < (drawn - without).abs().max()


def test_diffusers_own_guidance_puts_the_prompt_first() -> None:
    pipe = make("z_image")
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    call = {**CALL, "num_inference_steps": 1, "latents": noise}
    answers: list[Tensor] = []
    pipe.transformer.register_forward_hook(lambda _, __, answer: answers.append(torch.stack(answer[0])))
    pipe(list(PROMPTS), guidance_scale=2.0, **call)
    with steered(pipe, NEGATIVES, "nag", rows="first half"):
        pipe(list(PROMPTS), guidance_scale=2.0, **call)
    with steered(pipe, NEGATIVES, "nag"):
        pipe(list(PROMPTS), guidance_scale=0.0, **call)
    plain, guided, alone = answers
    close(guided[2:], plain[2:], 1e-5)
    close(guided[:2], alone, 1e-5)
    assert (plain[:2] - alone).abs().max() > 1e-2 * alone.std()


@pytest.mark.parametrize(
    ("rows", "call", "word"),
    [
        ("all", {}, 'guidance_scale=0, or say .*rows="first half"'),
        ("all", {"guidance_scale": 1.0}, 'guidance_scale=0, or say .*rows="first half"'),
        ("first half", {"guidance_scale": 2.0, "cfg_truncation": 0.5}, "call it with cfg_truncation=1"),
    ],
)
def test_a_pipelines_own_guidance_is_not_steered_unawares(rows: Any, call: dict[str, Any], word: str) -> None:
    pipe = make("z_image")
    with steered(pipe, "red", "nag", rows=rows), pytest.raises(OneStepError, match=word):
        pipe("a cat", num_inference_steps=2, **CALL, **call)


@pytest.mark.parametrize(
    ("start", "end", "acting"), [(0.0, 1.0, [1, 1, 1, 1]), (0.2, 0.6, [0, 1, 1, 0]), (0.25, 1.0, [0, 1, 1, 1])]
)
def test_it_acts_in_its_share_of_the_schedule(start: float, end: float, acting: list[int]) -> None:
    """The network is told what is left of the noise, 1 - sigma; steps lie at shares 0, 1/4, 1/2 and 3/4."""
    pipe, tokens = make("z_image", shift=1.0), []
    pipe.transformer.context_refiner[0].register_forward_hook(lambda _, args, __: tokens.append(args[0].shape[1]))
    with steered(pipe, "red", "nag", start=start, end=end):
        pipe("a cat", num_inference_steps=4, guidance_scale=0.0, **CALL)
    assert tokens == [64 if acts else 32 for acts in acting]
