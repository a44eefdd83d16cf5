"""A negative adapter on diffusers networks: the trainer's own numbers, beside LoRAs, and off again without a trace."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import noisy
from loaded_adapters import in_either_order, on_another_checkpoint
from tiny_pipelines import WIDTH, sd, sd3, sdxl
from torch import Tensor

from onestep.core.adapter_file import save_adapter
from onestep.core.cond import Cond
from onestep.core.errors import OneStepError
from onestep.core.negative_adapter import heads_of, new_adapter
from onestep.core.recipe import Recipe
from onestep.pipelines.adapt import adapt, denoiser_of, network_of
from onestep.pipelines.negative_adapter import load_negative_adapter
from onestep.pipelines.one_step import OneStepPipeline

PIPES = {"sd": sd, "sdxl": sdxl}


def text(count: int = 1, length: int = 9, seed: int = 3, width: int | None = None) -> Tensor:
    return torch.randn(count, length, width or WIDTH, generator=torch.Generator().manual_seed(seed))


def made(name: str, folder: Path, seed: int = 0) -> tuple[Any, Any, Path]:
    """A pipeline, an adapter for it away from its start, and its file."""
    torch.manual_seed(seed)
    pipe = PIPES[name]()
    host = adapt(pipe, device="cpu")
    targets = host.denoiser.roles.targets
    side = new_adapter(targets, host.family, heads_of(host.blocks, targets), 1)
    draw = torch.Generator().manual_seed(2)
    for _, value in sorted(side.named_parameters()):
        value.detach().add_(0.4 * torch.randn(value.shape, generator=draw))
    host.release()
    save_adapter(folder / "x.safetensors", side, host.family)
    return pipe, side, folder / "x.safetensors"


def width_of(pipe: Any) -> int:
    return int(pipe.unet.config.cross_attention_dim)


def asked(pipe: Any) -> tuple[Tensor, Tensor, Any]:
    host = adapt(pipe, device="cpu")
    host.release()
    sigma = host.denoiser.schedule.sigma_at(torch.tensor([0.3, 0.8]))
    torch.manual_seed(5)
    return noisy(host), sigma, host.encode(["a cat", "a red dog"], (16, 16))


@torch.no_grad()
def answer(pipe: Any, inputs: tuple[Tensor, Tensor, Any]) -> Tensor:
    """The plain network's, whatever hangs on it."""
    return denoiser_of(pipe)(*inputs)


@torch.no_grad()
@pytest.mark.parametrize("name", PIPES)
def test_it_gives_the_trainers_own_numbers_and_leaves_no_trace(name: str, tmp_path: Path) -> None:
    pipe, side, file = made(name, tmp_path)
    inputs, negative = asked(pipe), text(2, width=width_of(pipe))
    plain = answer(pipe, inputs)
    host = adapt(pipe, device="cpu")
    host.denoiser.roles.add_module("student", side)
    with host.denoiser.roles.use("student", negative=Cond(negative), scale=1.5):
        wanted = host.denoiser(*inputs)
    host.release()
    with load_negative_adapter(pipe, file, negative, scale=1.5) as away:
        found = answer(pipe, inputs)
        assert not torch.allclose(found, plain)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        away.scale = 0
        assert torch.equal(answer(pipe, inputs), plain)
        away.scale, away.negative = 1, None
        assert torch.equal(answer(pipe, inputs), plain)
    assert torch.equal(answer(pipe, inputs), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network_of(pipe).modules())


