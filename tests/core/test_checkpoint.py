"""Checkpointed gradients are the plain ones: whatever is called, however it is called, under whichever roles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onestep.core.checkpoint import checkpoint_blocks, clone_inputs
from onestep.core.errors import OneStepError
from onestep.core.roles import Roles
from onestep.core.targets import Target

Run = Callable[["Network", Tensor], Tensor]


class Block(nn.Module):
    """A convolution and a Linear, as a U-Net's block has them; counts its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)
        self.forwards = 0

    def forward(self, x: Tensor, scale: Tensor | float = 1.0, options: dict[str, Any] | None = None) -> Tensor:
        self.forwards += 1
        if options is not None:
            options["calls"] = options.get("calls", 0) + 1
            options["place"]["index"] += 1
            scale = scale * options["calls"] * options["place"]["index"]
        h = torch.tanh(self.conv(x))
        return x + scale * self.linear(h.movedim(1, -1)).movedim(-1, 1)


class Flux(nn.Module):
    """As Flux' blocks in ComfyUI: what a layer was given is changed in place afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.movedim(1, -1)
        rows += torch.tanh(self.linear(self.norm(rows)))
        rows += self.linear(rows).sin()
        return rows.movedim(-1, 1)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.flux = Flux()


class Setting:
    """A network in float64, its targets adapted away from B = 0, for two roles."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.network = Network().double().requires_grad_(False)
        layers = {name: m for name, m in self.network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        self.roles = Roles([Target(name, module) for name, module in layers.items()])
        for seed, role in enumerate(("student", "critic")):
            self.roles.add(role, 2, seed)
            pairs = self.roles._factors[role].items()
            doubled = {name: (a.detach().double(), torch.randn(b.shape).double()) for name, (a, b) in pairs}
            self.roles._factors[role] = {
                name: tuple(factor.requires_grad_() for factor in pair) for name, pair in doubled.items()
            }  # type: ignore[assignment]
        self.roles.install()
        self.x = torch.randn(2, 3, 4, 4, dtype=torch.float64)

    @contextmanager
    def checkpointed(self, on: bool) -> Iterator[None]:
        flux = self.network.flux
        blocks = checkpoint_blocks([*self.network.blocks, flux], self.roles) if on else nullcontext()
        with clone_inputs([flux.norm, flux.linear]), blocks:
            yield

    def gradients(self, run: Run, *, checkpointing: bool, role: str = "student") -> list[Tensor | None]:
        """Of sum(out^2), for the input and the role's factors."""
        x = self.x.clone().requires_grad_()
        leaves = [x, *self.roles.parameters(role)]
        with self.checkpointed(checkpointing):
            captured = self.roles.capture(len(x))
            with self.roles.use(role):
                captured = self.roles.capture(len(x))
            with captured:
                out = run(self.network, x)
            captured.guard(out).square().sum().backward()
        found = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return found


def positional(net: Network, x: Tensor) -> Tensor:
    return net.blocks[1](net.blocks[0](x, x.mean()), 0.5)


def by_keyword(net: Network, x: Tensor) -> Tensor:
    return net.blocks[1](x=net.blocks[0](x=x, scale=x.mean()), scale=torch.tensor(0.5).double())


def with_dictionary(net: Network, x: Tensor) -> Tensor:
    """ComfyUI's transformer_options: the caller says where it is, a block counts in it and reads what it counted."""
    options: dict[str, Any] = {}
    for index, block in enumerate((*net.blocks, net.blocks[0])):
        options |= {"place": {"index": index}, "calls": 0}
        x = block(x, 1.0, options)
    options["place"]["index"] = options["calls"] = 99
    return x


def dictionary_by_keyword(net: Network, x: Tensor) -> Tensor:
    return net.blocks[0](x, options={"place": {"index": 1}})


def repeated(net: Network, x: Tensor) -> Tensor:
    return net.blocks[0](net.blocks[0](net.blocks[1](net.blocks[0](x))))


def in_place(net: Network, x: Tensor) -> Tensor:
    return net.flux(net.flux(net.blocks[0](x).clone()))


def in_place_of_what_asks_for_none(net: Network, x: Tensor) -> Tensor:
    return net.flux(x.detach().clone()) + x.sin()


def half_without_gradient(net: Network, x: Tensor) -> Tensor:
    with torch.no_grad():
        shift = net.blocks[0](x)
    return net.blocks[1](net.blocks[0](x + shift))


RUNS = [positional, by_keyword, with_dictionary, dictionary_by_keyword, repeated, in_place]
RUNS += [in_place_of_what_asks_for_none, half_without_gradient]


@pytest.mark.parametrize("run", RUNS)
def test_gradients_are_the_plain_ones(run: Run) -> None:
    setting = Setting()
    plain = setting.gradients(run, checkpointing=False)
    recomputed = setting.gradients(run, checkpointing=True)
    assert plain[0] is not None
    for wanted, found in zip(plain, recomputed, strict=True):
        assert (wanted is None) == (found is None)
        if wanted is not None and found is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("run", RUNS)
def test_the_forward_is_the_plain_one(run: Run) -> None:
    """To the last bit, hooks on or off, with gradients or without."""
    setting = Setting()
    with setting.checkpointed(False):
        wanted = run(setting.network, setting.x.clone())
    with setting.checkpointed(True):
        assert torch.equal(run(setting.network, setting.x.clone()), wanted)
        with torch.no_grad():
            assert torch.equal(run(setting.network, setting.x.clone()), wanted)
    with setting.checkpointed(False):
        assert torch.equal(run(setting.network, setting.x.clone()), wanted)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("run", [positional, with_dictionary, in_place])
def test_gradients_are_the_finite_differences(run: Run, checkpointing: bool) -> None:
    """Along a random direction of the input and all factors at once, in float64, adapters away from B = 0."""
    setting = Setting()
    gradients = setting.gradients(run, checkpointing=checkpointing)
    leaves = [setting.x, *(factor.detach() for factor in setting.roles.parameters("student"))]
    directions = [torch.randn_like(leaf) for leaf in leaves]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None)

    def loss(step: float) -> float:
        for leaf, direction in zip(leaves, directions, strict=True):
            leaf.add_(step * direction)
        with setting.roles.use("student"), torch.no_grad(), setting.roles.capture(2):
            value = float(run(setting.network, setting.x.clone()).square().sum())
        for leaf, direction in zip(leaves, directions, strict=True):
            leaf.sub_(step * direction)
        return value

    h = 1e-6
    assert (loss(h) - loss(-h)) / (2 * h) == pytest.approx(slope, rel=1e-7)


