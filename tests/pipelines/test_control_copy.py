"""A copy of a U-Net's encoder against diffusers' own ControlNetModel: its numbers, its file, its start, its call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionControlNetPipeline
from tiny_pipelines import randomise, sd, sdxl, unet
from torch import Tensor

from onestep.core.adapter_file import load_adapter, save_adapter
from onestep.core.control_copy import MAKERS, ControlCopy, new_copy, vector_of
from onestep.core.errors import OneStepError
from onestep.core.families import unet_parts
from onestep.core.tensor_file import read_tensors
from onestep.pipelines.adapt import adapt
from onestep.pipelines.control import controlled, load_control
from onestep.training.distil import distil
from onestep.training.methods import settings_for
from onestep.training.methods.nct import adapter as control_adapter

WIDTHS = (4, 4, 8, 24)
"""Of the control's encoder beside a first layer of 32 channels."""


def made(make: Any) -> Any:
    """A pipeline of random weights whose U-Net's norms have 32 groups and whose latents are an eighth of its pictures,
    as the published ones'."""
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "latent_channels": 4}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae, pipe = AutoencoderKL(**blocks, **kinds), make()
    pipe = type(pipe)(**{**pipe.components, "vae": vae, "unet": wide(make is sdxl)})
    randomise(pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wide(xl: bool) -> Any:
    return unet(xl, block_out_channels=(32, 64), norm_num_groups=32)


def copied(host: Any, seed: int = 0, factors: Any = None, stirred: bool = True) -> ControlCopy:
    targets = host.denoiser.roles.targets
    copy = new_copy(targets, unet_parts(host.network), ("canny", 1), 8, factors or {}, seed=seed)
    draw = torch.Generator().manual_seed(3)
    for name, value in copy.named_parameters():
        if stirred and name.startswith(("controlnet_down", "controlnet_mid")):
            value.data = 0.1 * torch.randn(value.shape, generator=draw)
    return copy.requires_grad_(False)


def theirs(host: Any, copy: ControlCopy) -> ControlNetModel:
    """diffusers' ControlNet of the same U-Net, with the copy's numbers: all of them, under their own names."""
    net = ControlNetModel.from_unet(host.network, conditioning_embedding_out_channels=WIDTHS)
    net.load_state_dict(copy.state_dict(), strict=True)
    return net.eval()


def asked(host: Any, rows: int = 2) -> tuple[Tensor, Tensor, Tensor, Any]:
    """(x, sigma, control, cond)."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 4, 8, 8, generator=draw)
    control = (torch.rand(rows, 1, 64, 64, generator=draw) > 0.8).float()
    sigma = host.denoiser.schedule.sigma_of_time(torch.tensor([600.0, 200.0], dtype=torch.float64))
    return x, sigma, control, host.encode(["a red potion", "a stone wall"], (64, 64))


@pytest.fixture(scope="module", params=[sd, sdxl], ids=["sd15", "sdxl"])
def host(request: pytest.FixtureRequest) -> Any:
    return adapt(made(request.param))


def test_it_is_diffusers_own_controlnet(host: Any) -> None:
    copy = copied(host)
    net, (x, sigma, control, cond) = theirs(host, copy), asked(host)
    time = host.denoiser.schedule.time_of_sigma(sigma).float()
    more = {"text_embeds": cond.pooled, "time_ids": cond.size} if cond.size is not None else None
    with torch.no_grad():
        colours = control.expand(-1, 3, -1, -1)
        skips, middle = net(x, time, cond.text, colours, added_cond_kwargs=more, return_dict=False)
        found = copy(x, time, cond.text, control, vector=vector_of(cond, copy.config.vector))
        wanted = host.network(
            x, time, cond.text, None, None, None, None, more, tuple(skips), middle, return_dict=False
        )[0]
        plain = host.network(x, time, cond.text, added_cond_kwargs=more, return_dict=False)[0]
    assert len(found) == len(skips) + 1
    for ours, one in zip(found, [*skips, middle], strict=True):
        torch.testing.assert_close(ours, one, rtol=1e-4, atol=1e-5)
    assert [list(p.shape[1:2]) for p in found] == [[place.channels] for place in copy.config.places]
    roles = host.denoiser.roles
    roles.add_module("copied", copy)
    with torch.no_grad(), roles.use("copied", control=control):
        answer = host.denoiser(x, sigma, cond)
    roles.drop("copied")
    level = sigma.float()[:, None, None, None]
    torch.testing.assert_close(answer, (x - level * wanted) / (1 - level**2).sqrt(), rtol=1e-4, atol=1e-4)
    assert float((wanted - plain).abs().max()) > 1e-2


def test_a_new_one_is_the_base_with_its_lora_and_changes_nothing(host: Any) -> None:
    roles, (x, sigma, control, cond) = host.denoiser.roles, asked(host)
    roles.add("tuned", 2, 0)
    for _, b in roles.state("tuned").values():
        b.normal_(generator=torch.Generator().manual_seed(2)).mul_(0.1)
    copy = copied(host, factors=roles.state("tuned"), stirred=False)
    a, b = roles.state("tuned")["mid_block.resnets.0.conv1"]
    wanted = host.network.mid_block.resnets[0].conv1.weight + torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
    torch.testing.assert_close(copy.mid_block.resnets[0].conv1.weight, wanted)
    norm = "down_blocks.0.resnets.0.norm1.weight"
    assert torch.equal(copy.state_dict()[norm], host.network.state_dict()[norm])
    with torch.no_grad():
        with roles.use("tuned"):
            plain = host.denoiser(x, sigma, cond)
        roles.add_module("tuned", copy)
        with roles.use("tuned", control=control):
            assert torch.equal(host.denoiser(x, sigma, cond), plain)
    roles.drop("tuned")
    colours = copy.controlnet_cond_embedding(copy._hint(control, x))
    assert float(colours.std()) > 0.01, "the zero convolutions see the control from the start"


def test_its_file_is_a_controlnet(host: Any, tmp_path: Path) -> None:
    copy, path = copied(host), tmp_path / "copy.safetensors"
    save_adapter(path, copy, "unet")
    net = ControlNetModel.from_unet(host.network, conditioning_embedding_out_channels=WIDTHS)
    net.load_state_dict(read_tensors(path), strict=True)
    again = load_adapter(path, MAKERS, "unet").module
    for name, value in again.state_dict().items():
        assert torch.equal(value, copy.state_dict()[name])
    assert again.config == copy.config


def test_the_plain_pipeline_draws_with_it_as_diffusers_controlnet_does(tmp_path: Path) -> None:
    pipe = made(sd)
    host = adapt(pipe)
    copy = copied(host)
    host.denoiser.roles.remove()
    save_adapter(tmp_path / "copy.safetensors", copy, "unet")
    parts = {**pipe.components, "controlnet": theirs(host, copy)}
    with_net = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    with_net.set_progress_bar_config(disable=True)
    control = asked(host)[2][:1]
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent", "height": 64, "width": 64}
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    wanted = with_net("a red potion", image=control.expand(-1, 3, -1, -1), latents=latents, **call).images
    adapter = load_control(tmp_path / "copy.safetensors", pipe)
    with controlled(pipe, adapter, control):
        found = pipe("a red potion", latents=latents, **call).images
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(pipe("a red potion", latents=latents, **call).images, wanted, atol=1e-2)
    with controlled(pipe, adapter, control, strength=0.5):
        half = pipe("a red potion", latents=latents, **call).images
    with controlled(with_net, adapter, control):
        both = with_net("a red potion", image=control.expand(-1, 3, -1, -1), latents=latents, **call).images
    for strength, ours in ((0.5, half), (2.0, both)):
        theirs_too = with_net(
            "a red potion",
            image=control.expand(-1, 3, -1, -1),
            latents=latents,
            controlnet_conditioning_scale=strength,
            **call,
        ).images
        torch.testing.assert_close(ours, theirs_too, rtol=1e-3, atol=1e-4)


def test_a_run_trains_one(tmp_path: Path) -> None:
    """From a one-step LoRA's numbers, by the command's own way; its file is a ControlNet that acts."""
    pipe, prompts = made(sd), ["a red potion", "a stone wall", "a gold ring"]
    more = {"batch": 2, "sizes": "64x64", "watch_every": 0, "preview_every": 0, "rank": 2, "warm_up": 1, "pairs": 2}
    first = distil(
        adapt(pipe), prompts, settings_for(method="regression", steps=1, teacher_steps=1, **more), tmp_path / "a"
    )
    settings = settings_for(
        method="nct", steps=3, control_form="copy", initial_lora=str(first.path), learning_rate=1e-2, **more
    )
    result = distil(adapt(pipe), prompts, settings, tmp_path / "b")
    assert "bit for bit" in result.check
    host = adapt(pipe)
    net = ControlNetModel.from_unet(host.network, conditioning_embedding_out_channels=WIDTHS)
    net.load_state_dict(read_tensors(result.path), strict=True)
    x, sigma, control, cond = asked(host)
    with torch.no_grad():
        skips, middle = net(x, 500, cond.text, control.expand(-1, 3, -1, -1), return_dict=False)
    assert min(float(skip.abs().max()) for skip in (*skips, middle)) > 1e-4


def test_the_setting_makes_one_and_bad_ones_are_refused(host: Any) -> None:
    host.denoiser.roles.load("student", {})
    settings = settings_for(method="nct", control_form="copy", control="mask", sizes="64x64")
    copy = control_adapter(host, settings)
    assert isinstance(copy, ControlCopy) and copy.config.cell == 8 and copy.config.channels == 4
    host.denoiser.roles.drop("student")
    config = copy.config.__dict__
    for broken in (
        {"levels": ()},
        {"latents": 0},
        {"vector": -1},
        {"middle": {**config["middle"].__dict__, "width": 33}},
    ):
        plain = {**config, "levels": [level.__dict__ for level in config["levels"]]}
        plain["middle"] = config["middle"].__dict__
        with pytest.raises(OneStepError, match="no copy of a U-Net"):
            ControlCopy.from_config(**{**plain, **broken})
    narrow = {name: target for name, target in host.denoiser.roles.targets.items() if "attn" in name}
    with pytest.raises(OneStepError, match="set targets to all"):
        new_copy(narrow, unet_parts(host.network), ("canny", 1), 8, {})
