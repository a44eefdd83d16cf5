"""An adapter's factors: their start, how they are loaded, copied and blended; and peft's LoRA as a second opinion."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from role_networks import Mixed, call, delta, roles_on, scatter, targets_of
from torch import nn

from onestep.core.errors import OneStepError
from onestep.core.roles import Roles
from onestep.core.targets import Target


def two(first: int = 0, second: int = 0, ranks: tuple[int, int] = (3, 3)) -> Roles:
    """Two roles of these lineages, each moved on from its start as training would."""
    roles = Roles(targets_of(Mixed()))
    for role, seed, rank in (("a", first, ranks[0]), ("b", second, ranks[1])):
        roles.add(role, rank, seed)
        scatter(roles, role, ord(role), size=0.2)
    return roles


# -- the start --------------------------------------------------------------------------------------------------------


def test_the_start_depends_on_seed_and_name_alone() -> None:
    """Whatever order the host's tree has, whatever else is adapted: same seed, same name, same A."""
    network = Mixed()
    forwards, backwards = Roles(targets_of(network)), Roles(targets_of(network)[::-1][:2])
    for roles in (forwards, backwards):
        roles.add("student", 4, 7)
        roles.add("other", 4, 8)
    for name, (a, b) in backwards.state("student").items():
        assert torch.equal(a, forwards.state("student")[name][0]) and not torch.equal(
            a, backwards.state("other")[name][0]
        )
        assert not b.any()
    assert len({bytes(a.flatten()[:4].numpy()) for a, _ in forwards.state("student").values()}) == len(forwards.targets)


def test_a_starts_uniform_in_its_fan_in() -> None:
    """U(-1, 1) / sqrt(fan in): peft's kaiming_uniform(a = sqrt 5). Bounds and variance of 1/3 that of the bound."""
    roles = Roles([Target("linear", nn.Linear(400, 8)), Target("conv", nn.Conv2d(40, 8, 3))])
    roles.add("student", 16, 0)
    for name, fan_in in (("linear", 400), ("conv", 40 * 9)):
        a = roles.state("student")[name][0] * math.sqrt(fan_in)
        assert float(a.abs().max()) <= 1 and float(a.abs().max()) > 0.99
        assert float(a.var()) == pytest.approx(1 / 3, abs=5 * 0.3 / math.sqrt(a.numel()))


def test_parameters_come_in_the_order_of_names() -> None:
    """The optimiser's order is the same in both hosts."""
    network = Mixed()
    for targets in (targets_of(network), targets_of(network)[::-1]):
        roles = Roles(targets)
        roles.add("student", 2, 0)
        state = roles.state("student")
        wanted = [factor for name in sorted(state) for factor in state[name]]
        assert [p.data_ptr() for p in roles.parameters("student")] == [f.data_ptr() for f in wanted]
        assert all(p.dtype == torch.float32 and p.requires_grad and p.is_leaf for p in roles.parameters("student"))


# -- loading and copying ----------------------------------------------------------------------------------------------


def test_a_loaded_role_is_a_copy_of_what_was_given() -> None:
    roles = two()
    given = {name: (a.double(), b.half()) for name, (a, b) in roles.state("a").items()}
    roles.load("c", given)
    for name, (a, b) in roles.state("c").items():
        assert torch.equal(a, roles.state("a")[name][0]) and torch.equal(b, given[name][1].float())
        given[name][0].zero_()
        assert a.any()


def test_a_role_may_lack_targets() -> None:
    network = Mixed().requires_grad_(False)
    roles = roles_on(network, a=0)
    some = {name: pair for name, pair in roles.state("a").items() if name != "linear"}
    roles.load("some", some)
    scattered = roles.state("a")["linear"]
    for factor in scattered:
        factor.zero_()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(call(roles, network, x, "some"), call(roles, network, x, "a"))


def test_factors_of_another_base_are_refused() -> None:
    roles = two()
    state = roles.state("a")
    with pytest.raises(OneStepError, match="1 adapted layers are not in this model, zzz"):
        roles.load("c", {**state, "zzz": state["linear"]})
    a, b = state["linear"]
    for wrong in ((a[:, 1:], b), (a, b[1:]), (a[:2], b), (a[:, :, None], b)):
        with pytest.raises(OneStepError, match=r"the LoRA's linear has shapes .* another base"):
            roles.load("c", {"linear": wrong})
    assert "c" not in roles.names()


def test_a_copy_is_written_into_the_live_tensors() -> None:
    """So that an optimiser goes on holding them; a copy mends what was no number, too."""
    roles = two()
    live = roles.parameters("b")
    live[0].detach().fill_(float("nan"))
    roles.copy("a", "b")
    assert all(now is then for now, then in zip(roles.parameters("b"), live, strict=True))
    for ours, theirs in zip(roles.parameters("b"), roles.parameters("a"), strict=True):
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()
    roles.copy("a", "new")
    assert torch.equal(roles.parameters("new")[1], roles.parameters("a")[1])
    with pytest.raises(OneStepError, match="no role 'nobody'"):
        roles.copy("nobody", "new")


