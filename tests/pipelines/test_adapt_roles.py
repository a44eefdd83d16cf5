"""Roles on diffusers networks: rows, peft's LoRA, nothing left behind, and each base weight once in memory."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from adapted import SIZE, noisy, with_student
from narrowed import narrowed
from tiny_pipelines import MAKERS, make
from torch import Tensor

from onestep.core.checkpoint import checkpoint_blocks
from onestep.pipelines.adapt import adapt


@pytest.mark.parametrize("name", narrowed(MAKERS, "sd", "sd3", "flux"))
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


@pytest.mark.parametrize("name", narrowed(MAKERS, "sd", "sd3", "flux"))
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
        if not found.is_meta and found.untyped_storage().data_ptr() not in own:
            others.setdefault(found.numel(), []).append(found.detach())
    return [
        name
        for name, weight in network.named_parameters()
        for other in others.get(weight.numel(), [])
        if torch.allclose(other.flatten().double(), weight.detach().flatten().double(), rtol=1e-2)
    ]


@pytest.mark.parametrize("name", narrowed(MAKERS, "sd"))
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
