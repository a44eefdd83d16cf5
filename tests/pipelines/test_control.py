"""A control adapter in diffusers: on plain pipelines and on OneStepPipeline, beside a LoRA; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from onestep.core.adapter_file import save_adapter
from onestep.core.control import ControlAdapter, new_adapter
from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.core.sampling import initial_latents
from onestep.pipelines.adapt import adapt
from onestep.pipelines.control import control_picture, controlled, load_control
from onestep.pipelines.load import load
from onestep.pipelines.one_step import OneStepPipeline

PROMPTS = ["a red potion", "a stone wall"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load("tiny")


@pytest.fixture(scope="module")
def file(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of soft edges, away from its zeros."""
    host = adapt(pipe)
    targets = dict(host.denoiser.roles.targets)
    host.denoiser.roles.remove()
    adapter = new_adapter("unet", targets, ("soft-edges", 1), (32, 32), host.latent_shape((32, 32)), width=16)
    draw = torch.Generator().manual_seed(0)
    for leave in adapter.leave:
        leave.weight.data = 0.2 * torch.randn(leave.weight.shape, generator=draw)
    path = tmp_path_factory.mktemp("control") / "edges.safetensors"
    save_adapter(path, adapter, "unet")
    return path


def drawn(pipe: Any) -> Tensor:
    """Latents of a plain pipeline's two pictures, two guided steps."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "latents": latents, "output_type": "latent"}
    return pipe(PROMPTS, **call).images


def pictures(seed: int = 3) -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_within_the_pipeline_draws_under_the_control_and_after_it_does_not(pipe: Any, file: Path) -> None:
    adapter, plain = load_control(file, pipe), drawn(pipe)
    control = control_picture(adapter, pictures(), extract=True)
    with controlled(pipe, adapter, control, strength=0.0):
        assert torch.equal(drawn(pipe), plain)
    with controlled(pipe, adapter, control):
        found = drawn(pipe)
    assert not torch.allclose(found, plain, atol=1e-2) and torch.equal(drawn(pipe), plain)
    assert not any(module._forward_hooks for module in pipe.unet.modules())
    with controlled(pipe, adapter, control.flip(0)):
        other = drawn(pipe)
    assert not torch.allclose(other, found, atol=1e-2)


def test_in_one_step_it_is_the_hosts_own_answer(pipe: Any, file: Path) -> None:
    """OneStepPipeline within `controlled`, against the role with the side in the host that trains it."""
    host, adapter = adapt(pipe), load_control(file, pipe)
    recipe = Recipe.for_student(host.denoiser.schedule, 1, "unet", ((32, 32),), 0.6)
    control = control_picture(adapter, pictures(), extract=True)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sigma = recipe.levels(host.denoiser.schedule).expand(2)
    host.denoiser.roles.add_module("student", adapter)
    with torch.no_grad(), host.denoiser.roles.use("student", control=control):
        start = initial_latents(host.denoiser.schedule, noise, sigma, recipe.initial_noise_scale)
        wanted = host.denoiser(start, sigma, host.encode(PROMPTS, (32, 32)))
    host.denoiser.roles.remove()
    fast = OneStepPipeline.from_pipe(pipe)
    with controlled(fast, adapter, control):
        found = fast(PROMPTS, recipe=recipe, latents=noise, output_type="latent").images
    assert torch.allclose(found, wanted, atol=1e-4)


def test_a_call_takes_a_control_image(pipe: Any, file: Path) -> None:
    fast = OneStepPipeline.from_pipe(pipe)
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    call = {"recipe": "sd-turbo-1", "latents": noise, "num_images_per_prompt": 2, "output_type": "latent"}
    call |= {"width": 32, "height": 32}
    with pytest.raises(OneStepError, match="call load_control"):
        fast(PROMPTS, control_image=pictures(), **call)
    fast.load_control(file)
    adapter = load_control(file, pipe)
    control = control_picture(adapter, pictures(), extract=True)
    found, plain = fast(PROMPTS, control_image=control, **call).images, fast(PROMPTS, **call).images
    with controlled(fast, adapter, control.repeat_interleave(2, 0)):
        assert torch.equal(fast(PROMPTS, **call).images, found)
    assert not torch.allclose(found, plain, atol=1e-2)
    assert torch.equal(fast(PROMPTS, control_image=control, control_strength=0, **call).images, plain)
    with pytest.raises(OneStepError, match="3 control images for 2 prompts"):
        fast(PROMPTS, control_image=torch.rand(3, 1, 32, 32), **call)
    fast.load_control(None)
    with pytest.raises(OneStepError, match="call load_control"):
        fast(PROMPTS, control_image=control, **call)


def test_it_works_beside_a_lora_of_peft(file: Path) -> None:
    from peft import LoraConfig

    pipe = load("tiny")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["conv_in", "proj_out"], init_lora_weights=False))
    adapter, plain = load_control(file, pipe), drawn(pipe)
    with controlled(pipe, adapter, control_picture(adapter, pictures(), extract=True)):
        assert not torch.allclose(drawn(pipe), plain, atol=1e-2)


def test_pictures_in_every_form(pipe: Any, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter = load_control(file, pipe)
    image = Image.new("RGB", (64, 48), (255, 0, 0))
    assert control_picture(adapter, image).shape == (1, 1, 48, 64)
    assert control_picture(adapter, [image, image], (32, 32)).shape == (2, 1, 32, 32)
    assert "resized from 64x48 to 32x32" in caplog.text
    assert torch.equal(control_picture(adapter, pictures()), pictures().mean(1, keepdim=True))


def test_what_is_refused(pipe: Any, file: Path, tmp_path: Path) -> None:
    adapter = load_control(file, pipe)
    with pytest.raises(OneStepError, match="made for 'unet' models, this one is 'sd3'"):
        load_control(file, load("tiny-flow"))
    config = adapter.config
    wide = [{"name": p.name, "channels": p.channels + 1, "stride": p.stride} for p in config.places]
    save_adapter(
        tmp_path / "wide.safetensors",
        ControlAdapter.from_config(control="canny", channels=1, cell=4, latents=4, places=wide, width=8, depth=1),
        "unet",
    )
    with pytest.raises(OneStepError, match="adds 65 channels to conv_in, this model has 64 channels"):
        load_control(tmp_path / "wide.safetensors", pipe)
    with pytest.raises(OneStepError, match="strength is 11"), controlled(pipe, adapter, pictures(), strength=11):
        pass
    with pytest.raises(OneStepError, match="has 4 channels, this 'soft-edges' adapter takes 1"):
        control_picture(adapter, torch.rand(1, 4, 32, 32))
    with pytest.raises(OneStepError, match="different sizes"):
        control_picture(adapter, [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))])
    with (
        pytest.raises(OneStepError, match="64x64 pixels, the picture to draw 32x32"),
        controlled(pipe, adapter, torch.rand(2, 1, 64, 64)),
    ):
        drawn(pipe)
