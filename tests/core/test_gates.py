"""Gates of a network in training: its numbers, gradients and adapters as with the host's own, and fewer bytes kept."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import small_networks
import torch
from narrowed import narrowed
from role_networks import scatter
from torch import Tensor, nn

from onestep.core.checkpoint import checkpoint_blocks
from onestep.core.families import bind_diffusers, blocks_of
from onestep.core.gates import NAME, Gated, gated_layers
from onestep.core.roles import Roles
from onestep.core.stored import store


class Turned(nn.Module):
    """Of the same name, with its halves the other way round."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        g, h = self.proj(x).chunk(2, -1)
        return h * nn.functional.gelu(g)


class Asked(Turned):
    """It asks for more than tokens."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * scale


def geglu(network: nn.Module) -> list[nn.Module]:
    return [layer for layer in network.modules() if type(layer).__name__ in (NAME, "Gated")]


def adapted(name: str) -> tuple[nn.Module, Roles]:
    torch.manual_seed(0)
    network = getattr(small_networks, name)().double().eval().requires_grad_(False)
    roles = Roles(bind_diffusers(network))
    for seed, role in enumerate(("student", "critic")):
        roles.add(role, 3, seed)
        scatter(roles, role, 10 + seed, torch.float64)
    return network, roles


def passed(network: nn.Module, roles: Roles, blocks) -> list[Tensor]:
    """Output and gradients, of x and of both roles' factors."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 8, 8, generator=draw, dtype=torch.float64).requires_grad_(True)
    text = torch.randn(3, 5, 24, generator=draw, dtype=torch.float64)
    more = {"text_embeds": torch.ones(3, 16).double(), "time_ids": torch.ones(3, 6)}
    with roles.rows(blocks):
        captured = roles.capture(3)
    with captured:
        out = network(x, torch.tensor(500), encoder_hidden_states=text, added_cond_kwargs=more, return_dict=False)[0]
    out = captured.guard(out)
    factors = roles.parameters("student") + roles.parameters("critic")
    return [out, *torch.autograd.grad(out.square().sum(), [x, *factors], materialize_grads=True)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", narrowed(["sd15", "sdxl"], "sd15"))
def test_numbers_and_gradients_are_those_of_the_hosts_gates(name, checkpointing):
    """Adapters of two roles on the projections, rows of both in one forward."""
    network, roles = adapted(name)
    blocks = [("student", 2), ("critic", 1)]
    with roles.installed():
        right = passed(network, roles, blocks)
        gates = len(geglu(network))
        with gated_layers(network) as count:
            assert count == gates > 0 and all(type(layer) is Gated for layer in geglu(network))
            held = checkpoint_blocks(blocks_of(network), roles) if checkpointing else nullcontext()
            with held:
                found = passed(network, roles, blocks)
    on_gates = [target for target in roles.targets if target.endswith("ff.net.0.proj")]
    assert len(on_gates) == gates
    least = 1e-12 * max(float(value.detach().abs().max()) for value in right)
    for mine, other in zip(found, right, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=least)


def test_the_network_is_given_back_as_it_was():
    network, _ = adapted("sd15")
    before, names = geglu(network), [name for name, _ in network.named_parameters()]
    with pytest.raises(ZeroDivisionError), gated_layers(network):
        assert [name for name, _ in network.named_parameters()] == names
        assert all(mine.proj is theirs.proj for mine, theirs in zip(geglu(network), before, strict=True))
        raise ZeroDivisionError
    assert geglu(network) == before


def of_name(kind: type, **more) -> nn.Module:
    return type(NAME, (kind,), more)(nn.Linear(6, 8))


def test_what_only_bears_the_name_stays():
    network = nn.ModuleDict({"turned": of_name(Turned), "asked": of_name(Asked)})
    with gated_layers(network) as count:
        assert count == 0 and not any(isinstance(layer, Gated) for layer in network.modules())


def test_a_gate_on_which_something_hangs_stays():
    right = {"forward": lambda self, x: Gated.forward(self, x)}
    for change in (
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.register_forward_pre_hook(lambda *_: None),
        lambda layer: setattr(layer, "forward", lambda x: layer.proj(x)),
        lambda layer: layer.add_module("norm", nn.LayerNorm(8)),
    ):
        network = nn.ModuleDict({"plain": of_name(Turned, **right), "changed": of_name(Turned, **right)})
        change(network["changed"])
        with gated_layers(network) as count:
            assert count == 1 and isinstance(network["plain"], Gated) and not isinstance(network["changed"], Gated)


@pytest.mark.parametrize("kind", ["float8", "bfloat16", "meta"])
def test_whatever_stores_the_projection(kind):
    network, _ = adapted("sd15")
    network.to(torch.bfloat16)
    layer = geglu(network)[0].proj
    if kind == "float8":
        store(layer)
    if kind == "meta":
        network.to("meta")
    x = torch.randn(2, 3, layer.in_features).to(layer.bias.device, torch.bfloat16)
    right = geglu(network)[0](x)
    with gated_layers(network) as count:
        assert count == len(geglu(network))
        found = geglu(network)[0](x)
    assert found.shape == right.shape
    if kind != "meta":
        torch.testing.assert_close(found, right)


def test_gelu_is_not_kept():
    """Of d channels a token the host keeps the projection 2 d, gelu(g) d; what follows keeps its own input."""
    network, _ = adapted("sd15")
    layer = geglu(network)[0]
    kept = {}
    for name, within in (("host", nullcontext()), ("gated", gated_layers(network))):
        bytes_of: dict[int, int] = {}

        def note(value: Tensor, bytes_of=bytes_of) -> Tensor:
            bytes_of[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        x = torch.randn(1, 7, layer.proj.in_features, dtype=torch.float64, requires_grad=True)
        with within, torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            out = geglu(network)[0](x)
        weights = {value.untyped_storage().data_ptr() for value in network.parameters()}
        kept[name] = sum(size for at, size in bytes_of.items() if at not in weights)
        assert out.requires_grad
    token = 8 * 7 * layer.proj.out_features // 2
    assert kept["host"] - kept["gated"] == token and kept["gated"] >= 2 * token
