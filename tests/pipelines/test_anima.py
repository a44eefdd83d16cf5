"""Anima in diffusers, where its own pipeline is a modular one: D is the network's own answer, texts are made once, a
folder is loaded, and one file draws one picture by OneStepPipeline and by diffusers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Cosmos2TextToImagePipeline, FlowMatchEulerDiscreteScheduler
from lora_files import random_lora
from narrowed import narrowed
from safetensors.torch import save_file
from tiny_pipelines import make, t5, t5_tokenizer, video_vae

from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.core.schedule import FlowSchedule
from onestep.pipelines import diverse
from onestep.pipelines.adapt import adapt
from onestep.pipelines.distill import distill
from onestep.pipelines.load import load
from onestep.pipelines.one_step import OneStepPipeline

SIZE = (48, 32)
PROMPTS = ["a cat", "red dog a cat", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As diffusers saves it."""
    place = tmp_path_factory.mktemp("anima") / "model"
    make("anima").save_pretrained(str(place), overwrite_modular_index=True)
    return place


@torch.no_grad()
def test_d_is_what_its_own_pipeline_asks_of_its_network() -> None:
    """modular_pipelines/anima/denoise.py: a video of one frame, sigma, and a mask of pixels without padding."""
    pipe = make("anima")
    host = adapt(pipe)
    cond, x = host.encode(PROMPTS[:2], SIZE), torch.randn(2, *host.latent_shape(SIZE))
    assert x.shape == (2, 16, 4, 6) and host.native_size == (1024, 1024) and host.denoiser.guidance == "cfg"
    sigma = torch.tensor([0.9, 0.2], dtype=torch.float64)
    mask = torch.zeros(1, 1, 32, 48)
    velocity = pipe.transformer(x[:, :, None], sigma.float(), cond.text, padding_mask=mask).sample[:, :, 0]
    expected = x - sigma.float()[:, None, None, None] * velocity
    torch.testing.assert_close(host.denoiser(x, sigma, cond), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    with pytest.raises(OneStepError, match="multiples of 16"):
        host.latent_shape((40, 32))


@torch.no_grad()
def test_a_text_is_what_its_own_blocks_make_of_it() -> None:
    """512 tokens, those behind the text zero; the same alone as among others."""
    pipe = make("anima")
    cond = adapt(pipe).encode(PROMPTS, SIZE)
    assert cond.text.shape == (3, 512, 32) and cond.mask is None and cond.pooled is None
    step = pipe.blocks.sub_blocks["text_encoder"]
    for row, prompt in enumerate(PROMPTS):
        told = step.encode_prompt(pipe, prompt, prepare_unconditional_embeds=False)
        names = ("qwen_prompt_embeds", "t5_input_ids", "t5_attention_mask", "qwen_attention_mask")
        alone = pipe.text_conditioner(*(told[name] for name in names))
        torch.testing.assert_close(cond.text[row : row + 1], alone, rtol=0, atol=1e-5 * float(cond.text.abs().max()))
        assert cond.text[row].any(1).sum() == (told["t5_attention_mask"].sum() if prompt else 0)


def test_a_part_that_a_text_needs_is_missed_by_name() -> None:
    for part in ("t5_tokenizer", "text_conditioner", "text_encoder"):
        pipe = make("anima")
        setattr(pipe, part, None)
        with pytest.raises(OneStepError, match=f"has no {part}, which encodes prompts"):
            adapt(pipe)


def test_cosmos_predict2s_pipeline_is_refused_by_name_though_its_network_has_one_class() -> None:
    part = make("anima")
    pipe = Cosmos2TextToImagePipeline(
        **{"text_encoder": t5(), "tokenizer": t5_tokenizer(), "transformer": part.transformer, "vae": video_vae()},
        **{"scheduler": FlowMatchEulerDiscreteScheduler(), "safety_checker": lambda images: images},
    )
    with pytest.raises(OneStepError, match="Cosmos-Predict2 models cannot be adapted yet"):
        adapt(pipe)


@pytest.mark.parametrize("guidance", narrowed([1.0, 3.0], 3.0))
def test_one_file_draws_one_picture_with_and_without_guidance(guidance: float, tmp_path: Path) -> None:
    times = torch.tensor([1000.0, 900.0, 750.0], dtype=torch.float64)
    recipe = Recipe.at(FlowSchedule(3.0), times, family="anima", guidance=guidance, sizes=(SIZE,))
    path = random_lora(make("anima"), tmp_path / "a.safetensors", recipe, size=0.1)
    fast, plain = OneStepPipeline.from_pipe(make("anima")), make("anima")
    fast.load_one_step_lora(path)
    ours = fast("a cat", negative_prompt="red dog", seed=3, output_type="np").images
    plain.load_lora_weights(str(tmp_path), weight_name=path.name)
    call = fast.diffusers_settings().apply(plain)
    told = {"prompt": "a cat", "negative_prompt": "red dog", "output_type": "np", **call}
    theirs = plain(**told, generator=torch.Generator().manual_seed(3))
    assert ours.shape == (1, 32, 48, 3)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * float(np.abs(theirs).max()))
    without = make("anima")
    fast.diffusers_settings().apply(without)
    assert np.abs(ours - without(**told, generator=torch.Generator().manual_seed(3))).max() > 0.01


