"""OneStepPipeline, and the plain diffusers pipeline that draws the same with the settings we print."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from lora_files import random_lora
from narrowed import narrowed
from tiny_pipelines import make
from torch import Tensor

from onestep.core.errors import OneStepError
from onestep.core.lora_file import save_lora
from onestep.core.recipe import PRESETS, Recipe
from onestep.pipelines.adapt import adapt
from onestep.pipelines.one_step import OneStepPipeline
from onestep.pipelines.plain import diffusers_settings

PROMPTS = ["a cat", "red dog"]
CALL: dict[str, Any] = {"width": 16, "height": 16, "output_type": "latent", "num_images_per_prompt": 2}
RENOISED = (1000.0, 500.0)


def latents_of(pipe: Any, images: Tensor) -> Tensor:
    return pipe._unpack_latents(images, 16, 16, pipe.vae_scale_factor) if "Flux" in type(pipe).__name__ else images


# one of those that are drawn alike
ALIKE = {
    replace(recipe, source=""): name
    for name, recipe in reversed(PRESETS.items())
    if recipe.time_scale == 1 and recipe.guidance == 1 and recipe.steps <= 8 and name != "tdm-sd15-4"
}
CASES = [
    *((name, preset) for name in ("sd", "sdxl") for recipe, preset in ALIKE.items() if recipe.family == "unet"),
    ("sd3", "sd3.5-turbo-4"),
    ("flux", "flux-schnell-4"),
    ("sd3", Recipe((1000.0,), family="sd3")),
    ("sd3", Recipe(RENOISED, renoise=True, family="sd3")),
    ("flux", Recipe(RENOISED, renoise=True, family="flux")),
    ("sd", Recipe((999.0,), guidance=2.0)),
    ("sdxl", Recipe((999.0,), guidance=2.0)),
    ("sd3", Recipe((1000.0,), guidance=2.0, family="sd3")),
    ("sd", Recipe((999.0, 499.0), lora_scale=0.5, renoise=True)),
]


DRAWN = [case for case in CASES if case[1] != "tcd-4"]
USUAL = [case for case in DRAWN if isinstance(case[1], Recipe) or ("sdxl" in case[1]) == (case[0] == "sdxl")]
LIKE_ANOTHER = ("hyper-sd-2-lora", "hyper-sd-8-lora", "dmd2-1", "sdxl-lightning-2", "sdxl-lightning-8")
KEPT = [case for case in USUAL if case[1] not in LIKE_ANOTHER]


@pytest.mark.parametrize(("name", "recipe"), narrowed(DRAWN, *KEPT[::4]))
def test_plain_diffusers_draws_the_same_picture(name: str, recipe: Recipe | str, tmp_path: Path) -> None:
    """The file through `load_lora_weights` and the scheduler that we print: 1e-5 of the latents' std."""
    file = random_lora(make(name), tmp_path / "x.safetensors", None)
    ours = OneStepPipeline.from_pipe(make(name))
    without = ours(PROMPTS, recipe=recipe, generator=torch.Generator().manual_seed(3), **CALL).images
    found = ours.load_one_step_lora(file, recipe)
    drawn = ours(PROMPTS, generator=torch.Generator().manual_seed(3), **CALL).images

    pipe = make(name)
    pipe.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    if found.lora_scale != 1:
        pipe.fuse_lora(lora_scale=found.lora_scale)
    arguments = ours.diffusers_settings().apply(pipe)
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(PROMPTS)
    torch.manual_seed(3)
    plain = latents_of(pipe, pipe(PROMPTS, **{**CALL, **arguments}).images)
    error = float((drawn - plain).abs().max() / plain.std())
    effect = float((drawn - without).abs().max() / plain.std())
    assert error <= 1e-5 and effect >= 1e-3, (error, effect)


@pytest.mark.parametrize("name", ["hyper-sd-12-cfg", "pcm-16", "pcm-16-cfg", "tdm-sd15-4", "nitrosd-vibrant-1"])
def test_what_no_scheduler_of_diffusers_draws_is_refused(name: str) -> None:
    """DDIM from 916 goes to 916 - 1000 // 12 = 833 and reads the network at 832."""
    with pytest.raises(OneStepError, match="no scheduler of diffusers .*draw with OneStepPipeline"):
        diffusers_settings(PRESETS[name])


