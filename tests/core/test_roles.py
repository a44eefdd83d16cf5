"""Roles are the base with one adapter or another: the same numbers as merged weights, and nobody else is touched."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from role_networks import Mixed, Stored, call, delta, roles_on, scatter, targets_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from onestep.core.errors import OneStepError
from onestep.core.roles import TEACHER, Roles
from onestep.core.targets import Target


def mixed() -> tuple[Mixed, Roles, Tensor]:
    torch.manual_seed(0)
    network = Mixed().double().requires_grad_(False)
    roles = roles_on(network, dtype=torch.float64, student=1, critic=1)
    return network, roles, torch.randn(6, 3, 8, 8, dtype=torch.float64)


def merged(network: nn.Module, roles: Roles, role: str) -> nn.Module:
    """A network of its own with W + B A as weights."""
    other = copy.deepcopy(network)
    for module in other.modules():
        module._forward_hooks.clear()
    for name, product in ({} if role == TEACHER else delta(roles, role)).items():
        weight = other.get_submodule(name).weight
        weight.data += product.reshape(weight.shape).to(weight.dtype)  # type: ignore[operator, union-attr, arg-type]
    return other


# -- what a role is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", [TEACHER, "student", "critic"])
def test_a_role_is_the_base_with_merged_weights(role: str) -> None:
    network, roles, x = mixed()
    torch.testing.assert_close(call(roles, network, x, role), merged(network, roles, role)(x), rtol=1e-12, atol=1e-12)


def test_a_new_role_is_the_base_to_the_last_bit() -> None:
    network, roles, x = mixed()
    roles.add("new", 4, 0)
    assert torch.equal(call(roles, network, x, "new"), call(roles, network, x, TEACHER))


def test_without_a_captured_call_the_network_is_the_base() -> None:
    """A host that calls its network itself, even inside ``use``, sees nobody's adapters."""
    network, roles, x = mixed()
    base = merged(network, roles, TEACHER)(x)
    with roles.use("student"):
        assert torch.equal(network(x), base)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_rows_are_separate_forwards(memory_format: torch.memory_format) -> None:
    network, roles, x = mixed()
    x = x.contiguous(memory_format=memory_format)
    blocks = [(TEACHER, 1), ("student", 2), ("critic", 0), (TEACHER, 1), ("critic", 2)]
    found = call(roles, network, x, blocks)
    parts = zip([role for role, _ in blocks], x.split([rows for _, rows in blocks]), strict=True)
    wanted = torch.cat([call(roles, network, part, role) for role, part in parts if len(part)])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_gradients_of_rows_are_those_of_separate_forwards() -> None:
    network, roles, x = mixed()
    found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    call(roles, network, found, [("student", 4), ("critic", 2)]).square().sum().backward()
    gradients = [factor.grad for role in ("student", "critic") for factor in roles.parameters(role)]
    for role in ("student", "critic"):
        for factor in roles.parameters(role):
            factor.grad = None
    for role, rows in (("student", slice(0, 4)), ("critic", slice(4, 6))):
        call(roles, network, wanted[rows], role).square().sum().backward()
    torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-11, atol=1e-12)
    separate = [factor.grad for role in ("student", "critic") for factor in roles.parameters(role)]
    torch.testing.assert_close(gradients, separate, rtol=1e-11, atol=1e-12)


def test_rows_that_do_not_add_up_are_refused() -> None:
    network, roles, x = mixed()
    with pytest.raises(OneStepError, match=r"\[2, 3\] do not add up to the batch of 6"):
        call(roles, network, x, [("student", 2), ("critic", 3)])


def test_an_unknown_role_is_refused_by_name() -> None:
    _, roles, _ = mixed()
    with pytest.raises(OneStepError, match="no role 'studnet'.*teacher.*student.*critic"):
        roles.use("studnet")
    with pytest.raises(OneStepError, match="rank must be at least 1, not 0"):
        roles.add("x", 0, 0)


def test_roles_nest_and_survive_exceptions() -> None:
    network, roles, x = mixed()
    wanted = {role: call(roles, network, x, role) for role in (TEACHER, "student", "critic")}
    with roles.use("student"):
        with pytest.raises(KeyError), roles.use("critic"), roles.capture(6):
            raise KeyError
        assert roles.active.blocks == ((TEACHER, None),)
        with roles.capture(6):
            assert torch.equal(network(x), wanted["student"])
            with roles.use("critic"), roles.capture(6):
                assert torch.equal(network(x), wanted["critic"])
            assert torch.equal(network(x), wanted["student"])
    with roles.capture(6):
        assert torch.equal(network(x), wanted[TEACHER])


# -- gradients --------------------------------------------------------------------------------------------------------


