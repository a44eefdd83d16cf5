"""Embeddings in the place of texts: what a text draws, weighted too, and what does not fit is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from narrowed import narrowed
from tiny_pipelines import make
from torch import Tensor

from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.pipelines.encode import encode_text
from onestep.pipelines.one_step import OneStepPipeline

PROMPTS, NEGATIVE = ["a cat", "red dog"], "red"
CALL: dict[str, Any] = {"width": 16, "height": 16, "output_type": "latent", "seed": 3, "num_images_per_prompt": 2}
KINDS = ["sd", "sdxl", "sd3", "flux"]
NAMES = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def recipe(kind: str, guidance: float = 1.0) -> Recipe:
    family = kind if kind in ("sd3", "flux") else "unet"
    return Recipe((999.0 if family == "unet" else 1000.0,), guidance=guidance, family=family)


def near(found: Tensor, expected: Tensor) -> None:
    """To float32's rounding."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.std()))


def encoded(ours: OneStepPipeline, negative: Any = NEGATIVE) -> dict[str, Tensor | None]:
    return dict(zip(NAMES, ours.encode_prompt(PROMPTS, negative), strict=True))


def unpadded(ours: OneStepPipeline) -> dict[str, Tensor | None]:
    """The negative's tokens without padding, as VSF takes them."""
    found = encode_text(ours.plain(), [NEGATIVE], padded=False)
    return {"negative_prompt_embeds": found.text, "negative_pooled_prompt_embeds": found.pooled}


WAYS = [(kind, way) for kind in KINDS for way in ("plain", "nag", "vsf")]
# Flux has no trained null condition
WAYS += [(kind, way) for kind in KINDS[:3] for way in ("guided", "guided and steered")]


@pytest.mark.parametrize(("kind", "way"), narrowed(WAYS, *WAYS[::3]))
def test_they_draw_what_their_text_draws(kind: str, way: str) -> None:
    """Alone, under guidance and by a steered negative, without any text encoder left."""
    ours = OneStepPipeline.from_pipe(make(kind))
    given = encoded(ours)
    chosen = recipe(kind, 3.0 if "guided" in way else 1.0)
    mode = "nag" if way in ("nag", "guided and steered") else "vsf" if way == "vsf" else None
    call: dict[str, Any] = {"recipe": chosen, "steering": mode, **CALL}
    used = NEGATIVE if way != "plain" else None
    expected = ours(PROMPTS, negative_prompt=used, **call).images
    if way == "vsf":
        given |= unpadded(ours)
    if way == "plain":
        given = {name: None if name.startswith("negative") else value for name, value in given.items()}
    parts = {name: None for name in ours.components if name.startswith(("text_encoder", "tokenizer"))}
    bare = OneStepPipeline.from_pipe(ours, **parts)
    near(bare(**given, **call).images, expected)
    plain = ours(PROMPTS, **{**call, "recipe": recipe(kind), "steering": None}).images
    assert way == "plain" or not torch.allclose(expected, plain, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_the_familys_own(kind: str) -> None:
    """What the family's own encode_prompt returns draws the same as the text."""
    pipe = make(kind)
    ours = OneStepPipeline.from_pipe(pipe)
    if kind == "flux":
        text, pooled, _ = pipe.encode_prompt(PROMPTS, PROMPTS)
    elif kind == "sd3":
        text, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, max_sequence_length=0)
    elif kind == "sdxl":
        text, _, pooled, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    else:
        text, pooled = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0], None
    expected = ours(PROMPTS, recipe=recipe(kind), **CALL).images
    found = ours(prompt_embeds=text.detach(), pooled_prompt_embeds=pooled, recipe=recipe(kind), **CALL).images
    near(found, expected)


def test_weights_and_lengths_are_the_callers() -> None:
    """A weighted token moves the picture; a prompt of two chunks under guidance has a negative of one."""
    ours = OneStepPipeline.from_pipe(make("sd"))
    text, away = ours.encode_prompt("a cat", "red")[:2]
    plain = ours(prompt_embeds=text, recipe=recipe("sd"), **CALL).images
    weighted = text.clone()
    weighted[:, 1] *= 1.5
    assert not torch.allclose(ours(prompt_embeds=weighted, recipe=recipe("sd"), **CALL).images, plain, atol=1e-3)
    long = torch.cat([text, weighted], 1)
    call: dict[str, Any] = {"recipe": recipe("sd", 3.0), **CALL}
    found = ours(prompt_embeds=long, negative_prompt_embeds=away, **call).images
    # guidance by hand, of two calls without: D_u + 3 (D_c - D_u)
    halves = [ours(prompt_embeds=rows, recipe=recipe("sd"), **CALL).images for rows in (long, away)]
    expected = halves[1] + 3 * (halves[0] - halves[1])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.std()))


