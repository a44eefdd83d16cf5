"""A diffusers pipeline behind the contract: D is the network's own answer, gradients are right, weights exist once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from adapted import SIZE, noisy, with_student
from tiny_pipelines import MAKERS, make
from torch import Tensor

from onestep.core.cond import Cond
from onestep.core.errors import OneStepError
from onestep.pipelines.adapt import adapt
from onestep.pipelines.patches import pack, unpack
from onestep.pipelines.schedules import schedule_of

FAMILIES = list(MAKERS)
RESCALED = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
PREDICTIONS = [
    ("sd", {}),
    ("sd", {"prediction_type": "v_prediction"}),
    ("sd", {"prediction_type": "sample"}),
    ("sd", RESCALED),
    ("sdxl", {}),
    ("sdxl", {"beta_schedule": "linear"}),
    ("sdxl", {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}),
    ("sd3", {}),
    ("flux", {}),
]


def asked_by_hand(pipe: Any, name: str, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """The network called as diffusers' own pipelines call it."""
    if name == "sd":
        return pipe.unet(x, time, encoder_hidden_states=cond.text).sample
    if name == "sdxl":
        more = {"text_embeds": cond.pooled, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * len(x))}
        return pipe.unet(x, time, encoder_hidden_states=cond.text, added_cond_kwargs=more).sample
    if name == "sd3":
        return pipe.transformer(x, cond.text, cond.pooled, time).sample
    h, w = x.shape[2:]
    answer = pipe.transformer(
        pipe._pack_latents(x, len(x), x.shape[1], h, w), cond.text, cond.pooled, time / 1000,
        img_ids=pipe._prepare_latent_image_ids(len(x), h // 2, w // 2, x.device, x.dtype),
        txt_ids=torch.zeros(cond.text.shape[1], 3), guidance=torch.full((len(x),), 3.5),
    ).sample  # fmt: skip
    return pipe._unpack_latents(answer, SIZE[1], SIZE[0], pipe.vae_scale_factor)


def x0_by_hand(pipe: Any, x: np.ndarray, answer: np.ndarray, time: int) -> np.ndarray:
    """From the definitions: x = a x0 + s eps, v = a eps - s x0; flow: x = (1 - t) x0 + t n, v = n - x0."""
    config = pipe.scheduler.config
    if "shift" in config:
        return x - time / 1000 * answer
    abar = pipe.scheduler.alphas_cumprod.double().numpy()[time]
    a, s = np.sqrt(abar), np.sqrt(1 - abar)
    kind = config.get("prediction_type", "epsilon")
    if kind == "epsilon":
        return (x - s * answer) / a
    return a * x - s * answer if kind == "v_prediction" else answer


@pytest.mark.parametrize(("name", "scheduler"), PREDICTIONS)
@pytest.mark.parametrize("time", [999, 500, 3])
@torch.no_grad()
def test_d_is_the_networks_own_answer(name: str, scheduler: dict[str, Any], time: int) -> None:
    pipe = make(name, **scheduler)
    host = adapt(pipe)
    x, cond = noisy(host), host.encode(["a cat", "red dog"], SIZE)
    sigma = host.denoiser.schedule.sigma_of_time(torch.full((2,), float(time)))
    answer = asked_by_hand(pipe, name, x, torch.full((2,), time), cond)
    expected = x0_by_hand(pipe, x.double().numpy(), answer.double().numpy(), time)
    got = host.denoiser(x, sigma, cond).double().numpy()
    # diffusers sums its betas in float32, and x0 of an eps model divides by alpha
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_zero_terminal_v_prediction_starts_from_pure_noise() -> None:
    pipe = make("sd", **RESCALED)
    host = adapt(pipe)
    sigma = host.denoiser.schedule.sigma_of_time(torch.full((1,), 999.0))
    assert float(host.denoiser.schedule.alpha(sigma)) == 0
    cond, x = host.encode(["a"], SIZE), noisy(host, 1)
    with torch.no_grad():
        # v = a eps - s x0 with a = 0, s = 1
        v = asked_by_hand(pipe, "sd", x, torch.tensor([999]), cond)
        torch.testing.assert_close(host.denoiser(x, sigma, cond), -v)


def test_embedded_guidance_is_what_the_condition_says() -> None:
    host = adapt(make("flux"))
    cond, x = host.encode(["a cat"], SIZE), noisy(host, 1)
    assert host.denoiser.guidance == "embedded" and cond.guidance is not None and cond.guidance.tolist() == [3.5]
    with torch.no_grad():
        level = torch.tensor([0.7], dtype=torch.float64)
        told = [host.denoiser(x, level, cond.with_(guidance=torch.tensor([g]))) for g in (3.5, 1.0)]
        torch.testing.assert_close(host.denoiser(x, level, cond), told[0], rtol=0, atol=0)
    assert (told[0] - told[1]).abs().max() > 1e-4


def test_flux_without_embedded_guidance_has_none() -> None:
    host = adapt(make("flux", embedded=False))
    cond = host.encode(["a"], SIZE)
    assert host.denoiser.guidance == "none" and cond.guidance is None and cond.text.shape[1] == 256
    with torch.no_grad():
        assert host.denoiser(noisy(host, 1), torch.ones(1), cond).isfinite().all()


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux"])
@torch.no_grad()
def test_padding_under_a_mask_changes_nothing(name: str) -> None:
    host = adapt(make(name))
    cond, x = host.encode(["a cat", "red"], SIZE), noisy(host)
    short = Cond(cond.text[:, :5], pooled=cond.pooled, size=cond.size, guidance=cond.guidance)
    longer = Cond.concat([short, Cond(cond.text, pooled=cond.pooled, size=cond.size, guidance=cond.guidance)])[:2]
    level = host.denoiser.schedule.sigma_at(torch.tensor([0.5, 0.9]))
    expected = host.denoiser(x, level, short)
    torch.testing.assert_close(host.denoiser(x, level, longer), expected, rtol=0, atol=1e-5 * float(expected.std()))


def test_sd3_refuses_padding_that_it_would_attend_to() -> None:
    host = adapt(make("sd3"))
    cond = host.encode(["a"], SIZE)
    padded = Cond.concat([Cond(cond.text[:, :5], pooled=cond.pooled), cond])
    with pytest.raises(OneStepError, match="same number of tokens"):
        host.denoiser(noisy(host), torch.full((2,), 0.5), padded)


@pytest.mark.parametrize("name", FAMILIES)
def test_encoding_is_the_pipelines_own(name: str) -> None:
    pipe = make(name)
    cond = adapt(pipe).encode(["a cat", "red dog"], SIZE)
    prompts = ["a cat", "red dog"]
    with torch.no_grad():
        if name == "sd":
            expected = pipe.encode_prompt(prompts, "cpu", 1, False)[0]
        elif name == "sdxl":
            expected, _, pooled, _ = pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
        elif name == "sd3":
            expected, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
            # 256 zeros stand for the missing T5; ComfyUI has none of them
            assert expected[:, 16:].abs().max() == 0
            expected = expected[:, :16]
        else:
            expected, pooled, _ = pipe.encode_prompt(prompts, None)
    torch.testing.assert_close(cond.text, expected, rtol=0, atol=0)
    if name != "sd":
        torch.testing.assert_close(cond.pooled, pooled, rtol=0, atol=0)
    if name == "sdxl":
        assert cond.size is not None and cond.size.tolist() == [[16, 16, 0, 0, 16, 16]] * 2


def test_sd3_with_t5_keeps_its_tokens() -> None:
    host = adapt(make("sd3", with_t5=True))
    assert host.encode(["a cat"], SIZE).text.shape[1] == 16 + 256


@pytest.mark.parametrize("name", FAMILIES)
def test_decode_undoes_the_latents_scale(name: str) -> None:
    pipe = make(name)
    host = adapt(pipe)
    latents = noisy(host)
    with torch.no_grad():
        raw = latents / pipe.vae.config.scaling_factor + (pipe.vae.config.shift_factor or 0)
        expected = (pipe.vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(host.decode(latents), expected)
        mode = pipe.vae.encode(2 * expected - 1).latent_dist.mode()
        back = (mode - (pipe.vae.config.shift_factor or 0)) * pipe.vae.config.scaling_factor
        torch.testing.assert_close(host.latents_of(expected), back)


def test_packing_is_diffusers_own() -> None:
    pipe = make("flux")
    x = torch.randn(2, 4, 6, 8)
    torch.testing.assert_close(pack(x), pipe._pack_latents(x, 2, 4, 6, 8), rtol=0, atol=0)
    torch.testing.assert_close(unpack(pack(x), 6, 8), x, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "shift"),
    [({"shift": 3.0}, 3.0), ({"use_dynamic_shifting": True, "max_shift": 1.15}, np.exp(1.15))],
)
def test_flow_shift(settings: dict[str, Any], shift: float) -> None:
    schedule = schedule_of(make("flux", **settings).scheduler)
    assert float(schedule.sigma_at(torch.tensor(0.5))) == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5))


