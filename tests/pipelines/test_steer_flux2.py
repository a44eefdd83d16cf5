"""FLUX.2 steered in diffusers: each text's tokens are numbered as if it were the only one, with padding or without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
from narrowed import narrowed
from small_networks import inputs_of, seeded
from steered_networks import SCALES, STEERINGS, away, doubled, pipe_of, run, texts
from tiny_pipelines import make
from torch import Tensor

from onestep.core.cond import Cond
from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.pipelines import OneStepPipeline, steered
from onestep.pipelines.encode import encode_text

NEGATIVES = ["red", "a red dog"]
CALL: dict[str, Any] = {"width": 16, "height": 16, "output_type": "latent"}
# the template's own tokens: <im_start> user ... <im_end> <im_start> assistant
AROUND = 5


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-7) -> None:
    """Of the largest value, in float64; FLUX.2 has its rotary positions in float32."""
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("text", ["", *NEGATIVES])
@pytest.mark.parametrize("side", narrowed(["left", "right"], "left"))
def test_a_text_is_encoded_without_padding(side: str, text: str) -> None:
    """What its encoder makes of its own tokens alone, wherever the tokenizer puts the others."""
    pipe = make("klein")
    pipe.tokenizer.padding_side = side
    found, padded = (encode_text(pipe, [text], padded=padded).text for padded in (False, True))
    prompt = pipe.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    ids = torch.tensor([pipe.tokenizer(prompt).input_ids])
    with torch.no_grad():
        states = pipe.text_encoder(ids, output_hidden_states=True).hidden_states
    expected = torch.cat([states[layer] for layer in (9, 18, 27)], 2)
    assert found.shape[1] == AROUND + len(text.split()) and padded.shape[1] == 512
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_texts_without_padding_lie_under_a_mask() -> None:
    found = encode_text(make("klein"), NEGATIVES, padded=False)
    assert found.mask is not None and found.mask.sum(1).tolist() == [AROUND + 1, AROUND + 3]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_without_padding_lies_where_the_padded_one_has_it(side: str) -> None:
    """Numbered from 0 where padding lies behind it; to the last of 512 places where it lies in front."""
    pipe, network = pipe_of("flux2")
    pipe.tokenizer.padding_side = side
    inputs, negative = {**inputs_of("flux2"), "text": seeded(5)(2, 512, 24)}, texts(1, 9)
    expected, elsewhere = (
        doubled("flux2", network, "vsf", negative, inputs, last=last) for last in (side == "left", side == "right")
    )
    with away(pipe, negative, "vsf"):
        found = run("flux2", network, inputs)
    close(found, expected)
    with pytest.raises(AssertionError):
        close(found, elsewhere)


def test_negatives_of_several_lengths_have_no_one_place_at_a_texts_end() -> None:
    pipe, _ = pipe_of("flux2")
    pipe.tokenizer.padding_side = "left"
    negative = Cond(texts(2, 9), torch.arange(9) < torch.tensor([[9], [4]]))
    with pytest.raises(OneStepError, match="counts from a text's end: give one negative"), away(pipe, negative, "vsf"):
        pass


def test_pooled_text_beside_the_tokens_is_not_looked_at() -> None:
    pipe, network = pipe_of("flux2")
    with away(pipe, texts(1, 6), "nag"):
        expected = run("flux2", network)
    with steered(pipe, Cond(texts(1, 6), pooled=texts(1, 1)[:, 0]), STEERINGS["nag"]):
        assert torch.equal(run("flux2", network), expected)


@pytest.mark.parametrize("mode", narrowed(SCALES, "vsf"))
def test_the_familys_own_pipeline_draws_the_same(mode: str) -> None:
    """OneStepPipeline's arguments, and `steered` around Flux2KleinPipeline: two prompts with a negative each, two
    pictures of each: 1e-4 of the largest value."""
    pipe, ours = make("klein"), OneStepPipeline.from_pipe(make("klein"))
    recipe, prompts = Recipe((1000.0,), family="flux2"), ["a cat", "red dog"]
    call = {**CALL, "output_type": "np", "num_images_per_prompt": 2}
    given = {"recipe": recipe, "negative_prompt": NEGATIVES}
    drawn = ours(prompts, steering=mode, generator=torch.Generator().manual_seed(3), **given, **call).images
    without = ours(prompts, seed=3, recipe=recipe, **call).images
    arguments = ours.diffusers_settings(recipe).apply(pipe)
    torch.manual_seed(3)
    with steered(pipe, encode_text(pipe, NEGATIVES, padded=mode != "vsf"), mode, empty=encode_text(pipe, [""])):
        plain = pipe(prompt=prompts, **{**call, **arguments}).images
    assert np.abs(drawn - plain).max() <= 1e-4 * np.abs(plain).max() < 1e-2 < np.abs(drawn - without).max()


@pytest.mark.parametrize("mode", narrowed(SCALES, "vsf"))
def test_a_text_is_enough(mode: str) -> None:
    """`steered` encodes what it is given as its mode's authors do, the empty text too."""
    pipe, found = make("klein"), []
    call = {**CALL, "num_inference_steps": 1, "guidance_scale": 1.0}
    own, other = (encode_text(pipe, NEGATIVES[1:], padded=padded) for padded in (mode != "vsf", mode == "vsf"))
    for negative in (NEGATIVES[1], own, other):
        with steered(pipe, negative, mode, empty=encode_text(pipe, [""])):
            found.append(pipe(prompt="a cat", generator=torch.Generator().manual_seed(1), **call).images)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("rows", ["all", "first half"])