def test_tcd_ends_at_its_lowest_level() -> None:
    """diffusers' TCDScheduler ends at time 0, whose noise is left in: a_0 x0 + s_0 eps, where the recipe gives x0."""
    ours, pipe = OneStepPipeline.from_pipe(make("sd")), make("sd")
    x0 = ours(PROMPTS, recipe="tcd-4", seed=3, **CALL).images
    arguments = ours.diffusers_settings("tcd-4").apply(pipe)
    asked: list[Tensor] = []
    pipe.unet.register_forward_hook(lambda _, given, answer: asked.append(answer[0]))
    torch.manual_seed(3)
    plain = pipe(PROMPTS, **{**CALL, **arguments}).images
    abar = float(pipe.scheduler.alphas_cumprod[0])
    expected = abar**0.5 * x0 + (1 - abar) ** 0.5 * asked[-1]
    assert len(asked) == 4
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5 * float(plain.std()))


@pytest.mark.parametrize("name", narrowed(["sd", "sdxl", "sd3"], "sd", "sd3"))
def test_the_printed_script_runs(name: str, tmp_path: Path) -> None:
    """Word for word, from a folder and a file, it draws our picture."""
    pipe = make(name)
    family = "sd3" if name == "sd3" else "unet"
    recipe = Recipe((1000.0 if name == "sd3" else 999.0,), family=family, sizes=((16, 16),), lora_scale=0.5)
    file = random_lora(pipe, tmp_path / "x.safetensors", recipe)
    pipe.save_pretrained(tmp_path / "model")
    ours = OneStepPipeline.from_pipe(pipe)
    ours.load_one_step_lora(file)
    picture = np.asarray(ours("a cat", seed=0).images[0])
    script = ours.diffusers_settings().script(pipe, str(tmp_path / "model"), str(file), "a cat", recipe.lora_scale)
    assert len(script.splitlines()) <= 10 and "onestep" not in script
    space: dict[str, Any] = {}
    exec(script.replace("picture.png", str(tmp_path / "picture.png")), space)
    from PIL import Image

    drawn = np.asarray(Image.open(tmp_path / "picture.png"))
    assert picture.shape == drawn.shape == (16, 16, 3)
    assert np.abs(picture.astype(int) - drawn.astype(int)).max() <= 1


def test_starting_noise_of_another_size_is_printed_too() -> None:
    recipe = Recipe((999.0,), 0.5)
    ours, pipe = OneStepPipeline.from_pipe(make("sd")), make("sd")
    drawn = ours(PROMPTS[0], recipe=recipe, seed=0, **{**CALL, "num_images_per_prompt": 1}).images
    settings = ours.diffusers_settings(recipe)
    assert settings.latents_scale == 0.5
    arguments = settings.apply(pipe)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = pipe(PROMPTS[0], latents=0.5 * noise, output_type="latent", **arguments).images
    torch.testing.assert_close(drawn, plain, rtol=0, atol=1e-5 * float(plain.std()))


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (Recipe((999.0, 300.0)), "999, 300"),
        (Recipe(RENOISED, eta=0.3, family="sd3"), "eta 0.3"),
    ],
)
def test_what_diffusers_cannot_draw_is_said(recipe: Recipe, why: str) -> None:
    with pytest.raises(OneStepError, match=why):
        diffusers_settings(recipe)


