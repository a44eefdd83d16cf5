"""Bases as they are stored: float8, bitsandbytes' 4 and 8 bits, weights made of several tensors; and what stays."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from delayed_link import DelayedLink, only_of_the_ring
from mutations import must_fail, mutant
from torch import Tensor, nn

import onestep.core.streaming as streaming
from onestep.core.checkpoint import checkpoint_blocks
from onestep.core.packed import weights_of
from onestep.core.roles import Roles
from onestep.core.stored import store
from onestep.core.streaming import footprint, streamed
from onestep.core.targets import Target

CPU = torch.device("cpu")


def in_float8(layer: nn.Linear) -> nn.Module:
    store(layer)
    return layer


def quantised(kind: str) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes, of the dev extra, is not installed")
        from quantised_layers import stored

        return stored(layer, kind)

    return make


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "float8": in_float8,
    "nf4": quantised("nf4"),
    "int8": quantised("int8"),
}


class InPlace(nn.Sequential):
    """As Flux' blocks in ComfyUI: what it was given is what it answers, written over."""

    def forward(self, x: Tensor) -> Tensor:
        x += super().forward(x.tanh())
        return x


class HandsOn(nn.Sequential):
    """Answers what it was given, untouched, beside what it makes: a text that the last blocks no longer change."""

    def forward(self, pair: tuple[Tensor, Tensor] | Tensor) -> tuple[Tensor, Tensor]:
        x, told = pair if isinstance(pair, tuple) else (pair * 2, pair)
        return super().forward(x + told), told


class Sum(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor] | Tensor) -> Tensor:
        return pair[0] + pair[1] if isinstance(pair, tuple) else pair


def chain(
    make: Callable[[nn.Linear], nn.Module], adapted: bool, kind: type[nn.Sequential] = nn.Sequential
) -> tuple[nn.Module, Roles]:
    """Five blocks whose last layer is stored; its node is the first of the block's backward where it is not adapted."""
    torch.manual_seed(3)
    blocks = []
    for index in range(5):
        hidden = 64 + 32 * (index % 3)
        blocks.append(kind(nn.LayerNorm(64), nn.Linear(64, hidden), nn.Tanh(), make(nn.Linear(hidden, 64))))
    network = nn.Sequential(nn.Linear(6, 64), *blocks, Sum(), nn.Linear(64, 3)).requires_grad_(False)
    layers = [f"{index}.{layer}" for index in range(1, 6) for layer in ((1, 3) if adapted else (1,))]
    roles = Roles([Target(name, network.get_submodule(name)) for name in layers])
    roles.add("student", 2, 0)
    for _, b in roles.state("student").values():
        b.normal_()
    return network, roles


def passes(network: Any, roles: Roles) -> list[Tensor]:
    found = []
    for _ in range(2):
        x = torch.linspace(-1, 1, 24).view(4, 6).requires_grad_()
        with roles.use("student"):
            captured = roles.capture(len(x))
        with captured:
            out = network(x)
        found += [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *roles.parameters("student")])]
        with torch.no_grad(), roles.capture(len(x)):
            found.append(network(x))
    return found


def check(kind: str, adapted: bool, module: ModuleType = streaming, block: type[nn.Sequential] = nn.Sequential) -> None:
    network, roles = chain(KINDS[kind], adapted, block)
    with roles.installed(), checkpoint_blocks(network[1:6], roles):
        wanted = passes(network, roles)
    network, roles = chain(KINDS[kind], adapted, block)
    before = [p.detach().clone() for p in network.parameters()]
    with roles.installed(), module.streamed(network, network[1:6], CPU, DelayedLink()) as stream:
        with only_of_the_ring(stream), checkpoint_blocks(network[1:6], roles):
            found = passes(network, roles)
        widest = max(sum(w.value.nbytes for w in weights_of(block)) for block in network[1:6])
        assert widest <= len(stream._ring[0]) < widest + 512 * 8
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    with roles.installed(), checkpoint_blocks(network[1:6], roles):
        assert all(torch.equal(a, b) for a, b in zip(passes(network, roles), wanted, strict=True))


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_streamed_as_it_is_stored(kind: str, adapted: bool) -> None:
    check(kind, adapted)


@pytest.mark.parametrize("block", [InPlace, HandsOn])
@pytest.mark.parametrize("kind", KINDS)
def test_in_blocks_that_write_over_or_hand_on_what_they_are_given(kind: str, block: type[nn.Sequential]) -> None:
    check(kind, False, block=block)


def test_what_autograd_is_not_asked_to_keep_is_there_before_a_blocks_first_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bitsandbytes' 4-bit product keeps its weight by itself, where checkpoints do not see it."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, of the dev extra, is not installed")
    told = "value.grad_fn.register_prehook(lambda gradients: self._again(block))"
    wrong = mutant("onestep.core.streaming", told, "None", monkeypatch)
    must_fail(lambda module: check("nf4", False, module), wrong)


class Halves(torch.Tensor):
    """A weight of two tensors, as quantised ones are of numbers and scales."""

    low: Tensor
    high: Tensor

    @staticmethod
    def __new__(cls, low: Tensor, high: Tensor) -> Halves:
        shape = (low.shape[0] + high.shape[0], low.shape[1])
        made: Any = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=low.dtype, device=low.device)
        made.low, made.high = low, high
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["low", "high"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], told: None, shape: Any, stride: Any) -> Halves:
        return Halves(parts["low"], parts["high"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Halves(args[0].low, args[0].high)
        raise NotImplementedError(func)


class OfHalves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        made = Halves(torch.randn(2, 6), torch.randn(4, 6))
        self.weight = nn.Parameter(made, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        return torch.tanh(x @ torch.cat([weight.low, weight.high]).t())


def test_a_weight_of_several_tensors() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(*(OfHalves() for _ in range(4)))
    x = torch.randn(3, 6)
    wanted = network(x)
    with streamed(network, network, CPU, DelayedLink()) as stream:
        assert footprint(network, network).streamed == 4 * 2 * 512
        assert [torch.equal(network(x), wanted) for _ in range(3)] == [True] * 3
        assert stream.bytes == 3 * 4 * 1024
    assert torch.equal(network(x), wanted)
    assert network[0].weight.low.untyped_storage().nbytes() == 2 * 6 * 4


def test_what_is_shared_or_trained_or_written_to_stays() -> None:
    """A weight that two blocks have, or one and something else; a parameter that learns; a buffer that counts."""
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(4)]
    network = nn.Sequential(nn.Linear(4, 4), *blocks).requires_grad_(False)
    network[2][0].weight = network[1][0].weight
    network[3][0].weight = network[0].weight
    network[4][1].weight.requires_grad_(True)
    x, kept = torch.randn(5, 4), {id(p) for p in (network[0].weight, network[1][0].weight, network[4][1].weight)}
    pristine = {name: value.clone() for name, value in network.state_dict().items()}
    wanted = network(x)
    network.load_state_dict(pristine)
    with streamed(network, blocks, CPU, DelayedLink()) as stream:
        chosen = [weight.value for packed in stream._packed.values() for weight in packed.weights]
        assert not kept & {id(value) for value in chosen} and len(chosen) == 4 * 6 - 4
        assert torch.equal(network(x), wanted)
        counted = network[1][2].num_batches_tracked.clone()
    assert int(counted) == int(network[1][2].num_batches_tracked) == 1