@pytest.mark.parametrize("size", [(20, 16), (16, 4), (0, 16)])
def test_a_size_that_does_not_fit_is_refused(size: tuple[int, int]) -> None:
    host = adapt(make("sd3"))
    with pytest.raises(OneStepError, match=f"{size[0]}x{size[1]}"):
        host.latent_shape(size)


def test_what_is_no_text_to_image_base_is_refused() -> None:
    pipe = make("sd")
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(OneStepError, match="9 input channels"):
        adapt(pipe)
    with pytest.raises(OneStepError, match="no U-Net or transformer"):
        adapt(object())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_half_precision_network_answers_in_the_latents_precision(name: str) -> None:
    host = adapt(make(name))
    with_student(host)
    x, cond = noisy(host), host.encode(["a cat", "red"], SIZE)
    sigma = host.denoiser.schedule.sigma_at(torch.tensor([0.4, 0.8]))
    with host.denoiser.roles.use("student"):
        full = host.denoiser(x, sigma, cond)
        host.network.bfloat16()
        half = host.denoiser(x, sigma, cond)
    assert half.dtype == torch.float32
    # diffusers' Flux also rounds the time and the guidance that it is told
    assert 0 < (half - full).square().mean().sqrt() < (0.3 if name == "flux" else 0.1) * full.std()