# -- a pipeline like any other ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", narrowed(["sd", "sdxl", "sd3", "flux"], "sd", "sd3"))
def test_saved_and_loaded_it_draws_the_same(name: str, tmp_path: Path) -> None:
    preset = {"sd3": "sd3.5-turbo-4", "flux": "flux-schnell-4"}.get(name, "sd-turbo-1")
    ours = OneStepPipeline(**OneStepPipeline.from_pipe(make(name)).components, recipe=preset)
    expected = ours(PROMPTS, seed=1, width=16, height=16, output_type="np").images
    assert expected.shape == (2, 16, 16, 3) and expected.std() > 0.01
    ours.save_pretrained(tmp_path)
    again = OneStepPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert again.recipe == PRESETS[preset]
    np.testing.assert_array_equal(again(PROMPTS, seed=1, width=16, height=16, output_type="np").images, expected)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_familys_own_folder_is_read(name: str, tmp_path: Path, root: Path) -> None:
    pipe = make(name)
    pipe.save_pretrained(tmp_path)
    recipe = "sd-turbo-1" if name == "sd" else "sd3.5-turbo-4"
    expected = OneStepPipeline.from_pipe(pipe)("a", recipe=recipe, seed=1, **CALL).images
    for loaded in (
        OneStepPipeline.from_pretrained(tmp_path, local_files_only=True),
        DiffusionPipeline.from_pretrained(
            tmp_path,
            custom_pipeline=str(root / "pipelines" / "custom"),
            local_files_only=True,
            trust_remote_code=True,
        ),
    ):
        assert type(loaded).__name__ == "OneStepPipeline"
        torch.testing.assert_close(loaded("a", recipe=recipe, seed=1, **CALL).images, expected)


def test_from_pipe_shares_every_part() -> None:
    pipe = make("sd").to(torch.float16)
    ours = OneStepPipeline.from_pipe(pipe)
    assert ours.unet is pipe.unet and ours.vae is pipe.vae and ours.unet.dtype == torch.float16


def test_output_types_and_seeds() -> None:
    ours = OneStepPipeline.from_pipe(make("sd"))
    pil = ours("a cat", recipe="sd-turbo-1", seed=5, num_images_per_prompt=3).images
    assert len(pil) == 3 and pil[0].size == (16, 16)
    tensor = ours("a cat", recipe="sd-turbo-1", seed=5, output_type="pt", num_images_per_prompt=3, return_dict=False)[0]
    assert tensor.shape == (3, 3, 16, 16)
    np.testing.assert_allclose(np.asarray(pil[2]) / 255, tensor[2].permute(1, 2, 0).numpy(), atol=0.5 / 255 + 1e-6)
    generator = torch.Generator().manual_seed(5)
    same = ours("a cat", recipe="sd-turbo-1", generator=generator, output_type="pt", num_images_per_prompt=3).images
    torch.testing.assert_close(same, tensor)
    wide = ours("a cat", recipe="sd-turbo-1", seed=0, width=32, height=24).images[0]
    assert wide.size == (32, 24)


def test_the_recipe_comes_from_the_file(tmp_path: Path) -> None:
    recipe = Recipe((999.0, 499.0), renoise=True, lora_scale=0.5, sizes=((24, 16),))
    file = random_lora(make("sd"), tmp_path / "x.safetensors", recipe)
    ours = OneStepPipeline.from_pipe(make("sd"))
    with pytest.raises(OneStepError, match="name a preset"):
        ours("a")
    assert ours.load_one_step_lora(file) == recipe == ours.recipe
    assert ours("a", seed=0).images[0].size == (24, 16)
    scales = {module.scaling["onestep"] for module in ours.unet.modules() if hasattr(module, "lora_A")}
    assert scales == {0.5}
    ours.unload_lora_weights()
    assert not any(hasattr(module, "lora_A") for module in ours.unet.modules())


def test_flux_is_told_the_guidance_it_was_distilled_at(tmp_path: Path) -> None:
    pipe = make("flux")
    ours = OneStepPipeline.from_pipe(pipe)
    call = {**CALL, "num_images_per_prompt": 1, "seed": 0}
    usual = ours("a", recipe="flux-schnell-4", **call).images
    host = adapt(pipe)
    host.denoiser.roles.add("student", 1, 0)
    state, recipe = host.denoiser.roles.state("student"), PRESETS["flux-schnell-4"].to_json()
    save_lora(tmp_path / "x.safetensors", state, "flux", recipe, {"onestep.settings": '{"guidance": 1.5}'})
    host.release()
    ours.load_one_step_lora(tmp_path / "x.safetensors")  # B = 0: the guidance alone makes the difference
    told = ours("a", **call).images
    assert ours.config.embedded_guidance == 1.5 and (told - usual).abs().max() > 1e-3
    arguments = ours.diffusers_settings().apply(pipe)
    torch.manual_seed(0)
    plain = latents_of(pipe, pipe("a", **{**CALL, "num_images_per_prompt": 1}, **arguments).images)
    torch.testing.assert_close(told, plain, rtol=0, atol=1e-5 * float(plain.std()))


