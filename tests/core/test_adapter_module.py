"""AdapterModules: what they add, whom they serve, how they are copied, and what a call tells them."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from mutations import must_fail, mutant
from torch import Tensor, nn

from onestep.core import adapter_module as original
from onestep.core.adapter_module import Call
from onestep.core.checkpoint import checkpoint_blocks
from onestep.core.cond import Cond
from onestep.core.errors import OneStepError
from onestep.core.roles import TEACHER, Roles
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

    def on_input(self, name: str, x: Tensor, call: Call) -> Tensor:
        call.cache[name] = x
        return x * call.time[:, None]

    def on_output(self, name: str, x: Tensor, output: Tensor, call: Call) -> Tensor:
        return output + self.w * call.inputs["strength"] * call.cache[self.first]


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
    roles.add_module("student", Doubling(1))
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
        roles.add_module("student", Doubling(1))
        assert len(roles.parameters("student")) == 2 * 4 + 1
        with roles.use("student", strength=1.0):
            found = called(network, roles, x, time, cond)
    assert torch.allclose(found, expected(network, x, time, 0.5, 1.0), atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_call_even_when_it_is_recomputed(checkpointing: bool) -> None:
    network, roles, x, time, cond = setting()
    network.requires_grad_(False)
    side = Doubling(1)
    roles.add_module("student", side)
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
    roles.add_module("student", side)
    roles.copy("student", "ema")
    mean = roles.modules["ema"]
    assert mean is not side and mean.w.item() == 0.5
    with torch.no_grad():
        side.w.fill_(1.5)
    roles.lerp("ema", "student", 0.25)
    assert mean.w.item() == pytest.approx(0.75)
    roles.copy("student", "ema")
    assert roles.modules["ema"] is mean and mean.w.item() == 1.5
    roles.drop("ema")
    assert "ema" not in roles.modules and "ema" not in roles.names()


def test_what_cannot_be_served_is_refused() -> None:
    network, roles, x, time, cond = setting()
    with pytest.raises(OneStepError, match="blocks.5.0.*not in this model"):
        roles.add_module("student", Doubling(5))
    roles.add_module("student", Doubling(1))
    with roles.installed():
        with roles.rows([(TEACHER, 2), ("student", 2)]), pytest.raises(OneStepError, match="whole batches"):
            called(network, roles, x, time, cond)
        with roles.use("student", train=False, strength=1.0), pytest.raises(OneStepError, match="always learn"):
            called(network, roles, x, time, cond)


# -- mistakes ---------------------------------------------------------------------------------------------------------


class Sloping(nn.Module):
    """Tells what it is handed: at the last layer of a block, output + zeta * (what that took) + alpha."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.zeta = nn.Parameter(torch.tensor(0.25, dtype=torch.float64))
        self.alpha = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.before, self.after = frozenset({f"blocks.{at}.0"}), frozenset({f"blocks.{at}.2"})

    def on_input(self, name: str, x: Tensor, call: Call) -> Tensor:
        return x * call.time[:, None]

    def on_output(self, name: str, x: Tensor, output: Tensor, call: Call) -> Tensor:
        return output + self.zeta * x + self.alpha


def check_sides(module: ModuleType) -> None:
    """Two roles with sides at two blocks, beside the teacher: each call has its own role's, once."""
    network, roles, x, time, cond = setting()
    roles.modules = module.AdapterModules(roles.targets)
    one, two = Sloping(0), Sloping(1)
    roles.add_module("student", one)
    with torch.no_grad(), roles.installed():
        roles.add_module("critic", two)
        found = {}
        for role in ("student", "critic", TEACHER):
            with roles.use(role):
                found[role] = called(network, roles, x, time, cond)
        with roles.use("student", train=False):
            assert torch.equal(called(network, roles, x, time, cond), found["student"])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())
    with torch.no_grad():
        hidden = network.blocks[0][:2](x * time[:, None])
        student = network.blocks[1](network.blocks[0][2](hidden) + 0.25 * hidden + 2)
        middle = network.blocks[0](x)
        hidden = network.blocks[1][:2](middle * time[:, None])
        critic = network.blocks[1][2](hidden) + 0.25 * hidden + 2
    assert torch.allclose(found["student"], student, atol=1e-14) and torch.allclose(found["critic"], critic, atol=1e-14)
    assert torch.equal(found[TEACHER], network(x))
    check_refused(network, roles, x, time, cond)
    check_numbers(module)


