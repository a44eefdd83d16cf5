"""OneStepPipeline's parts: any of diffusers' autoencoders, a safety checker, made of pipelines and made into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderTiny,
    ConsistencyDecoderVAE,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from tiny_ip_adapters import image_processor
from tiny_pipelines import make
from torch import Tensor
from transformers import CLIPConfig

from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.pipelines.adapt import adapt
from onestep.pipelines.one_step import OneStepPipeline

CALL: dict[str, Any] = {"width": 16, "height": 16, "seed": 3}
KINDS = {
    "sd": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
    "sd3": StableDiffusion3Pipeline,
    "flux": FluxPipeline,
}


def recipe(kind: str, **more: Any) -> Recipe:
    family = kind if kind in ("sd3", "flux") else "unet"
    return Recipe((999.0 if family == "unet" else 1000.0,), family=family, **more)


# -- autoencoders -----------------------------------------------------------------------------------------------------


def tiny_vae(seed: int = 0) -> AutoencoderTiny:
    torch.manual_seed(seed)
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(**blocks, **counts, upsampling_scaling_factor=2).eval()


def asymmetric_vae() -> AsymmetricAutoencoderKL:
    torch.manual_seed(0)
    sides = {"down_block_out_channels": (8, 8), "up_block_out_channels": (8, 8), "layers_per_down_block": 1}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AsymmetricAutoencoderKL(
        **sides, **blocks, layers_per_up_block=1, latent_channels=4, norm_num_groups=4, sample_size=16
    ).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_autoencoder_tiny_in_the_vaes_place(kind: str) -> None:
    """Its decoder's picture of the latents, which it neither shifts nor scales."""
    vae = tiny_vae()
    ours = OneStepPipeline.from_pipe(make(kind), vae=vae)
    latents = ours("a", recipe=recipe(kind), output_type="latent", **CALL).images
    found = ours("a", recipe=recipe(kind), output_type="pt", **CALL).images
    with torch.no_grad():
        expected = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    assert found.shape == (1, 3, 16, 16)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_autoencoder_tiny_encodes_what_it_decodes(kind: str) -> None:
    """A host's latents of pictures, as training on data takes them: the encoder's, between -1 and 1."""
    vae, pipe = tiny_vae(), make(kind)
    pipe.register_modules(vae=vae)
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    host = adapt(pipe)
    with torch.no_grad():
        expected = vae.encode(2 * pictures - 1).latents
    torch.testing.assert_close(host.latents_of(pictures), expected, rtol=0, atol=1e-6)
    host.release()


def test_an_asymmetric_autoencoder() -> None:
    """Its configuration has no shift_factor: its latents are scaled alone."""
    vae = asymmetric_vae()
    assert "shift_factor" not in vae.config
    ours = OneStepPipeline.from_pipe(make("sd"), vae=vae)
    latents = ours("a", recipe=recipe("sd"), output_type="latent", **CALL).images
    with torch.no_grad():
        expected = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    found = ours("a", recipe=recipe("sd"), output_type="pt", **CALL).images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_decoder_that_draws_noise_draws_by_the_calls_generator() -> None:
    """ConsistencyDecoderVAE: equal seeds, equal pictures; one generator a picture, one noise a picture."""
    torch.manual_seed(0)
    vae = ConsistencyDecoderVAE(
        encoder_block_out_channels=(8, 8),
        encoder_down_block_types=("DownEncoderBlock2D",) * 2,
        encoder_norm_num_groups=4,
        decoder_block_out_channels=(8, 8),
        decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
        decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2,
        decoder_norm_num_groups=4,
        decoder_layers_per_block=1,
        latent_channels=4,
    ).eval()
    assert isinstance(vae.decoder_unet, UNet2DModel)
    ours = OneStepPipeline.from_pipe(make("sd"), vae=vae)
    call: dict[str, Any] = {"recipe": recipe("sd"), "output_type": "pt", **CALL}
    first, again, other = (ours("a", **{**call, "seed": seed}).images for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    latents = ours("a", **{**call, "output_type": "latent"}).images.repeat(2, 1, 1, 1)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1)]
    host = ours.host(recipe("sd"))
    both = host.decode(latents, generators)
    torch.testing.assert_close(both[0], both[1])
    assert not torch.equal(*host.decode(latents, torch.Generator().manual_seed(1)))