def test_a_foreign_file_needs_a_preset(tmp_path: Path) -> None:
    file = random_lora(make("sd"), tmp_path / "foreign.safetensors", None)
    ours = OneStepPipeline.from_pipe(make("sd"))
    with pytest.raises(OneStepError, match="no recipe in its header: give its recipe.*one of sd-turbo-1, .* and more"):
        ours.load_one_step_lora(file)
    with pytest.raises(OneStepError, match="no recipe 'dmd'"):
        ours.load_one_step_lora(file, "dmd")
    with pytest.raises(OneStepError, match="'flux', this model is 'unet'"):
        ours.load_one_step_lora(file, "flux-schnell-4")
    assert ours.load_one_step_lora(file, "dmd2-1").timesteps == (399.0,)


def test_a_public_file_is_known_by_its_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And it is said; another recipe may be given, and where a name does not decide, one has to be."""
    file = random_lora(make("sd"), tmp_path / "Hyper-SD15-8steps-lora.safetensors", None)
    ours = OneStepPipeline.from_pipe(make("sd"))
    with caplog.at_level(logging.WARNING):
        assert ours.load_one_step_lora(file) == PRESETS["hyper-sd-8-lora"] == ours.recipe
    assert "is taken for hyper-sd-8-lora, by its name; recipe=... says otherwise" in caplog.text
    assert ours.load_one_step_lora(file, "dmd2-4") == PRESETS["dmd2-4"]
    both = file.rename(tmp_path / "hyper_lightning_8step.safetensors")
    with pytest.raises(OneStepError, match="may be one of sdxl-lightning-8, hyper-sd-8-lora, by its name: give its"):
        ours.load_one_step_lora(both)


def test_nitrosds_times_are_a_share_of_its_levels_own() -> None:
    """The U-Net is given 249 and 124 of 999 and 499, and nothing else is another than without the share."""
    ours, given = OneStepPipeline.from_pipe(make("sdxl")), []
    hook = ours.unet.register_forward_pre_hook(lambda _, told: given.append(float(told[1].flatten()[0])))
    shared = ours(PROMPTS, recipe="nitrosd-realism-2", seed=3, **CALL).images
    hook.remove()
    assert given == [249, 124]
    plain = ours(PROMPTS, recipe=PRESETS["nitrosd-realism-2"].of_base, seed=3, **CALL).images
    forward, times = ours.unet.forward, {999.0: 249, 499.0: 124}
    ours.unet.forward = lambda x, time, *more, **told: forward(  # type: ignore[method-assign]
        x, torch.full_like(time, times[float(time.flatten()[0])]), *more, **told
    )
    scaled = ours(PROMPTS, recipe=PRESETS["nitrosd-realism-2"].of_base, seed=3, **CALL).images
    torch.testing.assert_close(shared, scaled, rtol=0, atol=1e-5 * float(shared.std()))
    assert float((shared - plain).abs().max()) > 1e-3 * float(plain.std())
    with pytest.raises(OneStepError, match="gives the network 0.25 of each time"):
        ours.diffusers_settings("nitrosd-realism-2")


def test_a_file_of_another_base_is_refused(tmp_path: Path) -> None:
    file = random_lora(make("sd3"), tmp_path / "x.safetensors", PRESETS["sd3.5-turbo-4"])
    with pytest.raises(OneStepError, match="SD3"):
        OneStepPipeline.from_pipe(make("sd")).load_one_step_lora(file)
    with pytest.raises(OneStepError, match="Cannot read"):
        OneStepPipeline.from_pipe(make("sd")).load_one_step_lora(tmp_path / "absent.safetensors")
