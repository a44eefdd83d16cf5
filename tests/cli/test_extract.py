"""onestep extract: what it says, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import Command

from onestep.core.lora_file import load_lora
from onestep.pipelines.adapt import network_of
from onestep.pipelines.load import load


@pytest.fixture
def few(model: Path, tmp_path: Path) -> Path:
    """``model`` with other weights."""
    pipe = load(model)
    with torch.no_grad():
        for weight in network_of(pipe).parameters():
            weight.add_(0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    pipe.save_pretrained(tmp_path / "few")
    return tmp_path / "few"


def test_extract_says_what_is_kept(onestep: Command, model: Path, few: Path, prompts: Path, tmp_path: Path) -> None:
    path = tmp_path / "few.safetensors"
    said = onestep("extract", model, few, "--rank", 2, "--recipe", "dmd2-1", "--prompts", prompts, "--out", path)
    assert said.code == 0, said.err
    assert "of the difference of the weights" in said.out and "latents are" in said.out and "least: " in said.out
    read = load_lora(path)
    assert read.recipe is not None and max(len(a) for a, _ in read.state.values()) == 2
    told = json.loads(onestep("extract", model, few, "--rank", 4, "--out", path, "--json").out)
    assert 0 < told["whole"]["weights"] < 1 and told["apart"] is None and told["layers"].keys() == read.state.keys()
    assert "onestep.extracted" in load_lora(path).metadata and load_lora(path).recipe is None


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--rank", 0], "rank is 0"),
        (["--recipe", "dmd2-9"], "did you mean"),
        (["--out", "nowhere/x.safetensors"], "no folder"),
        (["--out", "x.ckpt"], "ends in .safetensors"),
        (["--prompts", "prompts.txt"], "name the few-step model's"),
    ],
)
def test_bad_input_is_refused_in_words(
    more: list, why: str, onestep: Command, model: Path, few: Path, tmp_path
) -> None:
    out = [] if "--out" in more else ["--out", tmp_path / "x.safetensors"]
    said = onestep("extract", model, few, *out, *more)
    assert said.code == 2 and why in said.message


def test_no_model_is_written_over(onestep: Command, model: Path, few: Path, tmp_path: Path) -> None:
    file = few / "unet" / "diffusion_pytorch_model.safetensors"
    before = file.read_bytes()
    said = onestep("extract", model, few, "--out", file)
    assert said.code == 2 and "would be written into a model" in said.message and file.read_bytes() == before
