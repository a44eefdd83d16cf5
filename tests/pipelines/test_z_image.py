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
from onestep.core.features import Features
from onestep.core.recipe import Recipe
from onestep.core.schedule import FlowSchedule
from onestep.pipelines.adapt import adapt, network_of
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


def test_embeddings_of_several_lengths_draw_what_their_prompts_do() -> None:
    """A list, [L, C] of each text, as ZImagePipeline has them; of a negative too. None but Z-Image takes one."""
    fast = OneStepPipeline.from_pipe(make("z_image"))
    times = torch.tensor([1000.0, 750.0], dtype=torch.float64)
    told = {"recipe": Recipe.at(FlowSchedule(3.0), times, family="z_image", guidance=3.0, sizes=(SIZE,))}
    told |= {"seed": 3, "output_type": "latent"}
    drawn = fast(PROMPTS, negative_prompt="red", **told).images
    texts, negatives, *pooled = fast.encode_prompt(PROMPTS, "red")
    assert [len(text) for text in texts] == [7, 47, 6, 8] and pooled == [None, None]
    assert torch.equal(fast(prompt_embeds=texts, negative_prompt_embeds=negatives, **told).images, drawn)
    theirs, _ = make("z_image").encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert all(torch.equal(mine, other) for mine, other in zip(texts, theirs, strict=True))
    with pytest.raises(OneStepError, match=r"prompt_embeds is \[7, 9\], this model reads \[tokens, "):
        fast(prompt_embeds=[torch.zeros(7, 9)], **told)


@pytest.mark.parametrize("name", ["sd", "flux", "z_image"])
def test_another_models_text_encoder_is_refused(name: str) -> None:
    """In each family, before a run makes anything of its texts."""
    pipe = make(name)
    network = network_of(pipe)
    entry = {"sd": "cross_attention_dim", "flux": "joint_attention_dim", "z_image": "cap_feat_dim"}[name]
    width = network.config[entry]
    network.register_to_config(**{entry: 2 * width})
    with pytest.raises(
        OneStepError, match=f"tokens of {width} numbers, .* reads {2 * width}: load its own text encoder"
    ):
        adapt(pipe).texts(["a cat"])


@pytest.mark.parametrize(
    ("channels", "why"), [(8, "latents of 8 channels, and the VAE's have 4"), (33, "latents of 33 channels")]
)
def test_inpainting_and_others_vaes_are_refused(channels: int, why: str) -> None:
    pipe = make("z_image")
    pipe.transformer.register_to_config(in_channels=channels)
    with pytest.raises(OneStepError, match=f"this transformer takes {why}.* use a text-to-image base"):
        adapt(pipe)


def test_features_of_texts_of_any_lengths_are_those_of_each_alone() -> None:
    """Two calls, whose rows come back in the batch's order; gradients in x too."""
    host = adapt(make("z_image"))
    roles, cond = host.denoiser.roles, host.encode(PROMPTS, SIZE)
    features = Features(roles.targets, host.blocks, 2, roles.active_here)
    x = noisy(host, 4).requires_grad_()
    sigma = torch.tensor([0.9, 0.2, 0.5, 1.0], dtype=torch.float64)

    def seen(rows: slice) -> list[torch.Tensor]:
        with features.kept(x[rows]) as found:
            host.denoiser(x[rows], sigma[rows], cond[rows])
        return found

    together, alone = seen(slice(None)), [seen(slice(row, row + 1)) for row in range(4)]
    assert len(together) == 2 and float((together[0][0] - together[0][1]).abs().max()) > 0.1
    for place, value in enumerate(together):
        wanted = torch.cat([found[place] for found in alone])
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
        weight = torch.linspace(-1, 1, value.numel()).view(value.shape)
        (ours,), (theirs,) = (
            torch.autograd.grad((weight * each).sum(), x, retain_graph=True) for each in (value, wanted)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_other_models_of_its_class_are_refused_by_name() -> None:
    network = make("z_image").transformer
    network.siglip_embedder = torch.nn.Linear(2, 2)
    with pytest.raises(OneStepError, match="Z-Image Omni models cannot be adapted yet: use .*Z-Image"):
        detect(network)
