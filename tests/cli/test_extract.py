"""onestep extract: what it says, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_krea2
import torch
from command import SHORT, Command
from safetensors.torch import load_file, save_file
from tiny_pipelines import video_vae

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


KREA2_LAYERS = 8 + 8 * (2 + 4)
KREA2_FILE = "transformer/diffusion_pytorch_model.safetensors"


def krea2_turbo(folder: Path) -> Path:
    """A distilled Krea 2, told so by its model_index.json alone, each of whose network's weights is another."""
    tiny_krea2.krea2_folder(folder, video_vae(), distilled=True)
    weights, draw = load_file(folder / KREA2_FILE), torch.Generator().manual_seed(1)
    moved = {name: value + 0.05 * torch.randn(value.shape, generator=draw) for name, value in weights.items()}
    save_file(moved, folder / KREA2_FILE, {"format": "pt"})
    return folder


@pytest.mark.broad
def test_of_krea_2_the_lora_is_the_difference_at_full_rank(onestep: Command, tmp_path: Path) -> None:
    base, few = tiny_krea2.krea2_folder(tmp_path / "raw", video_vae()), krea2_turbo(tmp_path / "mine")
    path = tmp_path / "few.safetensors"
    said = onestep("extract", base, few, "--rank", 4096, "--out", path, "--json")
    assert said.code == 0, said.err
    told, state = json.loads(said.out), load_lora(path, family="krea2").state
    assert told["whole"]["weights"] == pytest.approx(1, abs=1e-9)
    assert f"loads all {KREA2_LAYERS} layers" in told["check"]
    before, after = load_file(base / KREA2_FILE), load_file(few / KREA2_FILE)
    assert len(state) == KREA2_LAYERS and told["beside"] == len(before) - KREA2_LAYERS
    for layer, (a, b) in state.items():
        wanted = after[f"{layer}.weight"] - before[f"{layer}.weight"]
        torch.testing.assert_close(b @ a, wanted, rtol=0, atol=1e-5)


@pytest.mark.broad
@pytest.mark.parametrize("distilled", [False, True])
def test_a_distilled_krea_2_as_a_teacher_is_told_from_its_base(
    distilled: bool, onestep: Command, prompts: Path, tmp_path: Path
) -> None:
    folder = tiny_krea2.krea2_folder(tmp_path / "mine", video_vae(), distilled=distilled)
    said = onestep("distill", folder, "--prompts", prompts, "--out", tmp_path / "run", "--size", "32x32", *SHORT)
    assert said.code == 0, said.err
    known = "mine draws in few steps already (distilled, by is_distilled in its model_index.json): a better teacher is"
    assert (known in said.err) == distilled and ("few steps already" in said.err + said.out) == distilled
