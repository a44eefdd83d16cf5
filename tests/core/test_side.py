"""Sides: what they add, whom they serve, how they are copied, and what a call tells them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from onestep.core.checkpoint import checkpoint_blocks
from onestep.core.cond import Cond
from onestep.core.errors import OneStepError
from onestep.core.roles import TEACHER, Roles
from onestep.core.side import Call
from onestep.core.targets import Target


class Network(nn.Module):
    """y = last(first(x)), twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Doubling(nn.Module):
    """Scales what the first layer of a block takes by time, and adds w * (that input) to what the last gives."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.first, self.last = f"blocks.{at}.0", f"blocks.{at}.2"
        self.before, self.after = frozenset({self.first}), frozenset({self.last})

    def take(self, name: str, x: Tensor, call: Call) -> Tensor:
        call.kept[name] = x
        return x * call.time[:, None]

    def give(self, name: str, x: Tensor, output: Tensor, call: Call) -> Tensor:
        return output + self.w * call.told["strength"] * call.kept[self.first]


def setting() -> tuple[Network, Roles, Tensor, Tensor, Cond]:
    torch.manual_seed(0)
    network = Network().double()
    names = [f"blocks.{block}.{layer}" for block in (0, 1) for layer in (0, 2)]
    roles = Roles([Target(name, network.get_submodule(name)) for name in names])
    x, time = torch.randn(4, 3, dtype=torch.float64), torch.linspace(1, 2, 4, dtype=torch.float64)
    return network, roles, x, time, Cond(torch.zeros(4, 1, 1))


def called(network: Network, roles: Roles, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    with roles.capture(len(x), time, cond):
        return network(x)


def expected(network: Network, x: Tensor, time: Tensor, w: float, strength: float) -> Tensor:
    hidden = network.blocks[0](x)
    return network.blocks[1](hidden * time[:, None]) + w * strength * hidden


def test_a_side_adds_what_it_is_told_and_serves_its_role_alone() -> None:
    network, roles, x, time, cond = setting()
    plain = network(x)
    roles.add_side("student", Doubling(1))
    with roles.installed():
        with roles.use("student", strength=3.0):
            found = called(network, roles, x, time, cond)
        with roles.use(TEACHER):
            assert torch.equal(called(network, roles, x, time, cond), plain)
    assert torch.allclose(found, expected(network, x, time, 0.5, 3.0), atol=1e-14)
    assert torch.equal(network(x), plain)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())


def test_a_side_added_to_installed_roles_acts_and_joins_factors() -> None:
    network, roles, x, time, cond = setting()
    with roles.installed():
        roles.add("student", 2, 0)
        roles.add_side("student", Doubling(1))
        assert len(roles.parameters("student")) == 2 * 4 + 1
        with roles.use("student", strength=1.0):
            found = called(network, roles, x, time, cond)
    assert torch.allclose(found, expected(network, x, time, 0.5, 1.0), atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_call_even_when_it_is_recomputed(checkpointing: bool) -> None:
    network, roles, x, time, cond = setting()
    network.requires_grad_(False)
    side = Doubling(1)
    roles.add_side("student", side)
    blocks = checkpoint_blocks(network.blocks if checkpointing else [], roles)
    with roles.installed(), blocks:
        with roles.use("student", strength=3.0):
            y = called(network, roles, x, time, cond)
        with roles.use("student", strength=7.0), torch.no_grad():
            called(network, roles, x, 5 * time, cond)
        y.sum().backward()
    assert side.w.grad is not None
    assert side.w.grad.item() == pytest.approx(3.0 * float(network.blocks[0](x).sum()), rel=1e-12)


def test_copy_and_lerp() -> None:
    _, roles, *_ = setting()
    side = Doubling(1)
    roles.add_side("student", side)
    roles.copy("student", "ema")
    mean = roles.sides["ema"]
    assert mean is not side and mean.w.item() == 0.5
    with torch.no_grad():
        side.w.fill_(1.5)
    roles.lerp("ema", "student", 0.25)
    assert mean.w.item() == pytest.approx(0.75)
    roles.copy("student", "ema")
    assert roles.sides["ema"] is mean and mean.w.item() == 1.5
    roles.drop("ema")
    assert "ema" not in roles.sides and "ema" not in roles.names()


def test_what_cannot_be_served_is_refused() -> None:
    network, roles, x, time, cond = setting()
    with pytest.raises(OneStepError, match="blocks.5.0.*not in this model"):
        roles.add_side("student", Doubling(5))
    roles.add_side("student", Doubling(1))
    with roles.installed():
        with roles.rows([(TEACHER, 2), ("student", 2)]), pytest.raises(OneStepError, match="whole batches"):
            called(network, roles, x, time, cond)
        with roles.use("student", train=False, strength=1.0), pytest.raises(OneStepError, match="always learn"):
            called(network, roles, x, time, cond)
