"""A guidance adapter on diffusers networks: the trainer's own numbers, beside LoRAs, and off again without a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import noisy
from peft import LoraConfig
from tiny_pipelines import flux, sd, sd3, sdxl
from torch import Tensor

from onestep.core.adapter_file import save_adapter
from onestep.core.errors import OneStepError
from onestep.core.guidance_adapter import new_adapter, with_guidance
from onestep.pipelines.adapt import adapt, denoiser_of, network_of
from onestep.pipelines.guidance_adapter import load_guidance_adapter

PIPES = {"sd": sd, "sdxl": sdxl, "sd3": sd3, "flux": lambda: flux(embedded=False)}
PROMPTS = ["a cat", "a red dog"]


def made(name: str, folder: Path, seed: int = 0) -> tuple[Any, Any, Path]:
    """A pipeline, an adapter for it away from its start, and its file."""
    torch.manual_seed(seed)
    pipe = PIPES[name]()
    host = adapt(pipe, device="cpu")
    side = new_adapter(host.denoiser.roles.targets, host.family, 1)
    draw = torch.Generator().manual_seed(2)
    for _, value in sorted(side.named_parameters()):
        value.detach().add_(0.2 * torch.randn(value.shape, generator=draw))
    host.release()
    save_adapter(folder / "x.safetensors", side, host.family)
    return pipe, side, folder / "x.safetensors"


def asked(pipe: Any) -> tuple[Tensor, Tensor, Any]:
    host = adapt(pipe, device="cpu")
    host.release()
    sigma = host.denoiser.schedule.sigma_at(torch.tensor([0.3, 0.8]))
    torch.manual_seed(5)
    return noisy(host), sigma, host.encode(PROMPTS, (16, 16))


@torch.no_grad()
def answer(pipe: Any, inputs: tuple[Tensor, Tensor, Any]) -> Tensor:
    """The plain network's, whatever hangs on it."""
    return denoiser_of(pipe)(*inputs)


@torch.no_grad()
@pytest.mark.parametrize("name", PIPES)
def test_the_dial_gives_the_trainers_own_numbers_and_leaves_no_trace(name: str, tmp_path: Path) -> None:
    pipe, side, file = made(name, tmp_path)
    inputs = x, sigma, cond = asked(pipe)
    plain = answer(pipe, inputs)
    host = adapt(pipe, device="cpu")
    host.denoiser.roles.add_side("student", side)
    with host.denoiser.roles.use("student"):
        wanted = host.denoiser(x, sigma, with_guidance(cond, 5.0))
    host.release()
    with load_guidance_adapter(pipe, file, guidance=5) as dial:
        found = answer(pipe, inputs)
        assert not torch.allclose(found, plain)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        dial.guidance = 1
        assert torch.equal(answer(pipe, inputs), plain)
    assert torch.equal(answer(pipe, inputs), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network_of(pipe).modules())


@torch.no_grad()
def test_beside_a_lora_in_either_order(tmp_path: Path) -> None:
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_out.0"])
    found = []
    for first in ("adapter", "lora"):
        pipe, _, file = made("sd", tmp_path)
        inputs = asked(pipe)
        plain = answer(pipe, inputs)
        for what in (first, "lora" if first == "adapter" else "adapter"):
            if what == "adapter":
                load_guidance_adapter(pipe, file, guidance=4)
            else:
                torch.manual_seed(3)
                pipe.unet.add_adapter(config)
        found.append(answer(pipe, inputs))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0], plain)


@torch.no_grad()
def test_the_pipeline_itself_draws_with_it_on_another_checkpoint(tmp_path: Path) -> None:
    *_, file = made("sd", tmp_path)
    other, *_ = made("sd", tmp_path.parent, seed=9)
    other.set_progress_bar_config(disable=True)

    def draw() -> Tensor:
        noise = torch.Generator().manual_seed(0)
        told = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16, "output_type": "latent"}
        return other("a cat", generator=noise, **told).images

    plain = draw()
    with load_guidance_adapter(other.unet, file, guidance=3):
        assert not torch.allclose(draw(), plain)
    assert torch.equal(draw(), plain)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    pipe, _, file = made("sd", tmp_path)
    with pytest.raises(OneStepError, match="this adapter is for another base"):
        load_guidance_adapter(sdxl(), file)
    with pytest.raises(OneStepError, match="made for 'unet' models, this one is 'sd3'"):
        load_guidance_adapter(sd3(), file)
    for value in (0.5, 31, float("nan"), "3"):
        with pytest.raises(OneStepError, match="must lie in 1"):
            load_guidance_adapter(pipe, file, guidance=value)  # type: ignore[arg-type]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())
    with pytest.raises(OneStepError, match="has no U-Net"):
        load_guidance_adapter(object(), file)
