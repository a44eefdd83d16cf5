"""Wan in diffusers as a model of pictures: D is the network's own answer to one frame, texts are 512 tokens, a folder
is loaded, and one file draws one picture by OneStepPipeline and by diffusers alone; so does Wan 2.2's 5B."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanTransformer3DModel
from lora_files import random_lora
from narrowed import narrowed
from safetensors.torch import save_file
from tiny_pipelines import make, randomise

from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.core.schedule import FlowSchedule
from onestep.pipelines import diverse
from onestep.pipelines.adapt import adapt
from onestep.pipelines.load import load
from onestep.pipelines.one_step import OneStepPipeline

SIZE = (48, 32)
PROMPTS = ["a cat", "red dog a cat", ""]


def of_48_channels() -> Any:
    """Wan 2.2's 5B: an autoencoder of 48 channels, a 16th of the side, and a time for each token."""
    pipe = make("wan")
    told = {"z_dim": 48, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
    means = {
        "latents_mean": torch.linspace(-0.9, 1.2, 48).tolist(),
        "latents_std": torch.linspace(0.6, 2.9, 48).tolist(),
    }
    torch.manual_seed(1)
    vae = AutoencoderKLWan(base_dim=4, decoder_base_dim=4, scale_factor_spatial=16, **told, **means)
    network = WanTransformer3DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 32, "ffn_dim": 40},
        **{"num_layers": 1, "in_channels": 48, "out_channels": 48},
    )
    for module in (vae, network):
        randomise(module)
    parts = {**pipe.components, "vae": vae.eval(), "transformer": network.eval()}
    made = type(pipe)(**parts, expand_timesteps=True)
    made.set_progress_bar_config(disable=True)
    return made


