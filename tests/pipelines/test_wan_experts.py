"""Wan 2.2's two experts in diffusers: one is loaded and trained at a time, and both draw what WanPipeline draws with
them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from lora_files import random_lora
from tiny_pipelines import make

from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.core.schedule import FlowSchedule
from onestep.pipelines import draw_by_experts
from onestep.pipelines.adapt import adapt
from onestep.pipelines.load import load
from onestep.pipelines.one_step import OneStepPipeline
from onestep.pipelines.plain import diffusers_settings

SIZE = (48, 32)
TIMES = torch.tensor([1000.0, 937.5, 2500 / 3, 625.0], dtype=torch.float64)


def two() -> Any:
    """The high-noise expert from 0.875 on, the other below."""
    parts = make("wan").components
    made = WanPipeline(**{**parts, "transformer_2": make("wan", seed=1).transformer}, boundary_ratio=0.875)
    made.set_progress_bar_config(disable=True)
    return made


def alone(expert: str) -> Any:
    """A pipeline of one of them."""
    whole = two()
    return WanPipeline(**{**whole.components, "transformer": getattr(whole, expert), "transformer_2": None})


def recipes(**more: Any) -> tuple[Recipe, Recipe]:
    told: dict[str, Any] = {"family": "wan", "sizes": (SIZE,), **more}
    high = Recipe.at(FlowSchedule(5.0), TIMES[:2], **told)
    return replace(high, end=float(TIMES[2])), Recipe.at(FlowSchedule(5.0), TIMES[2:], **told)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A LoRA of each."""
    high, low = recipes()
    return (
        random_lora(alone("transformer"), tmp_path / "high.safetensors", high, size=0.1),
        random_lora(alone("transformer_2"), tmp_path / "low.safetensors", low, size=0.1, seed=2),
    )


def loaded(pair: tuple[Path, Path]) -> tuple[OneStepPipeline, OneStepPipeline]:
    pipe = two()
    high, low = OneStepPipeline.from_pipe(pipe), OneStepPipeline.from_pipe(pipe, transformer=pipe.transformer_2)
    high.load_one_step_lora(pair[0])
    low.load_one_step_lora(pair[1])
    return high, low


def test_both_draw_what_wanpipeline_draws_with_them(pair: tuple[Path, Path], tmp_path: Path) -> None:
    ours = draw_by_experts(*loaded(pair), "a cat", seed=3, output_type="np").images
    plain = two()
    plain.load_lora_weights(str(tmp_path), weight_name=pair[0].name)
    plain.load_lora_weights(str(tmp_path), weight_name=pair[1].name, load_into_transformer_2=True)
    plain.scheduler = FlowMatchEulerDiscreteScheduler.from_config(plain.scheduler.config, shift=1.0)
    own = plain.scheduler.set_timesteps
    sigmas = (TIMES / 1000).tolist()
    plain.scheduler.set_timesteps = lambda steps, device: own(steps, device, sigmas)
    told = {"height": SIZE[1], "width": SIZE[0], "num_frames": 1, "num_inference_steps": 4, "guidance_scale": 1.0}
    theirs = plain("a cat", **told, generator=torch.Generator().manual_seed(3)).frames[:, 0]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * float(np.abs(theirs).max()))
    # the boundary lies between the second step and the third
    switched = two()
    switched.transformer, switched.transformer_2 = switched.transformer_2, switched.transformer
    switched.scheduler = plain.scheduler
    other = switched("a cat", **told, generator=torch.Generator().manual_seed(3)).frames[:, 0]
    assert np.abs(ours - other).max() > 0.01


def test_an_experts_recipe_alone_is_no_picture(pair: tuple[Path, Path]) -> None:
    high, low = loaded(pair)
    with pytest.raises(OneStepError, match="ends at time 833.333, where another of two experts draws on"):
        high("a cat")
    with pytest.raises(OneStepError, match="where another of two experts draws on"):
        diffusers_settings(high.recipe)
    with pytest.raises(OneStepError, match="where another of two experts draws on"):
        high.fast()
    with pytest.raises(OneStepError, match="the first expert's recipe ends at time 0, and the second's begins at 1000"):
        draw_by_experts(low, high, "a cat")


def test_one_is_trained_at_a_time() -> None:
    with pytest.raises(OneStepError, match="has two experts, and one is trained at a time: make a pipeline of"):
        adapt(two())
    for expert in ("transformer", "transformer_2"):
        host = adapt(alone(expert))
        assert torch.equal(host.network.proj_out.weight, getattr(two(), expert).proj_out.weight)


def test_a_folder_of_two_is_loaded_by_the_experts_own(tmp_path: Path) -> None:
    folder = tmp_path / "wan22"
    two().save_pretrained(str(folder))
    with pytest.raises(OneStepError, match="wan22 holds two experts: give wan22/transformer, the high-noise one"):
        load(folder)
    for expert in ("transformer", "transformer_2"):
        pipe = load(folder / expert)
        assert pipe.transformer_2 is None and pipe.config.boundary_ratio is None
        assert torch.equal(pipe.transformer.proj_out.weight, getattr(two(), expert).proj_out.weight)
        assert adapt(pipe).encode(["a cat"], SIZE).text.shape == (1, 512, 32)