def check_refused(network: Network, roles: Roles, x: Tensor, time: Tensor, cond: Cond) -> None:
    """Mixed rows; a forward that would build a graph where nothing learns; a layer that a host fuses or reorders."""
    with roles.installed():
        with roles.rows([(TEACHER, 2), ("student", 2)]), torch.no_grad():
            refused(lambda: called(network, roles, x, time, cond))
        with roles.use("student", train=False):
            refused(lambda: called(network, roles, x, time, cond))
        with roles.use("student"):
            assert called(network, roles, x, time, cond).requires_grad
    layer = nn.Linear(3, 6)
    for at, more in ((3, {"rows": slice(0, 3)}), (7, {"permutation": torch.arange(3).flip(0)})):
        roles.targets[f"blocks.{at}.0"] = Target(f"blocks.{at}.0", layer, **more)
        roles.targets[f"blocks.{at}.2"] = Target(f"blocks.{at}.2", layer)
        refused(lambda at=at: roles.add_module("student", Sloping(at)))


def refused(action: Callable[[], object]) -> None:
    try:
        action()
    except OneStepError:
        return
    raise AssertionError("it was not refused")


def check_numbers(module: ModuleType) -> None:
    """Copies are apart, live ones are written in place; a mean is (1 - w) a + w b; parameters lie by name."""
    sides = module.AdapterModules(
        {f"blocks.0.{layer}": Target(f"blocks.0.{layer}", nn.Linear(3, 3)) for layer in (0, 2)}
    )
    side = Sloping(0)
    sides.add("student", side)
    assert [float(value) for value in sides.parameters("student")] == [2.0, 0.25]
    sides.copy("student", "ema")
    mean = sides["ema"]
    assert mean is not side and sides.state("ema")["zeta"].data_ptr() == mean.zeta.data_ptr()
    with torch.no_grad():
        side.zeta.fill_(1.25)
    assert float(mean.zeta) == 0.25
    sides.lerp("ema", "student", 0.25)
    assert float(mean.zeta) == 0.5 and float(mean.alpha) == 2.0
    sides.copy("student", "ema")
    assert sides["ema"] is mean and float(mean.zeta) == 1.25
    assert not any(value.requires_grad for value in sides.state("ema").values())
    sides.copy("nobody", "ema")
    assert "ema" not in sides and "student" in sides and sides.parameters("nobody") == []
    sides.drop("student")
    assert "student" not in sides


def test_sides_are_as_they_should_be() -> None:
    check_sides(original)


MUTANTS = {
    "what it takes at the wrong layers": ("name not in adapter.before", "name in adapter.before"),
    "what it gives at the wrong layers": ("name not in adapter.after", "name in adapter.after"),
    "nothing taken": ("adapter.on_input(name, args[0], call)", "args[0]"),
    "nothing given": ("else adapter.on_output(name, args[0], output, call)", "else output"),
    "the output for the input": ("on_output(name, args[0], output", "on_output(name, output, output"),
    "the first role's for all": (
        "[role for role, _ in active.blocks if role in self._of]",
        "list(self._of)[: len(active.blocks)]",
    ),
    "mixed rows": ("len(active.blocks) > 1", "len(active.blocks) > 2"),
    "a graph of what is still": ("not active.train and", "active.train and"),
    "fused layers": ("target.rows is not None or ", ""),
    "reordered layers": (" or target.permutation is not None", ""),
    "hooks twice": ("sorted(wanted - set(self._handles))", "sorted(wanted)"),
    "hooks left behind": ("            handle.remove()\n", "            pass\n"),
    "a mean the other way": ("self.parameters(other), weight)", "self.parameters(other), 1 - weight)"),
    "a copy that is the same": ("deepcopy(self._of[source])", "self._of[source]"),
    "a copy out of place": ("elif into in self._of:", "elif False:"),
    "a copy of nothing": ("            self.drop(into)\n", "            pass\n"),
    "parameters as declared": ("in sorted(self._named(role))]", "in self._named(role)]"),
    "a state that learns": ("value.detach() for", "value for"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_mistake_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    must_fail(check_sides, mutant("onestep.core.adapter_module", *change, monkeypatch))