MAKERS = {"16 channels": lambda: make("wan"), "48 channels": of_48_channels}
UNIT = {"16 channels": 8, "48 channels": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As diffusers saves it."""
    place = tmp_path_factory.mktemp("wan") / "model"
    make("wan").save_pretrained(str(place))
    return place


@torch.no_grad()
@pytest.mark.parametrize("kind", MAKERS)
def test_d_is_what_its_own_pipeline_asks_of_its_network(kind: str) -> None:
    """pipeline_wan.py: a video of one frame, and 1000 sigma, where tokens have times each the same."""
    pipe = MAKERS[kind]()
    host, size, unit = adapt(pipe), (96, 64), UNIT[kind]
    cond, x = host.encode(PROMPTS[:2], size), torch.randn(2, *host.latent_shape(size))
    assert x.shape == (2, int(kind[:2]), 64 // unit, 96 // unit) and host.denoiser.guidance == "cfg"
    sigma = torch.tensor([0.9, 0.2], dtype=torch.float64)
    times = 1000 * sigma.float()
    if kind == "48 channels":
        times = times[:, None].expand(-1, x.shape[2] * x.shape[3] // 4)
    velocity = pipe.transformer(x[:, :, None], times, cond.text).sample[:, :, 0]
    expected = x - sigma.float()[:, None, None, None] * velocity
    torch.testing.assert_close(host.denoiser(x, sigma, cond), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    with pytest.raises(OneStepError, match=f"multiples of {2 * unit}"):
        host.latent_shape((unit, 64))


@torch.no_grad()
def test_a_text_is_what_its_own_call_makes_of_it() -> None:
    """512 tokens, those behind the text zero; the same alone as among others."""
    pipe = make("wan")
    cond = adapt(pipe).encode(PROMPTS, SIZE)
    assert cond.text.shape == (3, 512, 32) and cond.mask is None and cond.pooled is None
    for row, prompt in enumerate(PROMPTS):
        alone, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)
        torch.testing.assert_close(cond.text[row : row + 1], alone, rtol=0, atol=1e-5 * float(cond.text.abs().max()))
        assert cond.text[row].any(1).sum() == len(prompt.split()) + pipe.tokenizer("").input_ids.count(1)


def test_the_published_scheduler_and_a_flow_schedulers_shift_are_read() -> None:
    assert adapt(make("wan")).denoiser.schedule == FlowSchedule(3.0)
    assert adapt(make("wan", flow_shift=5.0)).denoiser.schedule == FlowSchedule(5.0)


@pytest.mark.parametrize(
    ("kind", "guidance"),
    narrowed([("16 channels", 1.0), ("16 channels", 3.0), ("48 channels", 3.0)], ("16 channels", 3.0)),
)
def test_one_file_draws_one_picture_with_and_without_guidance(kind: str, guidance: float, tmp_path: Path) -> None:
    times = torch.tensor([1000.0, 900.0, 750.0], dtype=torch.float64)
    recipe = Recipe.at(FlowSchedule(3.0), times, family="wan", guidance=guidance, sizes=((64, 32),))
    path = random_lora(MAKERS[kind](), tmp_path / "a.safetensors", recipe, size=0.1)
    fast, plain = OneStepPipeline.from_pipe(MAKERS[kind]()), MAKERS[kind]()
    fast.load_one_step_lora(path)
    ours = fast("a cat", negative_prompt="red dog", seed=3, output_type="np").images
    plain.load_lora_weights(str(tmp_path), weight_name=path.name)
    call = fast.diffusers_settings().apply(plain)
    told = {"prompt": "a cat", "negative_prompt": "red dog", **call, "output_type": "np"}
    theirs = plain(**told, generator=torch.Generator().manual_seed(3)).frames[:, 0]
    assert ours.shape == (1, 32, 64, 3)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * float(np.abs(theirs).max()))
    without = MAKERS[kind]()
    fast.diffusers_settings().apply(without)
    assert np.abs(ours - without(**told, generator=torch.Generator().manual_seed(3)).frames[:, 0]).max() > 0.01


def test_the_script_that_is_printed_draws_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = torch.tensor([900.0, 750.0], dtype=torch.float64)
    recipe = Recipe.at(FlowSchedule(3.0), times, family="wan", sizes=(SIZE,))
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
    pipe, again = load(folder), OneStepPipeline.from_pipe(make("wan"))
    assert type(pipe).__name__ == "WanPipeline" and pipe.transformer.dtype == torch.float32
    recipe = Recipe.at(FlowSchedule(3.0), torch.tensor([1000.0], dtype=torch.float64), family="wan", sizes=(SIZE,))
    wanted = again("a cat", recipe=recipe, seed=1, output_type="np").images
    again.save_pretrained(tmp_path / "saved")
    third = OneStepPipeline.from_pretrained(tmp_path / "saved")
    for drawn in (OneStepPipeline.from_pipe(pipe), third):
        found = drawn("a cat", recipe=recipe, seed=1, output_type="np").images
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    embeds = again.encode_prompt("a cat")[0]
    given = again(prompt_embeds=embeds, recipe=recipe, seed=1, output_type="np").images
    np.testing.assert_allclose(given, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "length"), [("wan", 226), ("anima", 5)])
def test_embeddings_without_all_of_the_zeros_draw_what_their_prompt_does(kind: str, length: int) -> None:
    """Wan's own encode_prompt gives 226 tokens where nobody says how many, and its call reads 512."""
    fast = OneStepPipeline.from_pipe(make(kind))
    recipe = Recipe.at(FlowSchedule(3.0), torch.tensor([1000.0], dtype=torch.float64), family=kind, sizes=((64, 32),))
    told: dict[str, Any] = {"recipe": replace(recipe, guidance=3.0), "seed": 1, "output_type": "latent"}
    texts, negatives, *_ = fast.encode_prompt("a cat", "red")
    assert not texts[:, length:].any() and texts.shape[1] == 512
    short = {"prompt_embeds": texts[:, :length], "negative_prompt_embeds": negatives[:, :length]}
    drawn = fast("a cat", negative_prompt="red", **told).images
    torch.testing.assert_close(fast(**short, **told).images, drawn)


@pytest.mark.parametrize("name", ["Krea2ModularPipeline", "WanModularPipeline"])
def test_a_pipeline_of_blocks_is_refused_with_the_one_that_is_served(name: str) -> None:
    served = name.replace("Modular", "")
    parts = make({"Krea2Pipeline": "krea2", "WanPipeline": "wan"}[served]).components
    pipe = getattr(diffusers, name)()
    pipe.update_components(**{part: value for part, value in parts.items() if value is not None})
    with pytest.raises(OneStepError, match=f"a {name} is put together of blocks.*load it as a {served}"):
        adapt(pipe)


def test_image_to_video_is_refused_by_name_though_its_network_has_one_class() -> None:
    """Wan 2.2's has no picture's embedding, and 20 channels more."""
    pipe = make("wan")
    others = {**pipe.components, "image_processor": None, "image_encoder": None}
    with pytest.raises(OneStepError, match="Wan image-to-video models cannot be adapted yet"):
        adapt(WanImageToVideoPipeline(**others))
    pipe.transformer = WanTransformer3DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 32, "ffn_dim": 40},
        **{"num_layers": 1, "in_channels": 36},
    )
    with pytest.raises(OneStepError, match="36 input channels .*text-to-image base"):
        adapt(pipe)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ([], "is a Wan checkpoint, whose text encoder and tokenizer lie elsewhere"),
        (["vace_patch_embedding.weight"], "is a checkpoint of Wan VACE, which is not served"),
        (["img_emb.proj.0.bias"], "is a checkpoint of Wan image-to-video, which is not served"),
    ],
)
def test_a_single_file_is_refused_with_what_it_is(more: list[str], why: str, tmp_path: Path) -> None:
    keys = ["head.modulation", "blocks.0.self_attn.q.weight", "time_projection.1.weight", *more]
    save_file({key: torch.zeros(2, 2) for key in keys}, tmp_path / "a.safetensors")
    with pytest.raises(OneStepError, match=why):
        load(tmp_path / "a.safetensors")


