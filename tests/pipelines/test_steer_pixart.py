"""PixArt-Sigma steered in diffusers: each cross-attention is its formula on the tokens that masks show, whatever
lengths texts have, and a batch is its rows alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from narrowed import narrowed
from small_networks import inputs_of, network_of, seeded
from steered_networks import SCALES, Array, attend, away, empty, flipped, joined, mixed, run, texts
from tiny_pipelines import make
from torch import Tensor

from onestep.core.adapter_file import save_adapter
from onestep.core.cond import Cond
from onestep.core.errors import OneStepError
from onestep.core.families import bind_diffusers
from onestep.core.guidance_adapter import new_adapter
from onestep.core.recipe import Recipe
from onestep.pipelines import OneStepPipeline, Steering, steered
from onestep.pipelines.guidance_adapter import load_guidance_adapter

EXACT = 1e-9
PROMPTS, OWN = (3, 5), (6, 4)
"""Tokens of each prompt, and of each one's negative."""


class Oracle:
    """A cross-attention by the papers' equations, row by row of the tokens that are a text's own. negatives: [L, C] of
    each row; embed: what embeds a text's tokens, as the prompt's are embedded before."""

    def __init__(self, mode: str, prompts: list[int], negatives: list[Tensor], embed: Any) -> None:
        self.mode, self.prompts, self.negatives, self.embed = mode, prompts, negatives, embed

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None
    ) -> Tensor:
        q = joined(attn.to_q(hidden_states), attn.heads)
        rows = [
            self._row(attn, q[[row]], encoder_hidden_states[[row], :own], self.negatives[row][None])
            for row, own in enumerate(self.prompts)
        ]
        return attn.to_out[0](torch.from_numpy(np.concatenate(rows)).transpose(1, 2).flatten(2).to(hidden_states))

    def _row(self, attn: Any, q: Array, prompt: Tensor, negative: Tensor) -> Array:
        def seen(text: Tensor) -> tuple[Array, Array]:
            return joined(attn.to_k(text), attn.heads), joined(attn.to_v(text), attn.heads)

        (k, v), (k_neg, v_neg) = seen(prompt), seen(self.embed(negative))
        if self.mode == "vsf":
            return flipped(q, (k, k_neg), (v, v_neg))
        nothing = [attend(q, *seen(self.embed(empty())))] if self.mode == "perp" else []
        return mixed(self.mode, attend(q, k, v), attend(q, k_neg, v_neg), *nothing)


