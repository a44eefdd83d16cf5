"""Which text a negative is steered by: padded or not, with its own pooled text or the prompt's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from narrowed import thinned
from small_networks import inputs_of
from steered_networks import JOINT, POOLED, SCALES, UNETS, away, doubled, pipe_of, pooled, run, texts
from tiny_pipelines import make
from torch import Tensor

from onestep.core.cond import Cond
from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.pipelines import OneStepPipeline, steered
from onestep.pipelines.encode import encode_text

FAMILIES = {"sd": "unet", "sdxl": "unet", "sd3": "sd3", "flux": "flux"}
NEGATIVES = ["red", "a red dog"]
PADDING = [0]  # the tiny T5 has no token that ends a text, so that an empty one is one of padding


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-7) -> None:
    """Of the largest value, in float64; Flux has its rotary positions in float32."""
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def of(length: int, count: int = 1, seed: int = 7) -> Cond:
    return Cond(texts(count, length, seed), pooled=pooled(count, seed + 2))


# -- pooled text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "name", "mode"), thinned(5, [3, 8], POOLED, SCALES))
def test_each_text_is_modulated_by_its_own_pooled_text(name: str, mode: str, length: int) -> None:
    """As in the doubled network, whose rows have a text and its pooled text each; by VSF all are under the prompt's."""
    pipe, network = pipe_of(name)
    negative = of(length, 2 if length == 3 else 1)
    under_the_prompts = doubled(name, network, mode, negative.text)
    expected = under_the_prompts if mode == "vsf" else doubled(name, network, mode, negative)
    with away(pipe, negative, mode):
        found = run(name, network)
    close(found, expected)
    apart = (found - under_the_prompts).abs().max() / found.abs().max()
    assert mode == "vsf" or apart > 1e-4
    with away(pipe, negative.text, mode):
        close(run(name, network), under_the_prompts)


@pytest.mark.parametrize("name", POOLED)
def test_the_prompts_pooled_text_changes_nothing(name: str) -> None:
    """Bit for bit: a gate of a token is its text's."""
    pipe, network = pipe_of(name)
    inputs, negative = inputs_of(name), texts(2, 6)
    with away(pipe, negative, "nag"):
        expected = run(name, network)
    with away(pipe, Cond(negative, pooled=inputs["pooled"]), "nag"):
        close(run(name, network), expected, 1e-12)


@pytest.mark.parametrize("rows", ["first half", "second half"])
@pytest.mark.parametrize("name", POOLED)
def test_half_of_a_batch_is_under_its_negatives(name: str, rows: Any) -> None:
    pipe, network = pipe_of(name)
    inputs, negatives = inputs_of(name), of(6, 2)
    plain, twice = run(name, network), {key: torch.cat([value, value]) for key, value in inputs.items()}
    with away(pipe, negatives, "nag"):
        acting = run(name, network)
    with away(pipe, negatives, "nag", rows=rows):
        found = run(name, network, twice)
    close(found, torch.cat([acting, plain] if rows == "first half" else [plain, acting]))


# -- tokens that are none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "mode"), thinned(3, [*UNETS, *JOINT], SCALES))
def test_each_row_has_as_many_tokens_as_its_mask_says(name: str, mode: str) -> None:
    """Two negatives of two lengths in one batch are two runs, whatever lies behind the shorter; also in half of one."""
    pipe, network = pipe_of(name)
    inputs, negative = inputs_of(name), of(9, 2)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    alone = []
    for row, length in enumerate((9, 4)):
        one = Cond(negative.text[row : row + 1, :length], pooled=negative.pooled[row : row + 1])
        with away(pipe, one, mode):
            alone.append(run(name, network, {key: value[row : row + 1] for key, value in inputs.items()}))
    with away(pipe, Cond(negative.text, mask, negative.pooled), mode):
        close(run(name, network), torch.cat(alone))
        each_twice = {key: value.repeat_interleave(2, 0) for key, value in inputs.items()}
        close(run(name, network, each_twice), torch.cat(alone).repeat_interleave(2, 0))
    plain, twice = run(name, network), {key: torch.cat([value, value]) for key, value in inputs.items()}
    with away(pipe, Cond(negative.text, mask, negative.pooled), mode, rows="second half"):
        close(run(name, network, twice), torch.cat([plain, *alone]))


def own_tokens(name: str, pipe: Any, text: str) -> Tensor:
    """[1, L, C] of a text alone: what its encoders make of its own tokens, without a single one of padding."""
    with torch.no_grad():
        clip = torch.tensor([pipe.tokenizer(text).input_ids])
        if name == "sd":
            return pipe.text_encoder(clip)[0]
        if name == "flux":
            return pipe.text_encoder_2(torch.tensor([pipe.tokenizer_2(text).input_ids or PADDING]))[0]
        states = [
            encoder(clip, output_hidden_states=True).hidden_states[-2]
            for encoder in (pipe.text_encoder, pipe.text_encoder_2)
        ]
        joined = torch.cat(states, 2)
        if name == "sdxl":
            return joined
        wide = torch.nn.functional.pad(joined, (0, pipe.transformer.config.joint_attention_dim - joined.shape[2]))
        if pipe.text_encoder_3 is None:
            return wide
        t5 = pipe.text_encoder_3(torch.tensor([pipe.tokenizer_3(text).input_ids or PADDING]))[0]
        return torch.cat([wide, t5], 1)