@torch.no_grad()
def test_negatives_lie_on_their_own_rows(tmp_path: Path) -> None:
    """One for all; one for each prompt, of several pictures in a row; and half of a guided batch."""
    pipe, _, file = made("sd", tmp_path)
    x, sigma, cond = asked(pipe)
    four = (x.repeat_interleave(2, 0), sigma.repeat_interleave(2), cond.repeat(2))
    plain = answer(pipe, four)
    alone = []
    for row in range(2):
        with load_negative_adapter(pipe, file, text(2)[row : row + 1]):
            alone.append(answer(pipe, four))
    with load_negative_adapter(pipe, file, text(2)):
        both = answer(pipe, four)
    torch.testing.assert_close(both, torch.cat([alone[0][:2], alone[1][2:]]), rtol=1e-5, atol=1e-5)
    for rows, first, last in (("first half", alone[0], plain), ("second half", plain, alone[0])):
        with load_negative_adapter(pipe, file, text(2)[:1], rows=rows):  # type: ignore[arg-type]
            torch.testing.assert_close(answer(pipe, four), torch.cat([first[:2], last[2:]]), rtol=1e-5, atol=1e-5)
    with load_negative_adapter(pipe, file, text(3)), pytest.raises(OneStepError, match="there are 3 negatives"):
        answer(pipe, four)


@torch.no_grad()
def test_beside_a_lora_in_either_order(tmp_path: Path) -> None:
    pipe, _, file = made("sd", tmp_path)
    inputs = asked(pipe)
    load = partial(load_negative_adapter, file=file, negative=text())
    in_either_order(lambda: made("sd", tmp_path)[0], load, lambda pipe: answer(pipe, inputs))


@torch.no_grad()
def test_the_pipeline_itself_draws_with_it_on_another_checkpoint(tmp_path: Path) -> None:
    *_, file = made("sd", tmp_path)
    other, *_ = made("sd", tmp_path.parent, seed=9)
    negative = other.encode_prompt("red", "cpu", 1, False)[0]
    on_another_checkpoint(other, lambda pipe: load_negative_adapter(pipe.unet, file, negative))
    with load_negative_adapter(other, file, negative), pytest.raises(OneStepError, match="guidance of its own"):
        other("a cat", num_inference_steps=1, guidance_scale=3.0, height=16, width=16)


@torch.no_grad()
def test_a_one_step_pipeline_draws_with_it(tmp_path: Path) -> None:
    pipe, side, file = made("sd", tmp_path)
    fast, negative = OneStepPipeline.from_pipe(pipe), pipe.encode_prompt("red", "cpu", 1, False)[0]
    recipe = Recipe((624.0,), log_snr=(-0.9,), family="unet", sizes=((16, 16),))

    def draw() -> Tensor:
        return fast(["a cat", "a dog"], recipe=recipe, seed=0, output_type="latent").images

    plain = draw()
    with load_negative_adapter(fast, file, negative, scale=0.5):
        found = draw()
    host = adapt(pipe, device="cpu")
    host.denoiser.roles.add_module("student", side)
    cond = host.encode(["a cat", "a dog"], (16, 16))
    sigma = host.denoiser.schedule.sigma_of_time(torch.tensor([624.0, 624.0], dtype=torch.float64))
    noise = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0))
    with host.denoiser.roles.use("student", negative=Cond(negative), scale=0.5):
        torch.testing.assert_close(found, host.denoiser(noise, sigma, cond), rtol=1e-4, atol=1e-4)
    host.release()
    assert not torch.allclose(found, plain) and torch.equal(draw(), plain)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    pipe, _, file = made("sd", tmp_path)
    with pytest.raises(OneStepError, match="this adapter is for another base"):
        load_negative_adapter(sdxl(), file, text())
    with pytest.raises(OneStepError, match="made for 'unet' models, this one is 'sd3'"):
        load_negative_adapter(sd3(), file, text())
    for scale in (-0.5, 11, float("nan"), "1"):
        with pytest.raises(OneStepError, match="must lie in 0"):
            load_negative_adapter(pipe, file, text(), scale=scale)  # type: ignore[arg-type]
    with pytest.raises(OneStepError, match="tokens are 33 wide, this adapter reads 32"):
        load_negative_adapter(pipe, file, text(width=33))
    for negative in ("red", text()[0], text(0)):
        with pytest.raises(OneStepError, match="give the text's tokens"):
            load_negative_adapter(pipe, file, negative)  # type: ignore[arg-type]
    with pytest.raises(OneStepError, match="choose one of all, first half, second half"):
        load_negative_adapter(pipe, file, text(), rows="last")  # type: ignore[arg-type]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())
    with pytest.raises(OneStepError, match="has no U-Net"):
        load_negative_adapter(object(), file, text())