def close(found: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def shown(lengths: tuple[int, ...]) -> Tensor:
    """[B, L], True where a text has tokens of its own."""
    return torch.arange(max(lengths)).expand(len(lengths), -1) < torch.tensor(lengths)[:, None]


def pipe_of() -> tuple[Any, Any]:
    pipe, network = make("pixart"), network_of("pixart")
    pipe.transformer = network
    return pipe, network


def by_hand(network: Any, mode: str, prompts: list[int], negatives: list[Tensor], **more: Any) -> Tensor:
    before = dict(network.attn_processors)
    oracle = Oracle(mode, prompts, negatives, network.caption_projection)
    crossed = {name: oracle for name in before if ".attn2." in name}
    assert len(crossed) == 2
    network.set_attn_processor({**before, **crossed})
    try:
        return run("pixart", network, **more)
    finally:
        network.set_attn_processor(before)


@pytest.mark.parametrize("mode", SCALES)
def test_it_is_its_formula_at_each_cross_attention(mode: str) -> None:
    pipe, network = pipe_of()
    negative, plain = texts(1, 9), run("pixart", network)
    expected = by_hand(network, mode, [5, 5], [negative[0]] * 2)
    with away(pipe, negative, mode):
        found = run("pixart", network)
    close(found, expected)
    assert float((found - plain).abs().max()) > 1e-3 * float(plain.abs().max())
    with pytest.raises(AssertionError):
        close(found, by_hand(network, mode, [5, 5], [negative[0] + 1e-4] * 2))
    assert torch.equal(run("pixart", network), plain)


@pytest.mark.parametrize("mode", SCALES)
def test_padding_of_prompts_and_negatives_does_not_count(mode: str) -> None:
    """Two prompts and a negative each, all of several lengths, in one batch: as by hand, and as each alone."""
    pipe, network = pipe_of()
    negative = texts(2, 6)
    expected = by_hand(network, mode, list(PROMPTS), [row[:own] for row, own in zip(negative, OWN, strict=True)])
    with away(pipe, Cond(negative, shown(OWN)), mode):
        together = run("pixart", network, encoder_attention_mask=shown(PROMPTS))
    close(together, expected)
    inputs = inputs_of("pixart")
    for row in range(2):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        one["text"] = one["text"][:, : PROMPTS[row]]
        with away(pipe, negative[row : row + 1, : OWN[row]], mode):
            close(together[row : row + 1], run("pixart", network, one))


@pytest.mark.parametrize("mode", ["nag", "vsf"])
@pytest.mark.parametrize("rows", ["first half", "second half"])
def test_half_of_a_batch_is_steered(rows: Any, mode: str) -> None:
    pipe, network = pipe_of()
    told = {"encoder_attention_mask": shown(PROMPTS)}
    plain = run("pixart", network, **told)
    with away(pipe, texts(1, 4), mode):
        whole = run("pixart", network, **told)
    with away(pipe, texts(1, 4), mode, rows=rows):
        found = run("pixart", network, **told)
    steered_row = 0 if rows == "first half" else 1
    close(found[steered_row], whole[steered_row])
    close(found[1 - steered_row], plain[1 - steered_row])


def test_a_neutral_scale_is_plain_and_nag_away_from_the_prompt_itself_too() -> None:
    pipe, network = pipe_of()
    inputs, told = inputs_of("pixart"), {"encoder_attention_mask": shown(PROMPTS)}
    plain = run("pixart", network, **told)
    for neutral in (Steering("nasa", 0.0), Steering("nag", 1.0), Steering("perp", 1.0)):
        with away(pipe, texts(1, 4), neutral):
            assert torch.equal(run("pixart", network, **told), plain)
    with away(pipe, Cond(inputs["text"], shown(PROMPTS)), "nag"):
        close(run("pixart", network, **told), plain)


def test_a_mask_with_holes_is_refused_by_vsf_alone() -> None:
    """It flips each token of its own; the others leave the prompt's attention to the network."""
    pipe, network = pipe_of()
    holes = shown(PROMPTS).clone()
    holes[1, 0] = False
    told = {"encoder_attention_mask": holes}
    with away(pipe, texts(1, 4), "vsf"), pytest.raises(OneStepError, match="hides tokens of a prompt before others"):
        run("pixart", network, **told)
    with away(pipe, texts(1, 4), "nag"):
        run("pixart", network, **told)
    added = torch.zeros(2, 1, 5, dtype=torch.float64)  # to the scores
    with away(pipe, texts(1, 4), "vsf"), pytest.raises(OneStepError, match="VSF cannot follow a mask"):
        run("pixart", network, encoder_attention_mask=added)


def test_it_acts_beside_a_guidance_adapter(tmp_path: Path) -> None:
    """Which hangs on the same layers."""
    pipe, network = pipe_of()
    side = new_adapter({target.name: target for target in bind_diffusers(network)}, "pixart", 1)
    for _, value in sorted(side.named_parameters()):
        value.detach().add_(0.2 * seeded(2)(*value.shape).to(value))
    save_adapter(tmp_path / "guide.safetensors", side, "pixart")
    negative, told = texts(1, 9), {"encoder_attention_mask": shown((5, 5))}
    with away(pipe, negative, "nag"):
        without = run("pixart", network, **told)
    with load_guidance_adapter(pipe, tmp_path / "guide.safetensors", guidance=5):
        expected = by_hand(network, "nag", [5, 5], [negative[0]] * 2, **told)
        with away(pipe, negative, "nag"):
            found = run("pixart", network, **told)
    close(found, expected, 1e-6)
    assert float((found - without).abs().max()) > 1e-2 * float(without.std())


CALL: dict[str, Any] = {"width": 40, "height": 48, "output_type": "latent"}


@pytest.mark.parametrize("mode", narrowed(list(SCALES), "nag", "vsf"))
def test_the_pipelines_draw_the_same_steered(mode: str) -> None:
    """OneStepPipeline's argument, and diffusers' own pipeline within `steered`: prompts and negatives of several
    lengths, drawn together and each alone."""
    recipe = Recipe((999.0,), family="pixart")
    fast, plain = OneStepPipeline.from_pipe(make("pixart")), make("pixart")
    prompts, negatives = ["a cat", "red dog a cat dog"], ["red dog cat", "red"]
    noise = torch.randn(2, 4, 48, 40, generator=torch.Generator().manual_seed(1))
    told = {"recipe": recipe, "latents": noise, **CALL}
    ours = fast(prompts, negative_prompt=negatives, steering=mode, **told).images
    for row in range(2):
        one = {**told, "latents": noise[row : row + 1]}
        alone = fast(prompts[row], negative_prompt=negatives[row], steering=mode, **one).images
        close(ours[row : row + 1], alone, 1e-5)
    with torch.no_grad():
        text, mask, *_ = plain.encode_prompt(negatives, do_classifier_free_guidance=False)
        zero, zero_mask, *_ = plain.encode_prompt([""], do_classifier_free_guidance=False)
    answers: list[Tensor] = []
    plain.transformer.register_forward_hook(lambda _, __, answer: answers.append(answer[0]))
    with steered(plain, Cond(text, mask.bool()), mode, empty=Cond(zero, zero_mask.bool())):
        drawn = {"num_inference_steps": 1, "guidance_scale": 1.0, "use_resolution_binning": False}
        plain(prompts, latents=noise, **drawn, **CALL)
    theirs = answers[0][:, :4]
    abar = float(fast.scheduler.alphas_cumprod[-1])
    close(ours, (noise - (1 - abar) ** 0.5 * theirs) / abar**0.5, 1e-4)
    without = fast(prompts, **told).images
    assert float((ours - without).abs().max()) > 1e-2 * float(without.std())


def test_its_own_guidance_is_refused_unless_told_the_prompts_half() -> None:
    pipe = make("pixart")
    told = {**CALL, "num_inference_steps": 1, "guidance_scale": 3.0, "use_resolution_binning": False}
    with steered(pipe, "red", "nag", rows="second half"):
        pipe("a cat", **told)
    with steered(pipe, "red", "nag"), pytest.raises(OneStepError, match="guidance_scale=1, or say which half"):
        pipe("a cat", **told)


@pytest.mark.parametrize(("start", "end", "acting"), [(0.0, 0.1, False), (0.1, 0.9, True), (0.9, 1.0, False)])
def test_it_acts_in_its_share_of_the_schedule(start: float, end: float, acting: bool) -> None:
    """Of times 0 to 999: the first row is at 801."""
    pipe, network = pipe_of()
    plain = run("pixart", network)
    with away(pipe, texts(1, 4), "nag", start=start, end=end):
        assert torch.equal(run("pixart", network), plain) != acting