@pytest.mark.parametrize("text", ["", *NEGATIVES, "a red dog " * 9])
@pytest.mark.parametrize("name", [*FAMILIES, "sd3 with T5"])
def test_a_text_is_encoded_without_padding(name: str, text: str) -> None:
    """Also an empty one, and one that its encoders cut."""
    pipe = make("sd3", with_t5=True) if name == "sd3 with T5" else make(name)
    kind = name.split()[0]
    found, padded = (encode_text(pipe, [text], padded=padded) for padded in (False, True))
    if len(text) < 20:
        torch.testing.assert_close(found.text, own_tokens(kind, pipe, text), rtol=0, atol=1e-5)
        assert found.text.shape[1] < padded.text.shape[1]
    if kind in ("sdxl", "sd3", "flux"):
        torch.testing.assert_close(found.pooled, padded.pooled, rtol=0, atol=1e-5)


def told(name: str, pipe: Any, mode: str) -> Cond:
    """The negatives as a mode's authors encode them, the longer one's length for both under a mask."""
    padded = encode_text(pipe, NEGATIVES)
    if mode != "vsf":
        return padded
    own = [own_tokens(name, pipe, text) for text in NEGATIVES]
    mask = torch.arange(own[1].shape[1]) < torch.tensor([[one.shape[1]] for one in own])
    filled = torch.nn.functional.pad(own[0], (0, 0, 0, own[1].shape[1] - own[0].shape[1]), value=9.0)
    return Cond(torch.cat([filled, own[1]]), mask, padded.pooled)


@pytest.mark.broad
@pytest.mark.parametrize("mode", SCALES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_familys_own_pipeline_draws_the_same(name: str, mode: str) -> None:
    """OneStepPipeline's arguments, and `steered` around the family's own pipeline: two prompts with a negative each,
    two pictures of each: 1e-5 of the latents' std."""
    pipe, ours = make(name), OneStepPipeline.from_pipe(make(name))
    recipe = Recipe((999.0,) if FAMILIES[name] == "unet" else (1000.0,), family=FAMILIES[name])
    call: dict[str, Any] = {"width": 16, "height": 16, "output_type": "latent", "num_images_per_prompt": 2}
    prompts, given = ["a cat", "red dog"], {"recipe": recipe, "negative_prompt": NEGATIVES}
    drawn = ours(prompts, steering=mode, generator=torch.Generator().manual_seed(3), **given, **call).images
    without = ours(prompts, seed=3, recipe=recipe, **call).images
    arguments = ours.diffusers_settings(recipe).apply(pipe)
    torch.manual_seed(3)
    with steered(pipe, told(name, pipe, mode), mode, empty=encode_text(pipe, [""])):
        plain = pipe(prompts, **{**call, **arguments}).images
    plain = pipe._unpack_latents(plain, 16, 16, pipe.vae_scale_factor) if name == "flux" else plain
    assert (drawn - plain).abs().max() <= 1e-5 * plain.std() < 1e-2 * plain.std() < (drawn - without).abs().max()


@pytest.mark.parametrize(("name", "mode"), thinned(5, FAMILIES, SCALES))
def test_a_text_is_enough(name: str, mode: str) -> None:
    """`steered` encodes what it is given as its mode's authors do, the empty text too."""
    pipe, call = make(name), {"width": 16, "height": 16, "output_type": "latent", "num_inference_steps": 1}
    call |= {"guidance_scale": 1.0, "latents": None}
    found, zero = [], encode_text(pipe, [""])
    own, other = (encode_text(pipe, NEGATIVES[1:], padded=padded) for padded in (mode != "vsf", mode == "vsf"))
    for negative, empty in ((NEGATIVES[1], None), (NEGATIVES[1:], None), (own, zero), (other, zero)):
        with steered(pipe, negative, mode, empty=empty):
            found.append(pipe("a cat", generator=torch.Generator().manual_seed(1), **call).images)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[3]), "padding matters"


@pytest.mark.parametrize(
    ("name", "negative", "why"),
    [
        ("sd15", 7, "negative is int: give a text"),
        ("sd15", ["red", 7], "give a text"),
        ("sd15", [], "give a text"),
        (
            "sd35",
            Cond(texts(1, 6), pooled=torch.zeros(1, 15)),
            r"pooled text is \(1, 15\), this network reads \[1, 16\]",
        ),
        (
            "flux",
            Cond(texts(2, 6), pooled=torch.zeros(1, 16)),
            r"pooled text is \(1, 16\), this network reads \[2, 16\]",
        ),
        ("sd15", Cond(texts(1, 6), torch.ones(1, 5, dtype=torch.bool)), r"mask is \(1, 5\) for tokens \(1, 6, 24\)"),
        ("sd15", Cond(texts(1, 3), torch.tensor([[False, True, True]])), "True for the tokens that each text begins"),
        ("sd15", Cond(texts(1, 3), torch.tensor([[True, False, True]])), "True for the tokens that each text begins"),
    ],
)
def test_a_text_that_does_not_fit_is_said(name: str, negative: Any, why: str) -> None:
    pipe, _ = pipe_of(name)
    with pytest.raises(OneStepError, match=why), steered(pipe, negative, "vsf"):
        raise AssertionError("it must not begin")