def test_only_the_roles_that_served_get_gradients() -> None:
    network, roles, x = mixed()
    call(roles, network, x, "student").sum().backward()
    assert all(factor.grad is not None and factor.grad.abs().sum() > 0 for factor in roles.parameters("student"))
    assert all(factor.grad is None for factor in roles.parameters("critic"))
    assert all(parameter.grad is None for parameter in network.parameters())


def test_train_false_passes_gradients_through_and_keeps_none() -> None:
    """SiD's terms through the critic: dx is wanted, dW is not."""
    network, roles, x = mixed()
    held, free = x.clone().requires_grad_(), x.clone().requires_grad_()
    call(roles, network, held, "critic", train=False).square().sum().backward()
    assert all(factor.grad is None for factor in roles.parameters("critic"))
    call(roles, network, free, "critic").square().sum().backward()
    torch.testing.assert_close(held.grad, free.grad, rtol=1e-12, atol=1e-13)
    assert not call(roles, network, x, "critic", train=False).requires_grad


def test_gradients_are_the_chain_rule_of_merged_weights() -> None:
    """dA = B^T dW, dB = dW A^T, with dW from plain autograd on W + B A."""
    network, roles, x = mixed()
    call(roles, network, x, "student").square().sum().backward()
    other = merged(network, roles, "student").requires_grad_(True)
    other(x).square().sum().backward()
    for name, (a, b) in roles._factors["student"].items():
        dw = other.get_submodule(name).weight.grad.flatten(1)  # type: ignore[union-attr, operator]
        torch.testing.assert_close(a.grad.flatten(1), b.detach().flatten(1).T @ dw, rtol=1e-10, atol=1e-11)  # type: ignore[union-attr]
        torch.testing.assert_close(b.grad.flatten(1), dw @ a.detach().flatten(1).T, rtol=1e-10, atol=1e-11)  # type: ignore[union-attr]


def test_a_switch_between_forward_and_backward_changes_nothing() -> None:
    """The trap of peft's set_adapter: there, the student's gradients would silently be None."""
    network, roles, x = mixed()
    call(roles, network, x, "student").square().sum().backward()
    wanted = [factor.grad.clone() for factor in roles.parameters("student")]  # type: ignore[union-attr]
    for factor in roles.parameters("student"):
        factor.grad = None
    out = call(roles, network, x, "student")
    call(roles, network, x, "critic")
    with roles.use("critic"), torch.no_grad():
        roles.capture(6)
    out.square().sum().backward()
    torch.testing.assert_close([f.grad for f in roles.parameters("student")], wanted, rtol=0, atol=0)
    assert all(factor.requires_grad for role in ("student", "critic") for factor in roles.parameters(role))


def test_backward_under_other_roles_is_refused() -> None:
    network, roles, x = mixed()
    for meanwhile in (roles.use("critic"), roles.use(TEACHER), roles.rows([("student", 3), ("critic", 3)])):
        out = call(roles, network, x, "student")
        with meanwhile, pytest.raises(OneStepError, match="built as .*student.* was run backward under"):
            out.sum().backward()
    with roles.use("student"):
        call(roles, network, x, "student").sum().backward()
    call(roles, network, x, "student").sum().backward()


# -- layers -----------------------------------------------------------------------------------------------------------