def test_a_dropped_role_is_gone() -> None:
    roles = two()
    roles.drop("a")
    assert roles.names() == ["b"]
    with pytest.raises(OneStepError, match="no role 'a'"):
        roles.use("a")


# -- blending ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.01, 0.3, 1.0])
def test_a_lerp_of_factors_is_near_the_lerp_of_products(weight: float) -> None:
    """((1-w) B1 + w B2) ((1-w) A1 + w A2) = (1-w) B1 A1 + w B2 A2 - w (1-w) (B1 - B2) (A1 - A2), exactly.

    The last term is the error: at most w (1-w) |B1 - B2| |A1 - A2|, and nothing while the A are their common start.
    """
    roles = two()
    first, second = delta(roles, "a"), delta(roles, "b")
    pairs = {name: (*roles.state("a")[name], *roles.state("b")[name]) for name in first}
    error = {
        name: weight * (1 - weight) * (b1 - b2).double().flatten(1) @ (a1 - a2).double().flatten(1)
        for name, (a1, b1, a2, b2) in ((n, tuple(f.clone() for f in p)) for n, p in pairs.items())
    }
    live = roles.parameters("a")
    roles.lerp("a", "b", weight)
    assert all(now is then for now, then in zip(roles.parameters("a"), live, strict=True))
    for name, found in delta(roles, "a").items():
        wanted = (1 - weight) * first[name] + weight * second[name]
        torch.testing.assert_close(found, wanted - error[name], rtol=0, atol=1e-6)


def test_a_lerp_of_factors_is_exact_while_the_starts_are_kept() -> None:
    """As at the beginning of a run: A equal, B apart."""
    roles = two()
    for a, b in zip(roles.state("a").values(), roles.state("b").values(), strict=True):
        b[0].copy_(a[0])
    first, second = delta(roles, "a"), delta(roles, "b")
    roles.lerp("a", "b", 0.25)
    for name, found in delta(roles, "a").items():
        torch.testing.assert_close(found, 0.75 * first[name] + 0.25 * second[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("lineages", "ranks"), [((0, 1), (3, 3)), ((0, 1), (2, 4)), ((0, 0), (2, 4)), ((0, 0), (4, 1))]
)
def test_a_lerp_of_foreign_roles_is_exact(ranks: tuple[int, int], lineages: tuple[int, int]) -> None:
    """Of another start or another rank: by SVD, convolutions too, in no more rank than the two have together."""
    roles = two(*lineages, ranks=ranks)
    first, second = delta(roles, "a"), delta(roles, "b")
    roles.lerp("a", "b", 0.3)
    for name, found in delta(roles, "a").items():
        torch.testing.assert_close(found, 0.7 * first[name] + 0.3 * second[name], rtol=1e-5, atol=2e-6)
        assert len(roles.state("a")[name][0]) <= sum(ranks)


def test_a_lerp_with_a_role_that_lacks_targets() -> None:
    """What a role lacks is the base: its product is 0."""
    roles = two()
    first = delta(roles, "a")
    roles.load("part", {"linear": roles.state("b")["linear"]})
    second = delta(roles, "part")["linear"]
    roles.lerp("a", "part", 0.5)
    for name, found in delta(roles, "a").items():
        wanted = 0.5 * first[name] + (0.5 * second if name == "linear" else 0)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)


def test_a_follower_of_itself_stays_where_it_is() -> None:
    """IDA's fixed point: a critic that equals the student is not moved."""
    roles = two()
    roles.copy("a", "b")
    before = [factor.detach().clone() for factor in roles.parameters("b")]
    roles.lerp("b", "a", 0.37)
    assert all(torch.equal(now, then) for now, then in zip(roles.parameters("b"), before, strict=True))


# -- peft -------------------------------------------------------------------------------------------------------------


def test_the_same_weights_in_peft_give_the_same_numbers() -> None:
    """Output and every gradient, Linears and convolutions with stride and padding, float32: to 1e-6."""
    torch.manual_seed(0)
    network, twin = Mixed(), Mixed()
    for net in (network, twin):
        # peft drops a convolution's dilation
        net.second.dilation, net.second.padding = (1, 1), (1, 0)
    twin.load_state_dict(network.state_dict())
    roles = roles_on(network.requires_grad_(False), rank=3, student=0)
    names = list(roles.targets)
    twin = inject_adapter_in_model(LoraConfig(r=3, lora_alpha=3, target_modules=names), twin)
    theirs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    for name, (a, b) in roles.state("student").items():
        layer = twin.get_submodule(name)
        theirs[name] = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # type: ignore[index, union-attr, assignment]
        for parameter, value in zip(theirs[name], (a, b), strict=True):
            assert parameter.shape == value.shape
            parameter.data.copy_(value)
    x = torch.randn(4, 3, 8, 8)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    ours, wanted = call(roles, network, inputs[0], "student"), twin(inputs[1])
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)
    ours.square().mean().backward()
    wanted.square().mean().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-6)
    for name, pair in roles._factors["student"].items():
        for factor, parameter in zip(pair, theirs[name], strict=True):
            torch.testing.assert_close(factor.grad, parameter.grad, rtol=1e-5, atol=1e-6)
