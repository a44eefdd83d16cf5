"""What a checkpointed block's recomputation needs beside its inputs, what stays in memory, and how it is left."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onestep.core.checkpoint import checkpoint_blocks
from onestep.core.errors import OneStepError
from onestep.core.roles import Roles
from onestep.core.targets import Target


def gradient(block: nn.Module, x: Tensor, *, checkpointing: bool, run: Callable[[Tensor], Tensor] | None = None) -> Any:
    leaf = x.clone().requires_grad_()
    with checkpoint_blocks([block] if checkpointing else [], Roles([])):
        out = (run or block)(leaf)
        out.square().sum().backward()
    return leaf.grad


def some_block() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.SiLU(), nn.Linear(9, 6), nn.Tanh()).double().eval()


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_graph_that_is_kept_is_run_backward_again(times: int) -> None:
    block, x = some_block(), torch.randn(3, 6, dtype=torch.float64)
    wanted = gradient(block, x, checkpointing=False)
    leaf = x.clone().requires_grad_()
    with checkpoint_blocks([block], Roles([])):
        loss = block(leaf).square().sum()
        for _ in range(times):
            loss.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, times * wanted, rtol=1e-13, atol=0)


def test_gradients_of_gradients_are_the_plain_ones() -> None:
    """A penalty on the gradient's norm, as some objectives have it."""
    block, x, found = some_block(), torch.randn(3, 6, dtype=torch.float64), []
    for blocks in ([], [block]):
        leaf = x.clone().requires_grad_()
        with checkpoint_blocks(blocks, Roles([])):
            (slope,) = torch.autograd.grad(block(leaf).sin().sum(), leaf, create_graph=True)
            slope.square().sum().backward()
        found.append(leaf.grad)
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)


def test_only_a_part_of_the_graph_is_asked_for() -> None:
    """Two outputs of one block, run backward one after the other, and one of them never."""

    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x.sin().exp(), x.cos().exp(), x.tanh().exp()

    block, x, found = Two().eval(), torch.randn(5, dtype=torch.float64), []
    for blocks in ([], [block]):
        leaf = x.clone().requires_grad_()
        with checkpoint_blocks(blocks, Roles([])):
            first, second, _ = block(leaf)
            second.sum().backward()
            (2 * first).sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-13, atol=0)


def test_no_activation_outlives_its_use() -> None:
    """After the forward none is there; after backward not even an input is."""
    alive: list[weakref.ref[Tensor]] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(4):
                x = x.sin().exp()
                alive.append(weakref.ref(x))
            return x.sum()

    def living() -> int:
        gc.collect()
        return sum(ref() is not None for ref in alive)

    block, leaf = Watched().eval(), torch.randn(5, requires_grad=True)
    with checkpoint_blocks([block], Roles([])):
        given = leaf * 2
        held = weakref.ref(given)
        loss = block(given)
        del given
        assert (living(), held() is not None) == (0, True)
        loss.backward()
        assert len(alive) == 8 and living() == 0
        assert held() is None, "the graph is used up, and with it what the block had kept"