def test_the_script_that_is_printed_draws_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = torch.tensor([900.0, 750.0], dtype=torch.float64)
    recipe = Recipe.at(FlowSchedule(3.0), times, family="anima", sizes=(SIZE,))
    pipe = load(folder)
    path = random_lora(pipe, tmp_path / "a.safetensors", recipe, size=0.1)
    fast = OneStepPipeline.from_pipe(load(folder))
    fast.load_one_step_lora(path)
    monkeypatch.chdir(tmp_path)
    script = fast.diffusers_settings().script(pipe, str(folder), str(path), "a cat", recipe.lora_scale)
    assert len(script.splitlines()) <= 10
    exec(script, {})  # what a person would run
    from PIL import Image

    drawn = np.asarray(Image.open(tmp_path / "picture.png"), dtype=np.float64)
    torch.manual_seed(0)
    ours = np.asarray(fast("a cat").images[0], dtype=np.float64)
    assert np.abs(ours - drawn).max() <= 1 and drawn.std() > 1


def test_a_folder_is_loaded_saved_and_drawn_from(folder: Path, tmp_path: Path) -> None:
    pipe, again = load(folder), OneStepPipeline.from_pipe(make("anima"))
    assert type(pipe).__name__ == "AnimaModularPipeline" and pipe.transformer.dtype == torch.float32
    for mine, theirs in zip(pipe.transformer.parameters(), make("anima").transformer.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    recipe = Recipe.at(FlowSchedule(3.0), torch.tensor([1000.0], dtype=torch.float64), family="anima", sizes=(SIZE,))
    wanted = again("a cat", recipe=recipe, seed=1, output_type="np").images
    again.save_pretrained(tmp_path / "saved")
    third = OneStepPipeline.from_pretrained(tmp_path / "saved")
    for drawn in (OneStepPipeline.from_pipe(pipe), third):
        found = drawn("a cat", recipe=recipe, seed=1, output_type="np").images
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    embeds = again.encode_prompt("a cat")[0]
    given = again(prompt_embeds=embeds, recipe=recipe, seed=1, output_type="np").images
    np.testing.assert_allclose(given, wanted, rtol=0, atol=1e-5)


def test_a_folder_without_a_part_is_refused_with_its_name(folder: Path, tmp_path: Path) -> None:
    index = json.loads((folder / "modular_model_index.json").read_text())
    for part in ("text_conditioner", "t5_tokenizer", "scheduler"):
        place = tmp_path / part
        place.mkdir()
        (place / "modular_model_index.json").write_text(json.dumps(index))
        for child in folder.iterdir():
            if child.is_dir() and child.name != part:
                (place / child.name).symlink_to(child)
        with pytest.raises(OneStepError, match=f"has no {part}"):
            load(place)


def test_a_folder_whose_index_has_hints_alone_is_loaded_and_keeps_its_name(folder: Path, tmp_path: Path) -> None:
    """As diffusers writes the index of parts that it has not loaded: their classes stand in their hints alone."""
    index = json.loads((folder / "modular_model_index.json").read_text())
    parts = {name for name, entry in index.items() if isinstance(entry, list)}
    assert {"transformer", "t5_tokenizer", "scheduler"} <= parts
    place = tmp_path / "my anima"
    place.mkdir()
    for name in parts:
        (place / name).symlink_to(folder / name)
        assert index[name][2]["type_hint"] == index[name][:2]
    hinted = {name: [None, None, entry[2]] if name in parts else entry for name, entry in index.items()}
    (place / "modular_model_index.json").write_text(json.dumps(hinted))
    pipe = load(place)
    assert torch.equal(pipe.transformer.proj_out.weight, load(folder).transformer.proj_out.weight)
    host = adapt(pipe)
    assert host.name == "my anima" and host.made_of == [("base", "my anima", place)]


@pytest.mark.parametrize("entry", [["transformers", "Qwen3Model"], ["transformers", "logging"], ["transformers"], "x"])
def test_a_folder_whose_tokenizer_is_none_is_refused(entry: Any, folder: Path, tmp_path: Path) -> None:
    index = json.loads((folder / "modular_model_index.json").read_text())
    (tmp_path / "modular_model_index.json").write_text(json.dumps(index | {"tokenizer": entry}))
    for child in folder.iterdir():
        if child.is_dir():
            (tmp_path / child.name).symlink_to(child)
    with pytest.raises(OneStepError, match="'s tokenizer is |has no tokenizer"):
        load(tmp_path)


def test_a_run_from_a_folder_writes_a_file_that_its_own_loader_reads(folder: Path, tmp_path: Path) -> None:
    run: dict[str, Any] = {"pairs": 2, "batch": 2, "steps": 2, "rank": 2, "sizes": "32x32", "preview_samples": 1}
    run |= {"teacher_steps": 2, "watch_every": 2, "watch_samples": 4, "preview_every": 2}
    made = distill(load(folder), ["a cat", "red dog"], "regression", out=tmp_path / "run", **run)
    assert "all 38 layers" in made.check and made.recipe.family == "anima"


def test_what_is_not_served_is_refused_by_name() -> None:
    pipe = make("anima")
    with pytest.raises(OneStepError, match="takes no joint_attention_kwargs"):
        recipe = Recipe.at(FlowSchedule(3.0), torch.tensor([1000.0], dtype=torch.float64), family="anima")
        fast = OneStepPipeline.from_pipe(pipe)
        fast("a cat", recipe=recipe, joint_attention_kwargs={"a": 1}, width=32, height=32)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (
            ["llm_adapter.blocks.0.cross_attn.q_proj.weight"],
            "is an Anima checkpoint, whose text encoder and tokenizers",
        ),
        ([], "is a checkpoint of Cosmos-Predict2, which is not served"),
    ],
)
def test_a_single_file_is_refused_with_what_it_is(more: list[str], why: str, tmp_path: Path) -> None:
    keys = ["blocks.0.mlp.layer1.weight", "blocks.0.adaln_modulation_mlp.1.weight", *more]
    save_file({key: torch.zeros(2, 2) for key in keys}, tmp_path / "a.safetensors")
    with pytest.raises(OneStepError, match=why):
        load(tmp_path / "a.safetensors")


