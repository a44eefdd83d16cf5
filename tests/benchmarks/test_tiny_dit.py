"""What `tiny-dit` is trained with: its one stream is diffusers' with every filling token, its text the pipeline's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from diffusers import AutoencoderKL  # noqa: E402
from tiny_models import data, dit, loop, store, teacher, tokens  # noqa: E402

CAPTIONS = ("weapon: giant club", "potion: sky blue", "siren", "floor: grey stone")
SHAPE = dit.Shape(width=96, heads=3, layers=1, text_width=32)


@pytest.fixture(scope="module")
def tokenizer():
    return tokens.build_qwen(CAPTIONS)


@pytest.fixture(scope="module")
def modules(tokenizer) -> torch.nn.ModuleDict:
    """Away from adaLN-zero, where no block does anything."""
    modules = dit.build(SHAPE, tokenizer).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in modules.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return modules


@pytest.mark.parametrize("size", [(8, 8), (4, 6), (16, 8)])
def test_one_weighted_token_is_all_that_fill_a_picture_up(tokenizer, modules, size: tuple[int, int]) -> None:
    ids = data.encode(tokenizer, ["siren", "floor: grey stone, bright", ""])
    x = torch.randn(3, 4, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    with torch.no_grad():
        text, real = dit.condition(modules, ids)
        found = dit.velocity(modules["transformer"], x, t, text, real)
        each = [row[mask] for row, mask in zip(text, real, strict=True)]
        expected = -torch.stack(modules["transformer"](list(x[:, :, None]), 1 - t, each)[0])[:, :, 0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_the_text_is_the_pipelines_own(tokenizer, modules, tmp_path: Path) -> None:
    """Also of the folder as it is shipped, whose weights are rounded."""
    prompts = ["siren", "potion: sky blue, dark", ""]
    pipe = dit.pipeline(modules.half().float(), AutoencoderKL(), tokenizer, SHAPE)
    store.save(pipe, tmp_path / "model")
    shipped = type(pipe).from_pretrained(tmp_path / "model")
    with torch.no_grad():
        text, real = dit.condition(modules, data.encode(tokenizer, prompts))
        for one in (pipe, shipped):
            found, _ = one.encode_prompt(list(prompts), "cpu", do_classifier_free_guidance=False)
            for row, mask, states in zip(text, real, found, strict=True):
                torch.testing.assert_close(states, row[mask])


def test_a_prompt_stands_in_qwens_turns(tokenizer) -> None:
    (ids,) = data.encode(tokenizer, ["Floor, 漢☃"])
    said = "<|im_start|>user\nFloor, 漢☃<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == said and tokenizer.pad_token_id not in ids
    assert len(tokenizer) <= tokens.PIECES


def test_it_learns(tokenizer, tmp_path: Path) -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    tiles = data.Tiles(images, CAPTIONS, (("red", "dark"), ("blue", None), ("grey", "bright"), ("cyan", "dark")))
    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plan, prompts = loop.Plan(steps=20, lr=1e-2, warm_up=1), data.Prompts(tiles, tokenizer)
    trained = teacher.train(dit, latents, prompts, tokenizer, SHAPE, plan, tmp_path, batch=8)
    torch.manual_seed(plan.seed)
    losses = [dit.loss(one, prompts, SHAPE) for one in (dit.build(SHAPE, tokenizer), trained)]
    with torch.no_grad():
        before, after = (
            float(loss(latents, noise, torch.arange(4), torch.Generator().manual_seed(1))) for loss in losses
        )
    assert after < 0.97 * before
