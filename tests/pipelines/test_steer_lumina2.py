"""Lumina 2 steered in diffusers: one stream with two texts is the doubled form, whatever lengths the texts have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from narrowed import thinned
from one_stream_oracle import turned
from small_networks import seeded
from steered_networks import OFFSET, SCALES, Array, array, attend, away, joined, mixed, pipe_of, texts
from tiny_pipelines import make
from torch import Tensor

from onestep.core.cond import Cond
from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.pipelines import OneStepPipeline, steered

EXACT = 1e-6
"""Of the largest value: diffusers turns queries and keys in float32."""


def close(found: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def ragged(lengths: list[int], seed: int) -> list[Tensor]:
    draw = seeded(seed)
    return [draw(length, 24) for length in lengths]


def cond_of(rows: list[Tensor]) -> Cond:
    return Cond.concat([Cond(row[None]) for row in rows])


def predicted(network: Any, x: Tensor, time: Tensor, rows: list[Tensor]) -> Tensor:
    cond = cond_of(rows)
    mask = torch.ones(cond.text.shape[:2], dtype=torch.bool) if cond.mask is None else cond.mask
    with torch.no_grad():
        return -network(x, 1 - time, cond.text, mask).sample


class Oracle:
    """A joint attention of [text, picture] in rows, each at its own length. own: tokens of each text, by row; picture:
    its tokens; prompts: how many of the rows, the first, are theirs."""

    def __init__(self, mode: str, prompts: int, own: list[int], picture: int) -> None:
        self.mode, self.prompts, self.own, self.picture = mode, prompts, own, picture

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        states = hidden_states
        narrow = attn.heads * attn.to_k.out_features // attn.to_q.out_features
        found = [torch.from_numpy(joined(attn.to_q(states), attn.heads))]
        found += [torch.from_numpy(joined(attn.to_k(states), narrow))]
        turns = image_rotary_emb.numpy()[:, None]
        q, k = (turned(array(norm(x)), turns) for x, norm in zip(found, (attn.norm_q, attn.norm_k), strict=True))
        k, v = (np.repeat(x, attn.heads // narrow, 1) for x in (k, joined(attn.to_v(states), narrow)))
        out = np.zeros_like(q)
        for row, own in enumerate(self.own):
            there = slice(0, own + self.picture)
            out[[row], :, there] = attend(*(x[[row]][:, :, there] for x in (q, k, v)))
        for row in range(self.prompts):
            self._push(out, range(row, len(out), self.prompts), q, k, v)
        merged = torch.from_numpy(out.transpose(0, 2, 1, 3).reshape(states.shape))
        return attn.to_out[0](merged.to(states.dtype))

    def _push(self, out: Array, rows: range, q: Array, k: Array, v: Array) -> None:
        images = [slice(self.own[row], self.own[row] + self.picture) for row in rows]
        queries = [q[[row]][:, :, image] for row, image in zip(rows, images, strict=True)]
        if self.mode == "vsf":  # each text's keys as far from the picture as in its own row
            ends = images[0].stop, self.own[rows[1]]
            keys, values = ([x[[row]][:, :, :end] for row, end in zip(rows, ends, strict=True)] for x in (k, v))
            scores = [
                query @ key.transpose(0, 1, 3, 2) / q.shape[3] ** 0.5 for query, key in zip(queries, keys, strict=True)
            ]
            weights = np.exp(np.concatenate([scores[0], scores[1] - OFFSET], 3))
            whole = np.concatenate([values[0], -SCALES["vsf"] * values[1]], 2)
            picture = weights @ whole / weights.sum(3, keepdims=True)
        else:
            picture = mixed(self.mode, *(out[[row]][:, :, image] for row, image in zip(rows, images, strict=True)))
        for row, image in zip(rows, images, strict=True):
            out[row, :, image] = picture[0]


def doubled(network: Any, mode: str, x: Tensor, time: Tensor, every: list[list[Tensor]]) -> Tensor:
    """The prediction for the prompts, the first of ``every``: rows of each text beside the same picture."""
    rows = [text for each in every for text in each]
    oracle = Oracle(mode, len(x), list(map(len, rows)), x.shape[2] * x.shape[3] // 4)
    before = [layer.attn.processor for layer in network.layers]
    for layer in network.layers:
        layer.attn.set_processor(oracle)
    try:
        answer = predicted(network, torch.cat([x] * len(every)), torch.cat([time] * len(every)), rows)
    finally:
        for layer, processor in zip(network.layers, before, strict=True):
            layer.attn.set_processor(processor)
    one, *same = answer.chunk(len(every))
    for other in same:  # the picture's stream is one and the same
        close(other, one)
    return one


LENGTHS = {
    "alike": ([5, 5], [9, 9]),
    "prompt longer": ([40, 40], [3, 3]),
    "negative longer": ([4, 4], [70, 70]),
    "both near the most": ([256, 256], [256, 256]),
    "each row its own": ([5, 40, 33], [40, 6, 64]),
}


@pytest.mark.parametrize(("lengths", "mode"), thinned(3, LENGTHS, SCALES))
def test_one_picture_stream_is_the_doubled_form(lengths: str, mode: str) -> None:
    prompts, negatives = (ragged(each, seed) for each, seed in zip(LENGTHS[lengths], (3, 7), strict=True))
    pipe, network = pipe_of("lumina2")
    x, time = seeded(2)(len(prompts), 16, 8, 12), torch.linspace(0.8, 0.2, len(prompts)).double()
    every = [prompts, negatives, *([[texts(1, 6, seed=8)[0]] * len(prompts)] if mode == "perp" else [])]
    expected, plain = doubled(network, mode, x, time, every), predicted(network, x, time, prompts)
    with away(pipe, cond_of(negatives), mode):
        found = predicted(network, x, time, prompts)
    close(found, expected)
    assert (found - plain).abs().max() > 1e-2 * plain.abs().max()
    elsewhere = doubled(network, mode, x, time, [prompts, [row + 1e-3 for row in negatives], *every[2:]])
    with pytest.raises(AssertionError):
        close(found, elsewhere)
    assert torch.equal(predicted(network, x, time, prompts), plain)


def test_away_from_the_prompt_itself_nag_changes_nothing() -> None:
    """So the prompt is placed and refined as the network does it."""
    pipe, network = pipe_of("lumina2")
    prompts = ragged([5, 40], 3)
    x, time = seeded(2)(2, 16, 8, 12), torch.tensor([0.8, 0.3], dtype=torch.float64)
    plain = predicted(network, x, time, prompts)
    with away(pipe, cond_of(prompts), "nag"):
        close(predicted(network, x, time, prompts), plain)


PROMPTS, NEGATIVES = ["a cat", "red dog a cat"], ["red", "a red dog cat cat"]
CALL: dict[str, Any] = {"width": 64, "height": 64, "output_type": "latent"}


@pytest.mark.parametrize("mode", ["nag", "perp"])
def test_the_familys_own_pipeline_draws_the_same(mode: str) -> None:
    """OneStepPipeline's arguments, and `steered` around Lumina2Pipeline: two prompts with a negative each, whose
    lengths differ; negatives are read without the system prompt."""
    pipe, ours = make("lumina2"), OneStepPipeline.from_pipe(make("lumina2"))
    recipe = Recipe((1000.0,), family="lumina2")
    given = {"recipe": recipe, "negative_prompt": NEGATIVES}
    drawn = ours(list(PROMPTS), steering=mode, generator=torch.Generator().manual_seed(3), **given, **CALL).images
    without = ours(list(PROMPTS), seed=3, recipe=recipe, **CALL).images
    arguments = ours.diffusers_settings(recipe).apply(pipe)
    torch.manual_seed(3)
    negatives = ours.encode_prompt(PROMPTS, NEGATIVES)[1]
    empty = ours.encode_prompt(PROMPTS[:1], "")[1]
    with steered(pipe, negatives, mode, empty=empty[0][None]):
        plain = pipe(list(PROMPTS), **{**CALL, **arguments}).images
    assert (drawn - plain).abs().max() <= 1e-5 * plain.std() < 1e-2 * plain.std() < (drawn - without).abs().max()


def test_a_pipelines_own_guidance_is_not_steered_unawares() -> None:
    pipe = make("lumina2")
    with steered(pipe, "red", "nag"), pytest.raises(OneStepError, match="call it with guidance_scale=1"):
        pipe("a cat", num_inference_steps=2, **CALL)


@pytest.mark.parametrize(("start", "end", "acting"), [(0.0, 1.0, [1, 1, 1, 1]), (0.2, 0.6, [0, 1, 1, 0])])
def test_it_acts_in_its_share_of_the_schedule(start: float, end: float, acting: list[int]) -> None:
    """The network is told what is left of the noise; steps lie at shares 0, 1/4, 1/2 and 3/4."""
    pipe, tokens = make("lumina2", shift=1.0), []
    pipe.transformer.context_refiner[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    with steered(pipe, "red", "nag", start=start, end=end):
        pipe("a cat", num_inference_steps=4, guidance_scale=1.0, max_sequence_length=256, **CALL)
    assert [count < 256 for count in tokens] == list(map(bool, acting)), tokens