def test_activations_are_recomputed_once_and_not_kept() -> None:
    """Each block runs twice in all; what autograd keeps meanwhile is the blocks' inputs alone."""
    setting = Setting()
    first = setting.network.blocks[0]
    kept: list[int] = []
    with setting.checkpointed(True), setting.roles.use("student"):
        with setting.roles.capture(2):
            before = setting.x.clone().requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
                out = positional(setting.network, before)
        assert first.forwards == 1
        out.sum().backward()
    assert first.forwards == 2 and setting.network.blocks[1].forwards == 2
    assert sum(kept) <= 2 * setting.x.numel() + 1, "two inputs and the scale are kept, no activation"


def test_recomputation_has_the_roles_of_its_forward() -> None:
    """Switch to another role, to rows of several, or to none before backward: gradients are the student's all the same.

    Under another role the denoiser's guard would stop this; the blocks themselves must be right without it.
    """
    setting = Setting()
    wanted = setting.gradients(positional, checkpointing=False)
    for meanwhile in (setting.roles.use("critic"), setting.roles.use("teacher"), setting.roles.rows([("critic", 2)])):
        x = setting.x.clone().requires_grad_()
        with setting.checkpointed(True):
            with setting.roles.use("student"), setting.roles.capture(2):
                out = positional(setting.network, x)
            with meanwhile, setting.roles.capture(2):
                positional(setting.network, x.detach())
                out.square().sum().backward()
        for leaf, gradient in zip([x, *setting.roles.parameters("student")], wanted, strict=True):
            assert (leaf.grad is None) == (gradient is None)
            if gradient is not None:
                torch.testing.assert_close(leaf.grad, gradient, rtol=1e-12, atol=1e-13)
            leaf.grad = None
        assert all(factor.grad is None for factor in setting.roles.parameters("critic"))


def test_rows_of_several_roles_are_recomputed_as_such() -> None:
    found = []
    for on in (False, True):
        setting = Setting()
        x = setting.x.clone().requires_grad_()
        with setting.roles.rows([("critic", 1), ("student", 1)]):
            captured = setting.roles.capture(2)
        with setting.checkpointed(on), captured:
            out = positional(setting.network, x)
        out.square().sum().backward()
        found.append([x.grad] + [f.grad for role in ("student", "critic") for f in setting.roles.parameters(role)])
    for plain, recomputed in zip(*found, strict=True):
        assert (plain is None) == (recomputed is None)
        if plain is not None:
            torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-13)


