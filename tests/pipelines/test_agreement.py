"""Prompt agreement by a CLIP in a folder: as transformers has it, with a gradient; what is no such folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from small_host import SmallHost, small
from transformers import CLIPConfig, CLIPModel

from onestep.core.errors import OneStepError
from onestep.pipelines.adapt import adapt
from onestep.pipelines.agreement import Agreement, read_for
from onestep.pipelines.distill import distill
from onestep.training.distil import distil
from onestep.training.methods import settings_for
from onestep.training.methods.rewards import given, valued

PROMPTS = ["a red house", "two birds by the sea at night", "a red house"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """Random, of two layers, with CLIP's tokenizer."""
    place: Path = tmp_path_factory.mktemp("clip")
    tokenizer = tiny.clip_tokenizer()
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**shared, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config={**shared, "image_size": 32, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def test_it_is_the_cosine_that_transformers_has(folder: Path) -> None:
    """At the CLIP's own size, on its own numbers."""
    reward, pictures = Agreement(str(folder)), torch.rand(3, 3, 32, 32)
    found = reward(pictures, PROMPTS)
    model = CLIPModel.from_pretrained(folder).eval()
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073))[:, None, None]
    deviation = torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]
    for row, prompt in enumerate(PROMPTS):
        tokens = reward.tokenizer([prompt], return_tensors="pt")
        with torch.no_grad():
            pixels = (pictures[row : row + 1] - mean) / deviation
            out = model(tokens["input_ids"], pixels, tokens["attention_mask"])
        wanted = float(out.logits_per_image[0, 0] / model.logit_scale.exp())
        assert float(found[row]) == pytest.approx(wanted, abs=1e-5)
    assert float((found[0] - found[2]).abs()) > 1e-5  # one prompt, two pictures


def test_it_has_a_gradient_in_pictures_of_any_shape(folder: Path) -> None:
    reward, pictures = Agreement(str(folder)), torch.rand(2, 3, 48, 96, requires_grad=True)
    found = valued("agreement", reward, pictures, PROMPTS[:2])
    (slope,) = torch.autograd.grad(found.sum(), pictures)
    step = torch.randn(pictures.shape)
    with torch.no_grad():
        ends = [reward(pictures + sign * 1e-2 * step, PROMPTS[:2]).sum() for sign in (1, -1)]
    assert float((slope * step).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2e-2, rel=2e-2, abs=1e-3)
    assert not bool(slope[..., :20].any())  # outside the middle square
    assert all(weight.grad is None for weight in reward.model.parameters())


def test_a_run_by_it(folder: Path, tmp_path: Path) -> None:
    settings = small(
        method="di-star", reward="agreement, contrast*0.5", reward_model=str(folder), steps=2, warm_start=0
    )
    with given(read_for(settings)):
        made = distil(SmallHost(), PROMPTS[:2], settings, tmp_path / "run")
    assert all(abs(line["reward_agreement"]) <= 1 for line in made.metrics if "reward" in line)
    assert read_for(settings_for("di-star")) == {} == read_for(settings_for("dmd"))


def test_what_is_no_clip_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("", str(tmp_path), str(tmp_path / "none")):
        with pytest.raises(OneStepError, match="reward_model is .*which is no folder of a CLIP: the reward agreement"):
            read_for(settings_for("di-star", reward="agreement", reward_model=name))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(OneStepError, match="reward_model holds a model of type 'bert', and agreement needs a CLIP"):
        Agreement(str(tmp_path))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(OneStepError, match="the CLIP in reward_model cannot be read"):
        Agreement(str(tmp_path))


def test_a_reward_of_ones_own_in_one_call(tmp_path: Path) -> None:
    """Through the pipeline's own decoder, which is given back as it was."""
    seen = []

    def dark(pictures: torch.Tensor, prompts: Any) -> torch.Tensor:
        seen.append(
            (tuple(pictures.shape), list(prompts), float(pictures.detach().min()), float(pictures.detach().max()))
        )
        return -pictures.square().flatten(1).mean(1)

    pipe = tiny.sd()
    flags = [weight.requires_grad for weight in pipe.vae.parameters()]
    few: dict[str, Any] = {
        "steps": 1,
        "warm_start": 0,
        "critic_warm_up": 0,
        "critic_updates": 1,
        "anchor": 0.0,
        "batch": 2,
    }
    few |= {"sizes": "16x16", "teacher_steps": 1, "watch_every": 0, "preview_every": 0, "rank": 2}
    told = {"reward": "dark, contrast", "rewards": {"dark": dark}, "out": tmp_path / "run"}
    made = distill(pipe, ["a cat"], "di-star", **few, **told)
    assert len(seen) == 1 and seen[0][:2] == ((2, 3, 16, 16), ["a cat", "a cat"])
    assert 0 <= seen[0][2] <= seen[0][3] <= 1
    assert [weight.requires_grad for weight in pipe.vae.parameters()] == flags
    assert next(line for line in made.metrics if "reward" in line)["reward_pull"] > 0


def test_the_decoders_gradient_is_that_of_what_it_draws() -> None:
    """By central differences; and within [0, 1] it draws what `decode` does."""
    host = adapt(tiny.sd(), device="cpu")
    x = torch.randn(1, *host.latent_shape((16, 16)), generator=torch.Generator().manual_seed(2))
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    with host.decoding() as decode:
        free = x.clone().requires_grad_()
        pictures = decode(free)
        weights = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(4))
        (slope,) = torch.autograd.grad((pictures * weights).sum(), free)
        ends = [float((decode(x + sign * 1e-2 * step) * weights).sum()) for sign in (1, -1)]
    assert float((slope * step).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=1e-2, abs=1e-3)
    torch.testing.assert_close(pictures.detach().clamp(0, 1), host.decode(x))