def test_a_block_that_computes_otherwise_the_second_time_is_told() -> None:
    """It would be given the first forward's gradient through the second one's numbers."""

    class Fickle(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x.sin() if self.calls == 1 else self.other(x)

        other: Callable[[Tensor], Tensor]

    for other in (lambda x: x.sin().sin(), lambda x: x * 2, lambda x: torch.cat([x, x]).sin()):
        block = Fickle().eval()
        block.other = other
        with pytest.raises((OneStepError, RuntimeError), match="computed otherwise"):
            gradient(block, torch.randn(4), checkpointing=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interrupt_inside_a_block_leaves_no_hook(error: type[BaseException]) -> None:
    """ComfyUI's interrupt and Ctrl-C are no ordinary exceptions; torch tells a forward hook of none of them."""

    class Interrupted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise error("injected")

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Interrupted()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.sin())

    block = Outer().eval()
    with pytest.raises(error), checkpoint_blocks([block, block.inner], Roles([])):
        block(torch.randn(3, requires_grad=True))
    leaf = torch.randn(3, requires_grad=True)
    out = leaf.sin()
    assert isinstance(out.grad_fn._saved_self, Tensor), "autograd keeps tensors again, not slots"
    out.sum().backward()
    torch.testing.assert_close(leaf.grad, leaf.detach().cos())


def test_recomputation_is_under_the_autocast_of_its_forward() -> None:
    """Also where backward is called outside of it, or inside of another one."""
    block, x = some_block().float(), torch.randn(3, 6)
    plain, narrow = (gradient(block, x, checkpointing=False, run=run) for run in (block, under(block, True)))
    assert (plain - narrow).abs().max() > 1e-4
    assert torch.equal(gradient(block, x, checkpointing=True, run=under(block, True)), narrow)
    # the products of backward itself are under the autocast around backward, checkpointed or not
    found = []
    for blocks in ([], [block]):
        leaf = x.clone().requires_grad_()
        with checkpoint_blocks(blocks, Roles([])):
            out = block(leaf)
            with torch.autocast("cpu", torch.bfloat16):
                out.square().sum().backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


def under(block: nn.Module, on: bool) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            return block(x)

    return run


def test_random_layers_draw_again_and_a_block_in_eval_mode_costs_no_generator() -> None:
    """The mask of the forward in training mode; in eval mode nothing draws, and nothing is set back."""
    block = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6))
    x, found = torch.ones(4, 6), []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        found.append(gradient(block, x, checkpointing=checkpointing))
    assert torch.equal(*found)
    block.eval()
    assert torch.equal(*(gradient(block, x, checkpointing=on) for on in (False, True)))


def test_hooks_on_the_block_itself_act_once() -> None:
    """What others hang on a block changes what it is given and what it gives, not what is computed again."""
    block, x = some_block(), torch.randn(3, 6, dtype=torch.float64)
    handles = [
        block.register_forward_pre_hook(lambda module, args: (args[0].sin(),)),
        block.register_forward_hook(lambda module, args, output: output.exp()),
    ]
    plain, recomputed = (gradient(block, x, checkpointing=on) for on in (False, True))
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(gradient(block, x, checkpointing=False), plain)


def test_inputs_in_dictionaries_and_tuples() -> None:
    """Rotary tables come as a tuple, a host's options as nested dictionaries in which it goes on counting."""

    class Block(nn.Module):
        def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], options: dict[str, Any]) -> Tensor:
            options["place"]["seen"] += 1
            return (x * tables[0]).sin() * tables[1] * options["place"]["seen"]

    block, x, found = Block().eval(), torch.randn(2, 4), []
    for blocks in ([], [block]):
        leaf = x.clone().requires_grad_()
        options = {"place": {"seen": 1}}
        with checkpoint_blocks(blocks, Roles([])):
            out = block(leaf, (torch.full((4,), 2.0), torch.full((4,), 3.0)), options=options)
            options["place"]["seen"] = 99
            out.sum().backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("train", [True, False])
def test_a_role_that_learns_nothing_is_recomputed_so(train: bool) -> None:
    block = some_block()
    roles = Roles([Target("first", block[0])])
    roles.add("critic", 2, 0)
    roles.install()
    for factor in roles.parameters("critic"):
        factor.detach().copy_(torch.randn_like(factor))
    x, found = torch.randn(3, 6, dtype=torch.float64), []
    block.requires_grad_(False)
    for blocks in ([], [block]):
        leaf = x.clone().requires_grad_()
        with checkpoint_blocks(blocks, roles):
            with roles.use("critic", train=train), roles.capture(3):
                out = block(leaf)
            out.square().sum().backward()
        found.append([leaf.grad, *(factor.grad for factor in roles.parameters("critic"))])
        for factor in roles.parameters("critic"):
            factor.grad = None
    assert [gradient is None for gradient in found[0]] == [False, not train, not train]
    for plain, recomputed in zip(*found, strict=True):
        assert (plain is None and recomputed is None) or torch.equal(plain, recomputed)