def test_a_block_inside_a_block() -> None:
    outer = nn.Sequential(Block(), Block()).double().requires_grad_(False)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    grads = []
    for blocks in ([], [outer], [outer, *outer], [*outer, outer, outer[0]]):
        leaf = x.clone().requires_grad_()
        with checkpoint_blocks(blocks, Roles([])):
            outer(leaf).square().sum().backward()
        grads.append(leaf.grad)
    for found in grads[1:]:
        torch.testing.assert_close(found, grads[0], rtol=1e-12, atol=1e-13)


def test_an_exception_leaves_nothing_behind() -> None:
    """Out of memory inside a block, in forward or in its recomputation: the next step is as if it had not been."""
    setting = Setting()
    wanted = setting.gradients(positional, checkpointing=True)
    for fail_at in (1, 2, 3, 4):
        calls: list[int] = []

        def fail(module: nn.Module, args: Any, calls: list[int] = calls, fail_at: int = fail_at) -> None:
            calls.append(1)
            if len(calls) == fail_at:
                raise torch.OutOfMemoryError("injected")

        with setting.checkpointed(True):
            handles = [block.linear.register_forward_pre_hook(fail) for block in setting.network.blocks]
            x = setting.x.clone().requires_grad_()
            with pytest.raises(torch.OutOfMemoryError), setting.roles.use("student"):
                with setting.roles.capture(2):
                    out = positional(setting.network, x)
                out.square().sum().backward()
            for handle in handles:
                handle.remove()
        kept = torch.ones(1, requires_grad=True).sin().grad_fn._saved_self  # type: ignore[union-attr]
        assert isinstance(kept, Tensor), "autograd keeps tensors again, not slots"
        for factor in setting.roles.parameters("student"):
            factor.grad = None
        again = setting.gradients(positional, checkpointing=True)
        for before, after in zip(wanted, again, strict=True):
            assert (before is None) == (after is None)
            assert before is None or after is None or torch.equal(before, after)


def test_nothing_is_checkpointed_outside() -> None:
    setting = Setting()
    with setting.checkpointed(True):
        pass
    for module in setting.network.modules():
        assert len(module._forward_pre_hooks) == 0
    assert len(setting.network.blocks[0]._forward_hooks) == 0
    # an exception inside takes the hooks off too
    with pytest.raises(KeyError), setting.checkpointed(True):
        raise KeyError
    assert len(setting.network.blocks[0]._forward_pre_hooks) == 0


@pytest.mark.parametrize("named", [False, True])
def test_a_caller_who_changes_a_kept_input_is_told(named: bool) -> None:
    """The block's recomputation would silently see the changed value; plain autograd would have noticed."""
    setting = Setting()
    x = setting.x.clone().requires_grad_() * 1
    with setting.checkpointed(True):
        out = setting.network.blocks[0](x=x) if named else setting.network.blocks[0](x)
        x += 1
        # torch itself watches positional inputs, we the ones given by name
        with pytest.raises((OneStepError, RuntimeError), match="modified by an inplace|changed in place"):
            out.sum().backward()


@pytest.mark.parametrize("grad", [True, False])
def test_blocks_that_write_to_their_input_write_as_they_do_without_checkpoints(grad: bool) -> None:
    """In place as the host means it; what backward computes again begins from what was there before."""
    setting = Setting()
    written, gradients = [], []
    for checkpointed in (False, True):
        x = setting.x.clone().requires_grad_(grad)
        kept = x * 1
        with setting.checkpointed(checkpointed), torch.set_grad_enabled(grad):
            out = setting.network.flux(kept)
            gradients.append(torch.autograd.grad(out.square().sum(), x)[0] if grad else x)
        written.append(kept.detach().clone())
    assert torch.equal(*written) and not torch.equal(written[0], setting.x)
    assert torch.equal(*gradients)


def test_random_numbers_inside_a_block_are_drawn_again() -> None:
    """Dropout in a block: the recomputation sees the same mask, and the caller's generator is where it was."""
    block = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6)).double()
    found = []
    for blocks in ([], [block]):
        torch.manual_seed(3)
        x = torch.ones(4, 6, dtype=torch.float64, requires_grad=True)
        with checkpoint_blocks(blocks, Roles([])):
            block(x).square().sum().backward()
        found.append((x.grad, torch.rand(3)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-13)
