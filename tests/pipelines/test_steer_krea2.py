"""Krea 2 steered in diffusers: texts of several lengths in one batch, and its own pipeline, whose padding lies in the
midst of each prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from narrowed import narrowed
from small_networks import CASES, inputs_of, seeded
from steered_networks import SCALES, away, pipe_of, run
from tiny_pipelines import make
from torch import Tensor

from onestep.core.cond import Cond
from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.pipelines import OneStepPipeline, steered
from onestep.pipelines.encode import encode_text

# of the largest value: diffusers norms queries and keys in float32
EXACT = 3e-6


def close(found: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def ragged(lengths: list[int], seed: int) -> Cond:
    draw = seeded(seed)
    return Cond.concat([Cond(draw(1, length, 24)) for length in lengths])


def masked(network: Any, inputs: dict[str, Tensor], mask: Tensor) -> Tensor:
    with torch.no_grad():
        return CASES["krea2"].run(lambda *a, **k: network(*a, **k, encoder_attention_mask=mask), inputs)


@pytest.mark.parametrize("mode", SCALES)
def test_prompts_and_negatives_of_several_lengths_are_each_alone(mode: str) -> None:
    """Padding anywhere in a prompt, as its pipeline has it in the midst."""
    pipe, network = pipe_of("krea2")
    inputs, negatives = inputs_of("krea2"), ragged([9, 4], 7)
    text, mask = seeded(3)(2, 8, 24), torch.ones(2, 8, dtype=torch.bool)
    mask[0, 2:5] = mask[1, 6] = False
    alone = []
    for row in range(2):
        one = {name: value[row : row + 1] for name, value in inputs.items()} | {"text": text[row, mask[row]][None]}
        with away(pipe, Cond(negatives.text[row, negatives.mask[row]][None]), mode):  # type: ignore[index]
            alone.append(run("krea2", network, one))
    with away(pipe, negatives, mode):
        close(masked(network, inputs | {"text": text}, mask), torch.cat(alone))


@pytest.mark.parametrize("rows", ["first half", "second half"])
def test_half_of_a_batch_of_several_lengths_is_steered(rows: Any) -> None:
    pipe, network = pipe_of("krea2")
    inputs, negatives, mask = inputs_of("krea2"), ragged([9, 4], 7), torch.ones(4, 5, dtype=torch.bool)
    mask[0, 3:] = mask[2, 3:] = False
    twice = {name: torch.cat([value] * 2) for name, value in inputs.items()}
    plain = masked(network, inputs, mask[:2])
    with away(pipe, negatives, "nag"):
        acting = masked(network, inputs, mask[:2])
    with away(pipe, negatives, "nag", rows=rows):
        found = masked(network, twice, mask)
    close(found, torch.cat([acting, plain] if rows == "first half" else [plain, acting]))


def test_away_from_the_prompt_itself_nag_changes_nothing() -> None:
    """So the prompt is refined and gated as the network does it."""
    pipe, network = pipe_of("krea2")
    inputs = inputs_of("krea2")
    plain = run("krea2", network, inputs)
    with away(pipe, Cond(inputs["text"]), "nag"):
        close(run("krea2", network, inputs), plain)


# -- pipelines --------------------------------------------------------------------------------------------------------

PROMPTS, NEGATIVES = ["a cat", "red dog " + 5 * "a cat "], ["red", "a red dog " + 3 * "cat "]
CALL: dict[str, Any] = {"width": 32, "height": 32, "output_type": "latent"}


@pytest.mark.parametrize("mode", narrowed(SCALES, "perp", "vsf"))
def test_the_familys_own_pipeline_draws_the_same(mode: str) -> None:
    """OneStepPipeline's arguments, and `steered` around Krea2Pipeline: two prompts with a negative each, whose lengths
    differ, two pictures of each: 1e-5 of the latents' std."""
    pipe, ours = make("krea2"), OneStepPipeline.from_pipe(make("krea2"))
    recipe = Recipe((1000.0,), family="krea2")
    call = {**CALL, "num_images_per_prompt": 2}
    given = {"recipe": recipe, "negative_prompt": NEGATIVES}
    drawn = ours(list(PROMPTS), steering=mode, generator=torch.Generator().manual_seed(3), **given, **call).images
    without = ours(list(PROMPTS), seed=3, recipe=recipe, **call).images
    arguments = ours.diffusers_settings(recipe).apply(pipe)
    with steered(pipe, ours.encode_prompt(list(NEGATIVES))[0], mode, empty=encode_text(pipe, [""])):
        draw = torch.Generator().manual_seed(3)
        plain = pipe(list(PROMPTS), generator=draw, **{**call, **arguments}).images
    plain = pipe._unpack_latents(plain, 32, 32)[:, :, 0]
    assert (drawn - plain).abs().max() <= 1e-5 * plain.std() < 1e-2 * plain.std() < (drawn - without).abs().max()


def test_a_pipelines_own_guidance_is_not_steered_unawares() -> None:
    """Its negative is a forward of its own."""
    pipe = make("krea2")
    for rows in ("all", "first half"):
        with steered(pipe, "red", "nag", rows=rows), pytest.raises(OneStepError, match="with guidance_scale=0"):
            pipe("a cat", num_inference_steps=2, **CALL)


@pytest.mark.parametrize(
    ("distilled", "start", "end", "acting"),
    [(False, 0.3, 1.0, [0, 1, 1, 1]), (True, 0.3, 1.0, [0, 0, 1, 1]), (True, 0.0, 0.4, [1, 1, 0, 0])],
)
def test_it_acts_in_its_share_of_the_schedule(distilled: bool, start: float, end: float, acting: list[int]) -> None:
    """Turbo's steps lie at 0, 1/4, 1/2 and 3/4 of its schedule; Raw's, of so small a picture, at 0, 0.34, 0.61 and 0.82
    of a megapixel's. A steered prompt is without its padding."""
    pipe, tokens = make("krea2", distilled=distilled), []
    pipe.transformer.text_fusion.register_forward_hook(lambda _, args, __: tokens.append(args[0].shape[1]))
    with steered(pipe, "red", "nag", start=start, end=end):
        pipe("a cat", num_inference_steps=4, guidance_scale=0.0, **CALL)
    assert [int(count < 512) for count in tokens] == acting
