"""Wan steered in diffusers: each cross-attention is its formula on the embedded negative, the prompt's rows alone are
steered, and a pipeline with guidance of its own is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from narrowed import narrowed
from small_networks import network_of
from steered_networks import SCALES, away, empty, flipped, mixed, run, texts
from tiny_pipelines import make
from torch import Tensor

from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.core.schedule import FlowSchedule
from onestep.pipelines import OneStepPipeline, steered
from onestep.pipelines.encode import encode_text
from onestep.pipelines.threads import processors_of, set_processors

EXACT = 1e-6  # of the largest value: diffusers takes its norms in float32


class Oracle:
    """A cross-attention with queries and keys normed over all heads at once, by the papers' equations. embed: what
    embeds a text's tokens, as the prompt's are embedded before."""

    def __init__(self, mode: str, negative: Tensor, embed: Any) -> None:
        self.mode, self.negative, self.embed = mode, negative, embed

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None,
        rotary_emb: Any = None,
    ) -> Tensor:  # fmt: skip
        assert rotary_emb is None and attention_mask is None

        def parts(layer: Any, states: Tensor, norm: Any = None) -> np.ndarray[Any, Any]:
            made = layer(states) if norm is None else norm(layer(states))
            return made.unflatten(2, (attn.heads, -1)).transpose(1, 2).double().numpy()

        def seen(text: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
            text = text.expand(len(hidden_states), -1, -1).to(hidden_states)
            return parts(attn.to_k, text, attn.norm_k), parts(attn.to_v, text)

        q = parts(attn.to_q, hidden_states, attn.norm_q)
        (k, v), (k_neg, v_neg) = seen(encoder_hidden_states), seen(self.embed(self.negative))
        if self.mode == "vsf":
            found = flipped(q, (k, k_neg), (v, v_neg))
        else:
            nothing = softmaxed(q, *seen(self.embed(empty()))) if self.mode == "perp" else None
            found = mixed(self.mode, softmaxed(q, k, v), softmaxed(q, k_neg, v_neg), nothing)
        return attn.to_out[0](torch.from_numpy(found).transpose(1, 2).flatten(2).to(hidden_states))


def softmaxed(q: Any, k: Any, v: Any) -> Any:
    scores = q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def close(found: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def pipe_of() -> tuple[Any, Any]:
    pipe, network = make("wan"), network_of("wan")
    pipe.transformer = network
    return pipe, network


@pytest.mark.parametrize("mode", SCALES)
def test_it_is_its_formula_at_each_cross_attention(mode: str) -> None:
    pipe, network = pipe_of()
    negative, plain, before = texts(1, 9), run("wan", network), processors_of(network)
    crossed = {
        name: Oracle(mode, negative, network.condition_embedder.text_embedder) for name in before if ".attn2." in name
    }
    assert len(crossed) == 2
    set_processors(network, {**before, **crossed})
    expected = run("wan", network)
    set_processors(network, before)
    with away(pipe, negative, mode):
        found = run("wan", network)
    close(found, expected)
    assert float((found - plain).abs().max()) > 1e-3 * float(plain.abs().max())
    close(run("wan", network), plain, 1e-12)


@pytest.mark.parametrize("rows", ["first half", "second half"])
def test_half_of_a_batch_is_steered(rows: Any) -> None:
    pipe, network = pipe_of()
    plain = run("wan", network)
    with away(pipe, texts(1, 4), "nag"):
        whole = run("wan", network)
    with away(pipe, texts(1, 4), "nag", rows=rows):
        found = run("wan", network)
    steered_row = 0 if rows == "first half" else 1
    close(found[steered_row], whole[steered_row], 1e-9)
    close(found[1 - steered_row], plain[1 - steered_row], 1e-9)


@pytest.mark.parametrize("mode", narrowed(list(SCALES), "nag", "vsf"))
def test_the_pipelines_draw_the_same_steered(mode: str) -> None:
    """OneStepPipeline's argument, and diffusers' own pipeline within `steered`."""
    times = torch.tensor([1000.0, 750.0], dtype=torch.float64)
    recipe = Recipe.at(FlowSchedule(3.0), times, family="wan", sizes=((48, 32),))
    fast, plain = OneStepPipeline.from_pipe(make("wan")), make("wan")
    ours = fast("a cat", recipe=recipe, negative_prompt="red dog", steering=mode, seed=3, output_type="np").images
    call = fast.diffusers_settings(recipe).apply(plain)
    told: dict[str, Any] = {"prompt": "a cat", **call, "output_type": "np"}
    with steered(plain, "red dog", mode, empty=""):
        theirs = plain(**told, generator=torch.Generator().manual_seed(3)).frames[:, 0]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    without = fast("a cat", recipe=recipe, seed=3, output_type="np").images
    assert np.abs(ours - without).max() > 1e-3


def test_a_text_without_what_fills_it_up() -> None:
    """VSF's: as many tokens as the tokenizer has of it."""
    pipe = make("wan")
    whole = encode_text(pipe, ["red dog"], device="cpu").text
    own = encode_text(pipe, ["red dog"], padded=False, device="cpu").text
    count = int(whole[0].any(1).sum())
    assert own.shape == (1, count, 32) and 0 < count < 10 and torch.equal(own, whole[:, :count])


def test_it_acts_in_its_share_of_the_schedule() -> None:
    """The network is told 1000 sigma."""
    pipe, network = pipe_of()
    plain = run("wan", network)
    for (start, end), acts in {(0.0, 0.6): True, (0.9, 1.0): False}.items():  # the first row is at 0.75
        with away(pipe, texts(1, 4), "nag", start=start, end=end):
            found = run("wan", network)
        assert (float((found - plain).abs().max()) > 1e-6) == acts, (start, end)


def test_a_pipeline_with_guidance_of_its_own_is_refused() -> None:
    """It asks for its negative in a forward of its own."""
    pipe = make("wan")
    with steered(pipe, "red", "nag"), pytest.raises(OneStepError, match="guidance of its own, whose negative would be"):
        pipe(prompt="a cat", height=32, width=32, num_frames=1, num_inference_steps=1, guidance_scale=3.0)
