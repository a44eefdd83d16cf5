"""A diffusers pipeline behind the contract: D is the network's own answer, gradients are right, weights exist once."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from tiny_pipelines import MAKERS, make
from torch import Tensor

from onestep.core.checkpoint import checkpoint_blocks
from onestep.core.cond import Cond
from onestep.core.errors import OneStepError
from onestep.pipelines.adapt import DiffusersHost, adapt
from onestep.pipelines.networks import pack, schedule_of, unpack

SIZE = (16, 16)
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


def noisy(host: DiffusersHost, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, *host.latent_shape(SIZE), dtype=dtype)


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


# -- gradients --------------------------------------------------------------------------------------------------------


def with_student(host: DiffusersHost, role: str = "student", seed: int = 1) -> list[Tensor]:
    """The parameters of a role away from B = 0."""
    host.denoiser.roles.add(role, 2, seed)
    parameters = host.denoiser.roles.parameters(role)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.1 * torch.randn_like(parameter)
    return parameters


# diffusers rounds to float32 within: the rotation of Flux' queries and keys, SD3.5's norms of them
@pytest.mark.parametrize(
    ("name", "step", "tolerance"), [("sd", 1e-5, 1e-6), ("sdxl", 1e-5, 1e-6), ("sd3", 1e-3, 1e-3), ("flux", 1e-3, 1e-3)]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_of_d_is_the_finite_difference(name: str, step: float, tolerance: float, checkpointing: bool) -> None:
    host = adapt(make(name))
    host.network.double()
    parameters = with_student(host)
    x, cond = noisy(host, dtype=torch.float64), host.encode(["a cat", "red"], SIZE).to(torch.float64)
    sigma, weight = host.denoiser.schedule.sigma_at(torch.tensor([0.4, 0.8])), noisy(host, dtype=torch.float64)

    def loss() -> Tensor:
        return (weight * host.denoiser(x, sigma, cond)).sum()

    with host.training(), host.denoiser.roles.use("student"):
        blocks = host.blocks if checkpointing else []
        with checkpoint_blocks(blocks, host.denoiser.roles):
            value = loss()
            value.backward()
    gradients = [parameter.grad for parameter in parameters]
    assert all(gradient is not None for gradient in gradients)
    # what SD3's last block asks of the text is thrown away: its query has no effect
    silent = [index for index, gradient in enumerate(gradients) if not gradient.any()]
    assert {sorted(host.denoiser.roles.targets)[index // 2] for index in silent} == (
        {"transformer_blocks.1.attn.add_q_proj"} if name == "sd3" else set()
    )

    generator = torch.Generator().manual_seed(2)
    start = [parameter.detach().clone() for parameter in parameters]
    steps = [step * torch.randn(p.shape, generator=generator) for p in parameters]
    values, places = [], []
    with torch.no_grad(), host.denoiser.roles.use("student"):
        for sign in (1, -1):
            for parameter, at, move in zip(parameters, start, steps, strict=True):
                parameter.copy_(at + sign * move)
            values.append(loss())
            places.append([parameter.double() for parameter in parameters])
    # the parameters are float32: the step is what they really moved by
    moved = [high - low for high, low in zip(*places, strict=True)]
    slope = sum((gradient.double() * move).sum() for gradient, move in zip(gradients, moved, strict=True))
    # of a direction's chance slope, the gradients' length is the scale
    length = sum(gradient.double().square().sum() for gradient in gradients).sqrt()
    scale = float(length * sum(move.square().sum() for move in moved).sqrt()) / len(start) ** 0.5
    assert float(slope) == pytest.approx(float(values[0] - values[1]), rel=tolerance, abs=tolerance * scale)


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointed_gradients_are_the_same(name: str) -> None:
    host = adapt(make(name))
    parameters = with_student(host)
    x, cond = noisy(host), host.encode(["a cat", "red"], SIZE)
    sigma = host.denoiser.schedule.sigma_at(torch.tensor([0.4, 0.8]))
    found = []
    for blocks in ([], host.blocks):
        with host.training(), host.denoiser.roles.use("student"), checkpoint_blocks(blocks, host.denoiser.roles):
            host.denoiser(x, sigma, cond).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in parameters])
        for parameter in parameters:
            parameter.grad = None
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_after_another_role_was_used_is_right_or_refused(checkpointing: bool) -> None:
    """peft gives None gradients here; recomputation would see the critic."""
    host = adapt(make("sd"))
    roles = host.denoiser.roles
    student, critic = with_student(host), with_student(host, "critic", 5)
    x, cond = noisy(host), host.encode(["a cat", "red"], SIZE)
    sigma = host.denoiser.schedule.sigma_at(torch.tensor([0.4, 0.8]))
    with host.training(), checkpoint_blocks(host.blocks if checkpointing else [], roles):
        with roles.use("student"):
            host.denoiser(x, sigma, cond).sum().backward()
        expected = [parameter.grad.clone() for parameter in student]
        for parameter in student:
            parameter.grad = None
        with roles.use("student"):
            loss = host.denoiser(x, sigma, cond).sum()
        with roles.use("critic"), torch.no_grad():
            host.denoiser(x, sigma, cond)
        loss.backward()
        with roles.use("student"):
            again = host.denoiser(x, sigma, cond).sum()
        with roles.use("critic"), pytest.raises(OneStepError, match="run backward"):
            again.backward()
    for parameter, gradient in zip(student, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(parameter.grad is None for parameter in critic)


# -- roles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_role_rows_equal_separate_forwards(name: str) -> None:
    host = adapt(make(name))
    with_student(host), with_student(host, "critic", 5)
    x, cond = noisy(host, 4), host.encode(["a cat", "red", "dog", "a"], SIZE)
    sigma = host.denoiser.schedule.sigma_at(torch.tensor([0.4, 0.8, 0.2, 0.9]))
    with host.denoiser.roles.rows([("teacher", 1), ("critic", 2), ("student", 1)]):
        together = host.denoiser(x, sigma, cond)
    for role, rows in [("teacher", slice(0, 1)), ("critic", slice(1, 3)), ("student", slice(3, 4))]:
        with host.denoiser.roles.use(role):
            alone = host.denoiser(x[rows], sigma[rows], cond[rows])
        torch.testing.assert_close(together[rows], alone, rtol=0, atol=1e-5 * float(alone.abs().max()))
    with host.denoiser.roles.use("student"):
        student = host.denoiser(x, sigma, cond)
    assert (student - host.denoiser(x, sigma, cond)).abs().max() > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_role_equals_pefts_lora(name: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    host = adapt(make(name))
    with_student(host)
    x, cond = noisy(host), host.encode(["a cat", "red"], SIZE)
    sigma = host.denoiser.schedule.sigma_at(torch.tensor([0.4, 0.8]))
    with host.denoiser.roles.use("student"):
        ours = host.denoiser(x, sigma, cond)
    state = host.denoiser.roles.state("student")
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=list(state)), host.network)
    for path, module in host.network.named_modules():
        if hasattr(module, "lora_A"):
            a, b = state.pop(path)
            module.lora_A["default"].weight.copy_(a)
            module.lora_B["default"].weight.copy_(b)
    assert not state
    theirs = host.denoiser(x, sigma, cond)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * float(theirs.abs().max()))


def test_requires_grad_and_mode_are_given_back() -> None:
    pipe = make("sd")
    pipe.unet.train()
    pipe.unet.enable_gradient_checkpointing()
    host = adapt(pipe)
    flags = [parameter.requires_grad for parameter in pipe.unet.parameters()]
    with host.training():
        assert not any(parameter.requires_grad for parameter in pipe.unet.parameters())
        assert not pipe.unet.training and not pipe.unet.is_gradient_checkpointing
    assert [parameter.requires_grad for parameter in pipe.unet.parameters()] == flags and all(flags)
    assert pipe.unet.training and pipe.unet.is_gradient_checkpointing


def test_release_leaves_the_pipeline_as_it_was() -> None:
    pipe = make("sd")
    before = {path: len(module._forward_hooks) for path, module in pipe.unet.named_modules()}
    names = list(pipe.unet.state_dict())
    host = adapt(pipe)
    assert any(module._forward_hooks for module in pipe.unet.modules())
    with_student(host)
    assert list(pipe.unet.state_dict()) == names
    host.release()
    assert {path: len(module._forward_hooks) for path, module in pipe.unet.named_modules()} == before


def copies(network: torch.nn.Module) -> list[str]:
    """Names of weights of which another live storage holds the same numbers, in any dtype or shape."""
    gc.collect()
    live = [found for found in gc.get_objects() if type(found) in (Tensor, torch.nn.Parameter)]
    own = {weight.untyped_storage().data_ptr() for weight in network.parameters()}
    others: dict[int, list[Tensor]] = {}
    for found in live:
        if found.untyped_storage().data_ptr() not in own:
            others.setdefault(found.numel(), []).append(found.detach())
    return [
        name
        for name, weight in network.named_parameters()
        for other in others.get(weight.numel(), [])
        if torch.allclose(other.flatten().double(), weight.detach().flatten().double(), rtol=1e-2)
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_each_base_weight_exists_once(name: str) -> None:
    """At three points of a step, and a role adds its adapters alone."""
    host = adapt(make(name))
    weights = list(host.network.parameters())
    addresses = {weight.untyped_storage().data_ptr() for weight in weights}
    assert len(addresses) == len(weights)
    witness = weights[0].detach().clone().bfloat16()
    assert len(copies(host.network)) == 1  # it would be seen
    del witness
    x, cond = noisy(host).requires_grad_(), host.encode(["a cat", "red"], SIZE)
    sigma = host.denoiser.schedule.sigma_at(torch.tensor([0.4, 0.8]))
    parameters = with_student(host) + with_student(host, "critic", 3)
    seen = []
    with host.training(), checkpoint_blocks(host.blocks, host.denoiser.roles):
        seen.append(copies(host.network))
        with host.denoiser.roles.rows([("student", 1), ("critic", 1)]):
            loss = host.denoiser(x, sigma, cond).square().sum()
        seen.append(copies(host.network))
        parameters[len(parameters) // 4].register_hook(lambda _: seen.append(copies(host.network)))
        loss.backward()
    assert len(seen) == 3 and seen == [[], [], []]
    targets = host.denoiser.roles.targets.values()
    expected = sum(4 * 2 * (target.in_features * len_of_kernel(target) + target.out_rows) for target in targets)
    assert sum(parameter.nbytes for parameter in parameters) == 2 * expected
    assert {weight.untyped_storage().data_ptr() for weight in host.network.parameters()} == addresses


def len_of_kernel(target: Any) -> int:
    return int(np.prod(target.module.kernel_size)) if target.is_conv else 1


def test_hashes_tell_weights_apart() -> None:
    one, other = adapt(make("sd")), adapt(make("sd"))
    assert one.base_hash == other.base_hash and one.encoder_hash == other.encoder_hash
    changed = adapt(make("sd", seed=1))
    assert changed.base_hash != one.base_hash and changed.encoder_hash != one.encoder_hash