def test_tiles_and_slices() -> None:
    """Tiled decoding at a size above one tile is what the VAE's own gives, and is off again after."""
    ours = OneStepPipeline.from_pipe(make("sd"))
    call: dict[str, Any] = {"recipe": recipe("sd"), "output_type": "pt", "seed": 3, "width": 48, "height": 32}
    plain = ours("a", **call).images
    ours.enable_vae_tiling()
    latents = ours("a", **{**call, "output_type": "latent"}).images
    tiled = ours("a", **call).images
    with torch.no_grad():
        expected = (ours.vae.decode(latents / ours.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert ours.vae.use_tiling
    torch.testing.assert_close(tiled, expected, rtol=0, atol=1e-6)
    assert not torch.equal(tiled, plain)
    ours.disable_vae_tiling()
    torch.testing.assert_close(ours("a", **call).images, plain)
    ours.enable_vae_slicing()
    assert ours.vae.use_slicing
    torch.testing.assert_close(ours("a", **call).images, plain)
    ours.disable_vae_slicing()
    assert not ours.vae.use_slicing and not ours.vae.use_tiling


# -- a safety checker -------------------------------------------------------------------------------------------------


def safety_checker(threshold: float) -> StableDiffusionSafetyChecker:
    """Every picture is above a threshold of -2, none above 2: cosines lie between."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**shape, "image_size": 16, "patch_size": 8}, text_config=shape, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config).eval()
    torch.nn.init.normal_(checker.concept_embeds.data)
    torch.nn.init.normal_(checker.special_care_embeds.data)
    checker.concept_embeds_weights.data.fill_(threshold)
    checker.special_care_embeds_weights.data.fill_(2.0)
    return checker


@pytest.mark.parametrize(("threshold", "black"), [(-2.0, True), (2.0, False)])
def test_a_safety_checker_is_asked(threshold: float, black: bool) -> None:
    parts = {"safety_checker": safety_checker(threshold), "feature_extractor": image_processor()}
    ours = OneStepPipeline.from_pipe(make("sd"), **parts)
    without = OneStepPipeline.from_pipe(make("sd"))("a", recipe=recipe("sd"), output_type="np", **CALL).images
    found = ours(["a", "a"], recipe=recipe("sd"), output_type="np", **CALL)
    assert found.nsfw_content_detected == [black, black]
    assert (float(np.abs(found.images).max()) == 0) == black
    if not black:
        np.testing.assert_allclose(found.images[:1], without, atol=1e-5)
    pictures, flags = ours("a", recipe=recipe("sd"), return_dict=False, **CALL)
    assert len(pictures) == 1 and flags == [black]
    latents = ours("a", recipe=recipe("sd"), output_type="latent", **CALL)
    assert latents.nsfw_content_detected is None and latents.images.abs().max() > 0


def test_a_safety_checker_needs_its_eyes() -> None:
    with pytest.raises(OneStepError, match="looks through a feature_extractor"):
        OneStepPipeline.from_pipe(make("sd"), safety_checker=safety_checker(2.0))


# -- of pipelines and into them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_made_of_a_pipeline_and_made_into_one(kind: str) -> None:
    """The parts are shared, the settings come back, and the pipeline made of it draws as the one it was made of."""
    pipe, cls = make(kind), KINDS[kind]
    ours = OneStepPipeline.from_pipe(pipe, recipe=recipe(kind).to_json())
    assert set(ours.components) == set(pipe.components)
    assert not hasattr(ours, "transformer" if kind in ("sd", "sdxl") else "unet")
    back = cls.from_pipe(ours)
    assert type(back) is cls and all(back.components[name] is part for name, part in pipe.components.items())
    hidden = {name: value for name, value in back.config.items() if not name.startswith("_")}
    assert hidden == {name: value for name, value in pipe.config.items() if not name.startswith("_")}
    again = OneStepPipeline.from_pipe(back)
    assert again.recipe == recipe(kind)
    expected = ours("a", output_type="latent", **CALL).images
    torch.testing.assert_close(again("a", output_type="latent", **CALL).images, expected)
    settings = type(ours.plain()), dict(ours.plain().config)
    assert settings[0] is cls and {name: settings[1][name] for name in hidden} == hidden


def test_settings_survive_the_way_there_and_back() -> None:
    pipe = make("sdxl")
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    ours = OneStepPipeline.from_pipe(pipe)
    assert StableDiffusionXLPipeline.from_pipe(ours).config.force_zeros_for_empty_prompt is False
    assert ours.plain().config.force_zeros_for_empty_prompt is False


def test_from_pipe_casts_only_where_asked() -> None:
    pipe = make("sd").to(torch.bfloat16)
    assert OneStepPipeline.from_pipe(pipe).unet.dtype == torch.bfloat16
    assert OneStepPipeline.from_pipe(pipe, dtype=torch.float32).unet.dtype == torch.float32
    assert OneStepPipeline.from_pipe(pipe, torch_dtype=torch.float16).vae.dtype == torch.float16


@pytest.mark.parametrize(("kind", "other"), [("sd", FluxPipeline), ("sd3", StableDiffusionPipeline)])
def test_another_familys_pipeline_is_not_made(kind: str, other: Any) -> None:
    """diffusers names what it misses, where a part that is only None would be taken for one."""
    with pytest.raises(ValueError, match="expected .* but only"):
        other.from_pipe(OneStepPipeline.from_pipe(make(kind)))


def test_foreign_parts_are_refused() -> None:
    parts = make("sd3").components
    with pytest.raises(OneStepError, match="StableDiffusionPipeline's, which has no transformer"):
        OneStepPipeline(**make("sd").components, transformer=parts["transformer"])


@pytest.mark.parametrize("kind", KINDS)
def test_variants_and_optional_parts_are_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    ours = OneStepPipeline.from_pipe(make(kind), recipe=recipe(kind).to_json())
    expected = ours("a", output_type="latent", **CALL).images
    ours.save_pretrained(tmp_path, variant="fp16")
    again = OneStepPipeline.from_pretrained(tmp_path, variant="fp16", local_files_only=True)
    assert again.recipe == recipe(kind) and set(again.components) == set(ours.components)
    assert all(getattr(again, name) is None for name in ours._optional_components)
    error = (again("a", output_type="latent", **CALL).images - expected).abs().max()
    assert float(error) <= 1e-5 * float(expected.std())


# -- placed and switched ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_offload_knows_every_part(kind: str) -> None:
    """The sequence names each module once, in the order in which a call uses them."""
    ours = OneStepPipeline.from_pipe(make(kind))
    order, seen = ours.model_cpu_offload_seq.split("->"), []
    modules = {name for name, part in ours.components.items() if isinstance(part, torch.nn.Module)}
    assert modules <= set(order) and len(set(order)) == len(order)
    handles = [
        getattr(ours, name).register_forward_pre_hook(lambda *_, name=name: seen.append(name))
        for name in modules - {"vae"}
    ]
    ours("a", recipe=recipe(kind), **CALL)
    for handle in handles:
        handle.remove()
    first = list(dict.fromkeys(seen))
    assert first == [name for name in order if name in first] and set(first) == modules - {"vae"}


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_group_offload_moves_what_it_moves(kind: str) -> None:
    """Pipeline-wide and on a CPU: the picture stays, and no module is moved by hand under its hooks."""
    ours = OneStepPipeline.from_pipe(make(kind))
    expected = ours("a", recipe=recipe(kind), **{**CALL, "output_type": "np"}).images
    ours.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    found = ours("a", recipe=recipe(kind), **{**CALL, "output_type": "np"}).images
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_every_part_takes_the_dtype() -> None:
    ours = OneStepPipeline.from_pipe(make("sdxl")).to(dtype=torch.bfloat16)
    assert {part.dtype for part in ours.components.values() if isinstance(part, torch.nn.Module)} == {torch.bfloat16}
    picture: Tensor = ours("a", recipe=recipe("sdxl"), output_type="pt", **CALL).images
    assert picture.dtype == torch.float32 and bool(picture.isfinite().all())


def test_switches_reach_the_parts() -> None:
    ours = OneStepPipeline.from_pipe(make("sd"))
    call: dict[str, Any] = {"recipe": recipe("sd"), "output_type": "latent", **CALL}
    plain = ours("a", **call).images
    ours.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert not torch.allclose(ours("a", **call).images, plain, atol=1e-3)
    ours.disable_freeu()
    ours.fuse_qkv_projections()
    torch.testing.assert_close(ours("a", **call).images, plain, rtol=0, atol=1e-4)
    ours.unfuse_qkv_projections()
    torch.testing.assert_close(ours("a", **call).images, plain)
    with pytest.raises(OneStepError, match="has no enable_freeu"):
        OneStepPipeline.from_pipe(make("sd3")).enable_freeu(0.9, 0.2, 1.2, 1.4)