@torch.no_grad()
def test_variety_from_the_base_is_its_guided_steps_and_the_rest() -> None:
    """By hand: Euler from 1 to the hand-over at 0.9 under guidance 4, then 0.9 and 0.75 without."""
    times = torch.tensor([1000.0, 900.0, 750.0], dtype=torch.float64)
    recipe = Recipe.at(FlowSchedule(3.0), times, family="anima", sizes=(SIZE,))
    noise = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(3))
    told: dict[str, Any] = {"recipe": recipe, "base": make("anima"), "base_steps": 4, "guidance": 4.0}
    told |= {"generator": torch.Generator().manual_seed(3), "output_type": "latent"}
    ours = diverse(OneStepPipeline.from_pipe(make("anima")), "a cat", **told).images
    host = adapt(make("anima"))
    cond, null = host.encode(["a cat"], SIZE), host.encode([""], SIZE)

    def found(x: torch.Tensor, sigma: float, text: Any) -> torch.Tensor:
        return host.denoiser(x, torch.tensor([sigma], dtype=torch.float64), text)

    away, x0 = found(noise, 1.0, null), found(noise, 1.0, cond)
    x = noise - 0.1 * (noise - (away + 4.0 * (x0 - away)))
    x = x - 0.15 / 0.9 * (x - found(x, 0.9, cond))
    expected = found(x, 0.75, cond)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4 * float(expected.std()))
