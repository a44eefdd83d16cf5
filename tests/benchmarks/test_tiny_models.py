"""What the tiny models are trained with: exact zero tokens, honest prompts, a loop that resumes to the bit."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from tiny_models import autoencoder, data, flow, judging, loop, teacher, tokens, unet  # noqa: E402

CAPTIONS = ("weapon: giant club", "potion: sky blue", "siren", "floor: grey stone")


@pytest.fixture(scope="module")
def tokenizer():
    return tokens.build(CAPTIONS)


@pytest.fixture(scope="module")
def tiles() -> data.Tiles:
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return data.Tiles(images, CAPTIONS, (("red", "dark"), ("blue", None), ("grey", "bright"), ("cyan", "dark")))


@pytest.mark.parametrize("zeros", [0, 1, 24, 256])
def test_one_weighted_token_is_n_zero_tokens(tokenizer, zeros: int) -> None:
    """n equal keys add n exp(l) to the softmax's sum, as one key with the logit l + log n does."""
    shape = flow.Shape(layers=2, heads=1, joint=192)
    network = flow.build(shape, tokenizer)["transformer"].double()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():  # away from adaLN-zero, where no block does anything
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 5, 192, generator=generator, dtype=torch.float64)
    pooled = torch.randn(2, 192, generator=generator, dtype=torch.float64)
    time = torch.tensor([100.0, 700.0], dtype=torch.float64)
    with torch.no_grad():
        expected = network(x, torch.cat([text, text.new_zeros(2, zeros, 192)], 1), pooled, time).sample
        network.set_attn_processor({name: flow.ZeroTokenAttention() for name in network.attn_processors})
        log_count = torch.full((2,), math.log(zeros) if zeros else -math.inf)
        text = torch.cat([text, text.new_zeros(2, 1, 192)], 1)
        found = network(x, text, pooled, time, joint_attention_kwargs={"log_count": log_count}).sample
    # The processor's log n is float32.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_prompt_has_the_parts_that_are_asked_for() -> None:
    words = ("red", "dark")
    assert data.prompt("weapon: axe", words, True, True, True) == "weapon: axe, red, dark"
    assert data.prompt("weapon: axe", words, False, True, False) == "weapon, red"
    assert data.prompt("siren", ("red", None), False, False, True) == "siren"


def test_prompts_are_drawn_at_their_rates(tokenizer, tiles: data.Tiles) -> None:
    prompts, n = data.Prompts(tiles, tokenizer), 4000
    ids = prompts.draw(torch.zeros(n, dtype=torch.long), torch.Generator().manual_seed(0))

    def share(text: str) -> float:
        return float((ids == data.encode(tokenizer, [text])).all(dim=1).double().mean())

    # Binomial deviations at n = 4000 stay below 0.008: 0.03 is four of them.
    assert share("") == pytest.approx(data.PROMPT_DROPPED, abs=0.03)
    kept = (1 - data.PROMPT_DROPPED) * (1 - data.NAME_DROPPED) * (1 - data.WORD_DROPPED) ** 2
    assert share("weapon: giant club, red, dark") == pytest.approx(kept, abs=0.03)
    bare = (1 - data.PROMPT_DROPPED) * data.NAME_DROPPED * data.WORD_DROPPED**2
    assert share("weapon") == pytest.approx(bare, abs=0.03)


def test_tokenizer_of_any_text(tokenizer) -> None:
    assert len(tokenizer) <= tokens.PIECES
    assert tokenizer("").input_ids == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert tokenizer.eos_token_id not in tokenizer("漢☃ Qz é").input_ids[1:-1]


def test_shuffled_colours_keep_every_pixel_value() -> None:
    x = torch.rand(64, 3, 4, 4)
    out = autoencoder.augmented(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(out.flatten(1).sort(dim=1).values, x.flatten(1).sort(dim=1).values)
    assert 0.1 < float((out != x).flatten(1).any(dim=1).double().mean()) < 1.0


def test_variants_are_never_on_both_sides(tiles: data.Tiles) -> None:
    captions = tuple(f"floor: stone{name} {n}" for name in "abcdefgh" for n in range(3))
    away = judging.held_out(data.Tiles(tiles.images, captions, ()))
    assert (away.view(8, 3) == away.view(8, 3)[:, :1]).all() and away.any() and not away.all()


@pytest.mark.broad
@pytest.mark.parametrize(
    ("family", "shape", "network"),
    [
        (unet, unet.Shape(widths=(32,), heads=1), "unet"),
        (unet, unet.Shape(widths=(32,), heads=1, prediction="v_prediction"), "unet"),
        pytest.param(flow, flow.Shape(layers=1, heads=1), "transformer", marks=pytest.mark.broad),
    ],
)
def test_a_teacher_of_each_family_learns_and_is_shown_as_it_is_shipped(
    tokenizer, tiles: data.Tiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family, shape, network: str
) -> None:
    """Its loss falls; snapshots and the end hold averaged weights in a network with its usual attention."""
    monkeypatch.setattr(loop.Training.run, "__defaults__", (None, 0.0))
    shown: list[bool] = []

    def snapshot(modules: torch.nn.ModuleDict) -> None:
        processors = modules[network].attn_processors.values()
        shown.append(not any(isinstance(one, flow.ZeroTokenAttention) for one in processors))

    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=generator)
    plan = loop.Plan(steps=40, lr=5e-3, warm_up=1)
    prompts = data.Prompts(tiles, tokenizer)
    modules = teacher.train(family, latents, prompts, tokenizer, shape, plan, tmp_path, snapshot, batch=8)
    snapshot(modules)
    assert len(shown) == 41 and all(shown) and not modules.training
    torch.manual_seed(plan.seed)
    first = family.loss(family.build(shape, tokenizer), prompts, shape)
    last = family.loss(modules, prompts, shape)
    with torch.no_grad():
        before, after = (
            float(loss(latents, noise, torch.arange(4), torch.Generator().manual_seed(1))) for loss in (first, last)
        )
    assert after < 0.97 * before


def _regression(folder: Path, steps: int, plan: loop.Plan) -> tuple[torch.nn.Linear, loop.Training]:
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    training = loop.Training(net, plan, folder)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        if step >= steps:
            raise KeyboardInterrupt
        return (net(torch.randn(8, 3, generator=generator)) - 1.0).square().mean()

    training.run(loss)
    return net, training


def test_a_killed_training_ends_as_the_whole_one(tmp_path: Path) -> None:
    plan = loop.Plan(steps=30, lr=0.1, warm_up=5, save_seconds=0.0, log_every=10)
    whole, _ = _regression(tmp_path / "whole", 30, plan)
    with pytest.raises(KeyboardInterrupt):
        _regression(tmp_path / "cut", 13, plan)
    resumed, training = _regression(tmp_path / "cut", 30, plan)
    assert training.step == 30 and torch.equal(resumed.weight, whole.weight)
    lines = (tmp_path / "whole" / "loss.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20, 30]