def test_a_size_of_frames_is_refused_with_what_is_drawn() -> None:
    from onestep.training.settings import size_list

    with pytest.raises(OneStepError, match="832x480x81 is not WIDTHxHEIGHT, but of 81 frames: a run is on pictures"):
        size_list("832x480x81")


@torch.no_grad()
def test_variety_from_the_base_is_its_guided_steps_and_the_rest() -> None:
    """By hand: Euler from 1 to the hand-over at 0.9 under guidance 4, then 0.9 and 0.75 without."""
    times = torch.tensor([1000.0, 900.0, 750.0], dtype=torch.float64)
    recipe = Recipe.at(FlowSchedule(3.0), times, family="wan", sizes=(SIZE,))
    noise = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(3))
    told: dict[str, Any] = {"recipe": recipe, "base": make("wan"), "base_steps": 4, "guidance": 4.0}
    told |= {"generator": torch.Generator().manual_seed(3), "output_type": "latent"}
    ours = diverse(OneStepPipeline.from_pipe(make("wan")), "a cat", **told).images
    host = adapt(make("wan"))
    cond, null = host.encode(["a cat"], SIZE), host.encode([""], SIZE)

    def found(x: torch.Tensor, sigma: float, text: Any) -> torch.Tensor:
        return host.denoiser(x, torch.tensor([sigma], dtype=torch.float64), text)

    away, x0 = found(noise, 1.0, null), found(noise, 1.0, cond)
    x = noise - 0.1 * (noise - (away + 4.0 * (x0 - away)))
    x = x - 0.15 / 0.9 * (x - found(x, 0.9, cond))
    expected = found(x, 0.75, cond)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4 * float(expected.std()))


def test_where_nobody_says_a_size_it_is_its_pipelines() -> None:
    """As the lines for diffusers alone draw it."""
    assert adapt(make("wan")).native_size == (832, 480)