def test_kleins_own_guidance_is_not_steered_unawares(rows: Any) -> None:
    """Its negative has a forward of its own; a distilled klein has none."""
    pipe, call = make("klein"), {**CALL, "num_inference_steps": 1}
    with steered(pipe, "red", "nag", rows=rows), pytest.raises(OneStepError, match="call it with guidance_scale=1"):
        pipe(prompt="a cat", guidance_scale=4.0, **call)
    pipe = make("klein", distilled=True)
    with steered(pipe, "red", "nag"):
        pipe(prompt="a cat", guidance_scale=4.0, **call)


@pytest.mark.parametrize(
    ("start", "end", "acting"), [(0.0, 1.0, [1, 1, 1]), (0.0, 0.2, [1, 0, 0]), (0.2, 1, [0, 1, 1])]
)
def test_it_acts_in_its_share_of_the_schedule(start: float, end: float, acting: list[int]) -> None:
    """Steps lie at shares 0, 1/2 and 3/4."""
    pipe, tokens = make("klein"), []
    pipe.transformer.context_embedder.register_forward_hook(lambda _, args, __: tokens.append(args[0].shape[1]))
    pipe.scheduler.register_to_config(use_dynamic_shifting=False, shift=1.0)
    with steered(pipe, "red", "nag", start=start, end=end):
        pipe(prompt="a cat", sigmas=[1.0, 0.5, 0.25], num_inference_steps=3, guidance_scale=1.0, **CALL)
    assert tokens == [1024 if acts else 512 for acts in acting]


@pytest.mark.parametrize(
    ("start", "end", "acting"), [(0.0, 0.4, [1, 1, 0, 0]), (0.4, 1.0, [0, 0, 1, 1]), (0.1, 0.6, [0, 1, 1, 0])]
)
def test_it_acts_in_its_share_of_the_steps_of_its_published_scheduler(
    start: float, end: float, acting: list[int]
) -> None:
    """Which leaves the shift to the pipeline, by steps and size. Steps lie at shares 0, 1/4, 1/2 and 3/4."""
    pipe, tokens = make("klein"), []
    assert pipe.scheduler.config.use_dynamic_shifting
    pipe.transformer.context_embedder.register_forward_hook(lambda _, args, __: tokens.append(args[0].shape[1]))
    with steered(pipe, "red", "nag", start=start, end=end):
        pipe(prompt="a cat", num_inference_steps=4, guidance_scale=1.0, **CALL)
    assert tokens == [1024 if acts else 512 for acts in acting]


def test_a_cache_of_reference_pictures_is_refused_by_name() -> None:
    pipe, network = pipe_of("flux2")
    kinds = {True: Flux2KVParallelSelfAttnProcessor(), False: Flux2KVAttnProcessor()}
    network.set_attn_processor({name: kinds[name.startswith("single")] for name in network.attn_processors})
    with pytest.raises(OneStepError, match="Flux2KV"), steered(pipe, texts(1, 6)):
        pass
