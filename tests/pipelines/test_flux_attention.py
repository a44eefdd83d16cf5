"""Flux in training, its norms and rotary embeddings fused: numbers, gradients and adapters as with diffusers' own."""

from __future__ import annotations

import pytest
import small_networks
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from role_networks import scatter
from tiny_pipelines import make
from torch import Tensor, nn

from onestep.core.families import bind_diffusers
from onestep.core.roles import Roles
from onestep.pipelines.adapt import adapt
from onestep.pipelines.flux_attention import FusedFlux, fused_attention


def adapted() -> tuple[nn.Module, Roles]:
    torch.manual_seed(0)
    network = small_networks.flux().double().eval().requires_grad_(False)
    for name, weight in network.named_parameters():
        if "norm_" in name:
            weight.add_(0.3 * torch.randn_like(weight))
    roles = Roles(bind_diffusers(network))
    roles.add("student", 3, 0)
    scatter(roles, "student", 10, torch.float64)
    return network, roles


def passed(network: nn.Module, roles: Roles) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, 6, 64, generator=draw, dtype=torch.float64).requires_grad_(True)
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(3.0))
    told = {
        "encoder_hidden_states": torch.randn(2, 5, 24, generator=draw, dtype=torch.float64),
        "pooled_projections": torch.randn(2, 16, generator=draw, dtype=torch.float64),
        **{"timestep": torch.tensor([0.7, 0.2]).double(), "guidance": torch.full((2,), 3.5).double()},
        **{"img_ids": places, "txt_ids": torch.ones(5, 3)},
    }
    with roles.installed(), roles.use("student"), roles.capture(2):
        out = network(x, **told, return_dict=False)[0]
    return [out, *torch.autograd.grad(out.square().sum(), [x, *roles.parameters("student")], materialize_grads=True)]


def test_numbers_and_gradients_are_those_of_diffusers():
    """In the double block, which norms texts and pictures apart, and in the single one."""
    network, roles = adapted()
    right = passed(network, roles)
    with fused_attention(network) as count:
        assert count == 2 and all(type(p) is FusedFlux for p in network.attn_processors.values())
        found = passed(network, roles)
    # diffusers turns in float32, whatever the network computes in
    least = 1e-6 * max(float(value.detach().abs().max()) for value in right)
    for mine, other in zip(found, right, strict=True):
        assert float((mine - other).abs().max()) <= max(1e-6 * float(other.abs().max()), least)
    assert float(right[0].detach().abs().max()) > 0


def test_the_processors_are_given_back_with_their_back_end():
    network, _ = adapted()
    network.set_attention_backend("_native_math")
    before = network.attn_processors
    with pytest.raises(ZeroDivisionError), fused_attention(network):
        kinds = {processor._attention_backend for processor in network.attn_processors.values()}
        assert kinds == {AttentionBackendName._NATIVE_MATH}
        raise ZeroDivisionError
    assert network.attn_processors == before
    network.reset_attention_backend()


class Counted(FluxAttnProcessor):
    calls = 0

    def __call__(self, *args, **more):
        type(self).calls += 1
        return super().__call__(*args, **more)


def test_another_processor_stays_and_is_called_in_training():
    """A person's own choice of attention, a back end or a processor, is trained with."""
    network, roles = adapted()
    name = next(iter(network.attn_processors))
    network.set_attn_processor({**network.attn_processors, name: Counted()})
    with fused_attention(network) as count:
        assert count == 1 and type(network.attn_processors[name]) is Counted
        passed(network, roles)
    assert Counted.calls == 1


def test_norms_on_which_something_hangs_are_called():
    network, roles = adapted()
    seen = []
    network.transformer_blocks[0].attn.norm_q.register_forward_hook(lambda *_: seen.append(1))
    right = passed(network, roles)
    with fused_attention(network):
        found = passed(network, roles)
    assert len(seen) == 2
    torch.testing.assert_close(found[0], right[0], rtol=1e-6, atol=1e-6)


def test_a_host_trains_with_them():
    host = adapt(make("flux"))
    before = host.network.attn_processors
    with host.training():
        assert all(type(p) is FusedFlux for p in host.network.attn_processors.values())
    assert host.network.attn_processors == before


def test_a_u_net_has_none():
    with fused_attention(small_networks.sd15()) as count:
        assert count == 0