def test_pictures_of_each_are_counted() -> None:
    ours = OneStepPipeline.from_pipe(make("sdxl"))
    given = encoded(ours, ["red", "a"])
    assert ours(**given, recipe=recipe("sdxl", 2.0), **{**CALL, "num_images_per_prompt": 3}).images.shape[0] == 6
    assert ours.encode_prompt(PROMPTS, "", "cpu", 2)[0].shape[0] == 4


WIDE = torch.zeros(1, 5, 48)
TEXT, POOLED = torch.zeros(1, 5, 64), torch.zeros(1, 32)
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "nothing": ("sd", {}, "prompt is None"),
    "both": ("sd", {"prompt": "a", "prompt_embeds": WIDE}, "prompt and prompt_embeds are both given"),
    "another width": ("sd", {"prompt_embeds": WIDE}, r"\[1, 5, 48\], this model reads \[prompts, tokens, 32\]"),
    "an axis more": (
        "sd",
        {"prompt_embeds": TEXT[None]},
        r"\[1, 1, 5, 64\], of one axis more than \[prompts, tokens, w",
    ),
    "pooled with an axis more": (
        "sdxl",
        {"prompt_embeds": TEXT, "pooled_prompt_embeds": POOLED[None]},
        r"\[1, 1, 32\], this model reads \[prompts, 32\]",
    ),
    "flat": ("sd", {"prompt_embeds": torch.zeros(5, 32)}, r"\[5, 32\]"),
    "no tokens": ("sd", {"prompt_embeds": torch.zeros(1, 0, 32)}, r"\[1, 0, 32\]"),
    "a text": ("sd", {"prompt_embeds": "a cat"}, "prompt_embeds is a str"),
    "whole numbers": ("sd", {"prompt_embeds": torch.zeros(1, 5, 32).long()}, "torch.int64"),
    "not finite": ("sd", {"prompt_embeds": torch.full((1, 5, 32), torch.inf)}, "not finite"),
    "pooled for a model without": (
        "sd",
        {"prompt_embeds": torch.zeros(1, 5, 32), "pooled_prompt_embeds": POOLED},
        "reads no pooled text",
    ),
    "no pooled": ("sdxl", {"prompt_embeds": TEXT}, "without pooled_prompt_embeds"),
    "pooled alone": ("sdxl", {"pooled_prompt_embeds": POOLED}, "without prompt_embeds"),
    "pooled of another count": (
        "sdxl",
        {"prompt_embeds": TEXT, "pooled_prompt_embeds": POOLED.repeat(2, 1)},
        "1 rows, pooled_prompt_embeds 2",
    ),
    "a negative without its pooled text": (
        "sdxl",
        {"prompt": "a", "negative_prompt_embeds": TEXT, "guidance_scale": 3},
        "without negative_pooled_prompt_embeds",
    ),
    "negatives of another count": (
        "sd",
        {"prompt": ["a", "a", "a"], "negative_prompt_embeds": torch.zeros(2, 5, 32), "guidance_scale": 3},
        "2 negative prompts for 3",
    ),
    "generators of another count": (
        "sd",
        {"prompt_embeds": torch.zeros(2, 5, 32), "generator": [torch.Generator()] * 3},
        "3 generators for 2",
    ),
    "no encoder": ("sd", {"prompt": "a", "without": True}, "no text_encoder to read a prompt with"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    kind, call, why = REFUSED[case]
    call = dict(call)
    parts = {"text_encoder": None} if call.pop("without", False) else {}
    with pytest.raises(OneStepError, match=why) as caught:
        OneStepPipeline.from_pipe(make(kind), **parts)(recipe=recipe(kind), **call)
    assert len(str(caught.value)) < 400


def test_text_encoders_alone_encode() -> None:
    """The parts of a prompt, without network and autoencoder, encode to what the whole pipeline does."""
    for kind in KINDS:
        pipe = make(kind, **({"with_t5": True} if kind == "sd3" else {}))
        ours = OneStepPipeline.from_pipe(pipe)
        absent = {name: None for name in ours.components if not name.startswith(("text_encoder", "tokenizer"))}
        alone = OneStepPipeline.from_pipe(pipe, **absent)
        for found, expected in zip(alone.encode_prompt("a cat"), ours.encode_prompt("a cat"), strict=True):
            assert (found is None) == (expected is None) == (kind == "sd" and expected is None)
            if expected is not None:
                torch.testing.assert_close(found[:, : expected.shape[1]], expected)
    with pytest.raises(OneStepError, match="neither a network nor a text encoder"):
        OneStepPipeline.from_pipe(make("sd"), unet=None, text_encoder=None, tokenizer=None)
