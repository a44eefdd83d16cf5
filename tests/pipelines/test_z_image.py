"""Z-Image in diffusers: D is the network's own answer, texts of any lengths share a batch, and one file draws one
picture by OneStepPipeline and by diffusers alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from adapted import SIZE, noisy
from lora_files import random_lora
from tiny_pipelines import make

from onestep.core.errors import OneStepError
from onestep.core.families import detect
from onestep.core.recipe import Recipe
from onestep.core.schedule import FlowSchedule
from onestep.pipelines.adapt import adapt
from onestep.pipelines.one_step import OneStepPipeline

PROMPTS = ["a cat", "red dog " + 20 * "a cat ", "a", "dog a cat"]


@torch.no_grad()
def test_texts_of_any_lengths_share_a_batch_and_are_the_pipelines_own() -> None:
    """7, 47, 6 and 8 tokens: two calls, as one is filled up to 64. By hand as ZImagePipeline asks its network."""
    pipe = make("z_image")
    host = adapt(pipe)
    cond, x = host.encode(PROMPTS, SIZE), noisy(host, 4)
    assert cond.mask is not None and host.denoiser.guidance == "cfg"
    sigma = torch.tensor([0.9, 0.2, 0.5, 1.0], dtype=torch.float64)
    found = host.denoiser(x, sigma, cond)
    texts, _ = pipe.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    for row, text in enumerate(texts):
        minus = pipe.transformer([x[row, :, None]], 1 - sigma[row : row + 1].float(), [text]).sample[0][:, 0]
        expected = x[row] + sigma[row].float() * minus
        assert float((found[row] - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_one_file_draws_one_picture_with_and_without_guidance(guidance: float, tmp_path: Path) -> None:
    """diffusers' own pipeline counts guidance from 0."""
    times = torch.tensor([1000.0, 900.0, 750.0], dtype=torch.float64)
    recipe = Recipe.at(FlowSchedule(3.0), times, family="z_image", guidance=guidance, sizes=(SIZE,))
    path = random_lora(make("z_image"), tmp_path / "a.safetensors", recipe, size=0.1)
    fast, plain = OneStepPipeline.from_pipe(make("z_image")), make("z_image")
    fast.load_one_step_lora(path)
    ours = fast("a cat", negative_prompt="red", seed=3, output_type="np").images
    plain.load_lora_weights(str(tmp_path), weight_name=path.name)
    call = fast.diffusers_settings().apply(plain)
    draw = torch.Generator().manual_seed(3)
    theirs = plain("a cat", negative_prompt="red", generator=draw, output_type="np", **call).images
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * float(np.abs(theirs).max()))
    without = make("z_image")("a cat", generator=torch.Generator().manual_seed(3), output_type="np", **call).images
    assert np.abs(ours - without).max() > 0.01


def test_other_models_of_its_class_are_refused_by_name() -> None:
    network = make("z_image").transformer
    network.siglip_embedder = torch.nn.Linear(2, 2)
    with pytest.raises(OneStepError, match="Z-Image Omni models cannot be adapted yet: use .*Z-Image"):
        detect(network)