class Fused(nn.Module):
    """q, k and v in one layer, as ComfyUI has them, and rows that no target owns."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(5, 12, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.qkv(x))


def test_slices_and_a_permutation_of_a_fused_layer_are_separate_layers() -> None:
    """Rows 0-3 q, 3-7 v (stored in another order), 7-9 nobody's, 9-12 k; host = canonical[permutation]."""
    fused, order = Fused().requires_grad_(False), torch.tensor([2, 3, 0, 1])
    parts = {"q": (slice(0, 3), None), "v": (slice(3, 7), order), "k": (slice(9, 12), None)}
    roles = Roles([Target(name, fused.qkv, rows, permutation) for name, (rows, permutation) in parts.items()])
    roles.add("student", 2, 0)
    scatter(roles, "student", 5, torch.float64)
    roles.install()
    x = torch.randn(4, 7, 5, dtype=torch.float64, requires_grad=True)
    out = call(roles, fused, x, [(TEACHER, 1), ("student", 3)])
    out.square().sum().backward()

    apart = x.detach().clone().requires_grad_()
    pieces, weight, bias = [], fused.qkv.weight, fused.qkv.bias
    factors = {
        name: [f.detach().clone().requires_grad_() for f in pair] for name, pair in roles.state("student").items()
    }
    for rows, name in ((slice(0, 3), "q"), (slice(3, 7), "v"), (slice(7, 9), ""), (slice(9, 12), "k")):
        base = apart @ weight[rows].T + bias[rows]
        if name:
            a, b = factors[name]
            product = apart[1:] @ a.T @ b.T
            product = product if parts[name][1] is None else product[..., order]
            base = torch.cat([base[:1], base[1:] + product])
        pieces.append(base)
    wanted = torch.tanh(torch.cat(pieces, -1))
    wanted.square().sum().backward()
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, apart.grad, rtol=1e-11, atol=1e-12)
    for name, pair in roles._factors["student"].items():
        torch.testing.assert_close([f.grad for f in pair], [f.grad for f in factors[name]], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
def test_layers_that_cast_on_use(stored: torch.dtype, computed: torch.dtype) -> None:
    """The stored weight stays as it is; the product runs in the compute type; factors and gradients are float32."""
    network = Stored(stored)
    roles = roles_on(network, student=0)
    x = torch.randn(2, 3, 6, 6).to(computed).requires_grad_()
    out = call(roles, network, x, "student")
    out.float().square().sum().backward()
    assert out.dtype == computed and network.linear.weight.dtype == network.conv.weight.dtype == stored
    wide = Stored(torch.float32)
    for ours, theirs in zip(wide.parameters(), network.parameters(), strict=True):
        ours.data = theirs.detach().float()
    wanted = merged(wide, roles, "student")(x.detach().float())
    close = {"rtol": 1e-5, "atol": 1e-5} if computed == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    torch.testing.assert_close(out.float(), wanted, **close)
    assert all(f.dtype == f.grad.dtype == torch.float32 for f in roles.parameters("student"))  # type: ignore[union-attr]
    assert x.grad is not None and x.grad.dtype == computed


# -- nobody else is touched -------------------------------------------------------------------------------------------


def test_nothing_enters_the_module_tree() -> None:
    torch.manual_seed(0)
    network = Mixed()
    for flag, parameter in enumerate(network.parameters()):
        parameter.requires_grad_(flag % 2 == 0)
    before = (
        [name for name, _ in network.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in network.named_parameters()],
        list(network.state_dict()),
        [type(module).forward for module in network.modules()],
    )
    roles = roles_on(network, student=0, critic=0)
    call(roles, network, torch.randn(2, 3, 8, 8), "student").sum().backward()
    after = (
        [name for name, _ in network.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in network.named_parameters()],
        list(network.state_dict()),
        [type(module).forward for module in network.modules()],
    )
    assert before == after and not any("forward" in vars(module) for module in network.modules())
    roles.remove()
    assert not any(module._forward_hooks for module in network.modules())


def test_hooks_hang_once_and_come_off() -> None:
    network, roles, x = mixed()
    wanted = call(roles, network, x, "student")
    roles.install()
    with roles.installed():
        assert torch.equal(call(roles, network, x, "student"), wanted)
    assert torch.equal(call(roles, network, x, "student"), wanted)
    roles.remove()
    with roles.installed():
        assert torch.equal(call(roles, network, x, "student"), wanted)
    assert torch.equal(call(roles, network, x, "student"), network(x))


def test_a_deep_copy_of_the_network_shares_no_adapter_and_no_weight() -> None:
    """ComfyUI deep-copies a model to train it: roles bound to the copy adapt the copy alone."""
    network, roles, x = mixed()
    roles.remove()
    twin = copy.deepcopy(network)
    on_twin = Roles(targets_of(twin))
    for role in ("student", "critic"):
        on_twin.load(role, copy.deepcopy(roles.state(role)))
    roles.install()
    on_twin.install()
    base = merged(network, roles, TEACHER)(x)
    with roles.use("student"):
        assert torch.equal(twin(x), base)
    torch.testing.assert_close(
        call(on_twin, twin, x, "student"), call(roles, network, x, "student"), rtol=1e-6, atol=1e-6
    )
    assert torch.equal(network(x), base)
    assert {p.data_ptr() for p in twin.parameters()}.isdisjoint(p.data_ptr() for p in network.parameters())


class Big(nn.Module):
    """Weights far larger than any activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(256, 256, bias=False) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_each_base_tensor_exists_once() -> None:
    """Over all live tensors and all that autograd keeps, at three points of a step with rows of three roles."""
    network = Big().requires_grad_(False)
    roles = roles_on(network, student=0, critic=0)
    base = {layer.weight.untyped_storage().data_ptr() for layer in network.layers}  # type: ignore[union-attr, operator]
    kept: set[int] = set()

    def large() -> set[int]:
        # a fake tensor that torch's own caches hold has no memory to count
        live = [value for value in gc.get_objects() if issubclass(type(value), Tensor)]
        tensors = [value for value in live if not issubclass(type(value), FakeTensor)]
        ours = [t for t in tensors if t.device.type == "cpu" and t.untyped_storage().nbytes() == 256 * 256 * 4]
        return {t.untyped_storage().data_ptr() for t in ours}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().nbytes() >= 256 * 256 * 4:
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    before = large()
    x = torch.randn(6, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = call(roles, network, x, [(TEACHER, 2), ("student", 2), ("critic", 2)])
    points = [large()]
    x.register_hook(lambda gradient: points.append(large()))
    out.sum().backward()
    points.append(large())
    assert base <= before and all(point == before for point in points) and kept <= base
