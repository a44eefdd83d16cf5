"""A streamed base computes what a resident one does, to the last bit: forwards, gradients, rows of several roles."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
from deepened import deepened
from delayed_link import DelayedLink, only_of_the_ring
from narrowed import narrowed
from role_networks import call, scatter
from small_networks import CASES, inputs_of, network_of
from torch import Tensor, nn

from onestep.core.checkpoint import checkpoint_blocks
from onestep.core.families import bind_diffusers, blocks_of
from onestep.core.roles import Roles
from onestep.core.stream_link import Link, PlainLink
from onestep.core.streaming import Stream, streamed

CPU = torch.device("cpu")
LINKS: dict[str, Callable[[], Link]] = {"at once": lambda: PlainLink(CPU), "delayed": DelayedLink}
Found = list[Tensor | None]


class World:
    """A family's network with two roles on it, installed, and its blocks."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        self.case, self.network = CASES[name], deepened(network_of(name, dtype))
        self.roles = Roles(bind_diffusers(self.network))
        for seed, role in enumerate(("student", "critic")):
            self.roles.add(role, 2, seed)
            scatter(self.roles, role, 10 + seed, size=0.1)
        self.roles.install()
        self.inputs, self.blocks = inputs_of(name, dtype), blocks_of(self.network)

    def answer(self, role: str | list[tuple[str, int]], x: Tensor) -> Tensor:
        def network(given: Tensor) -> Tensor:
            return self.case.run(self.network, self.inputs | {"x": given})

        return call(self.roles, network, x, role)  # type: ignore[arg-type]

    def gradients(self, role: str | list[tuple[str, int]]) -> Found:
        """Of the sum of squares, by x and by every factor of both roles."""
        x = self.inputs["x"].clone().requires_grad_()
        answer = self.answer(role, x)
        answer.square().sum().backward()
        leaves = [x, *self.roles.parameters("student"), *self.roles.parameters("critic")]
        found = [answer.detach(), *(leaf.grad for leaf in leaves)]
        for leaf in leaves:
            leaf.grad = None
        return found


def everything(world: World) -> Found:
    """Passes as a run makes them, one after another."""
    with torch.no_grad():
        found: Found = [world.answer("teacher", world.inputs["x"]), world.answer("critic", world.inputs["x"])]
    found += world.gradients("student")
    found += world.gradients([("critic", 1), ("teacher", 1)])
    found += world.gradients([("student", 1), ("critic", 1)])
    with torch.no_grad():
        found.append(world.answer([("teacher", 1), ("student", 1)], world.inputs["x"]))
    return [*found, *world.gradients("critic")]


def played(
    name: str, link: Link | None, play: Callable[[World], Found] = everything, dtype: torch.dtype = torch.float32
) -> tuple[Found, Stream | None]:
    """What ``play`` finds, the base resident where there is no link."""
    world = World(name, dtype)
    with ExitStack() as stack:
        stream: Any = stack.enter_context(streamed(world.network, world.blocks, CPU, link) if link else nullcontext())
        stack.enter_context(only_of_the_ring(stream) if link else nullcontext())
        stack.enter_context(checkpoint_blocks(world.blocks, world.roles))
        return play(world), stream


def same(found: Found, wanted: Found) -> bool:
    return len(found) == len(wanted) and all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b))  # type: ignore[arg-type]
        for a, b in zip(found, wanted, strict=True)
    )


PASSES = [(name, link) for name in CASES for link in LINKS]
DELAYED = [(name, "delayed") for name in ("sd15", "sd3", "flux")]


@pytest.mark.parametrize(
    ("name", "link"),
    narrowed(
        PASSES,
        ("sd3", "at once"),
        *DELAYED,
    ),
)
def test_every_pass_is_the_resident_one(name: str, link: str) -> None:
    wanted, _ = played(name, None)
    found, _ = played(name, LINKS[link]())
    assert same(found, wanted)
    assert all(bool(value.isfinite().all()) for value in found if value is not None)


@pytest.mark.broad
@pytest.mark.parametrize("dtype", narrowed([torch.bfloat16, torch.float64], torch.bfloat16), ids=str)
def test_in_other_dtypes(dtype: torch.dtype) -> None:
    wanted, _ = played("sdxl", None, dtype=dtype)
    found, _ = played("sdxl", DelayedLink(), dtype=dtype)
    assert same(found, wanted)


@pytest.mark.parametrize("name", narrowed(CASES, "sd15", "flux"))
def test_two_forwards_of_one_graph(name: str) -> None:
    """A student that draws in two steps, and a pass of others before its backward."""

    def twice(world: World) -> Found:
        x = world.inputs["x"].clone().requires_grad_()
        second = world.answer("student", world.answer("student", x) + x)
        with torch.no_grad():
            score = world.answer([("teacher", 1), ("critic", 1)], second.detach())
        (second * score).sum().backward()
        return [second.detach(), score, x.grad, *(p.grad for p in world.roles.parameters("student"))]

    assert same(played(name, DelayedLink(), twice)[0], played(name, None, twice)[0])


def test_without_checkpoints_a_gradient_is_refused_and_never_wrong() -> None:
    """The slot of what autograd kept was written over: its version tells."""
    world = World("sdxl")
    with streamed(world.network, world.blocks, CPU), pytest.raises(RuntimeError, match="modified by an inplace"):
        world.gradients("student")


def test_parts_of_a_graph_one_after_another() -> None:
    """Gradients by some leaves first, by others later, through the same graph."""

    def in_parts(world: World) -> Found:
        x = world.inputs["x"].clone().requires_grad_()
        loss = world.answer("student", x).square().sum()
        factors = world.roles.parameters("student")
        few, many = factors[:2], factors[2:]
        first = torch.autograd.grad(loss, few, retain_graph=True, allow_unused=True)
        with torch.no_grad():
            world.answer("critic", x.detach())
        return [*first, *torch.autograd.grad(loss, [x, *many], allow_unused=True)]

    assert same(played("sd35", DelayedLink(), in_parts)[0], played("sd35", None, in_parts)[0])


def test_everything_is_where_it_was_afterwards() -> None:
    """Parameters are the same objects with the same numbers and strides, in memory of their own; no hook is left."""
    world = World("sd15")
    world.roles.remove()
    conv: Any = next(m for block in world.blocks for m in block.modules() if isinstance(m, nn.Conv2d))
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    before = {name: (p, p.detach().clone(), p.stride()) for name, p in world.network.named_parameters()}
    world.roles.install()
    with pytest.raises(KeyError), streamed(world.network, world.blocks, CPU, DelayedLink()):
        world.answer("student", world.inputs["x"].clone())
        raise KeyError
    world.roles.remove()
    for name, p in world.network.named_parameters():
        kept, numbers, stride = before[name]
        assert p is kept and p.stride() == stride and torch.equal(p, numbers)
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()
    for module in world.network.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_weights_can_be_read_at_any_time() -> None:
    """Whatever is in the ring or half way to it: hashes, saves and merges see every weight as it is."""
    world = World("flux")
    before = {name: value.clone() for name, value in world.network.state_dict().items()}
    seen: list[bool] = []

    def look(*unused: Any) -> None:
        now = world.network.state_dict()
        seen.append(now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before))

    with streamed(world.network, world.blocks, CPU, DelayedLink()):
        layers = [m for block in world.blocks for m in block.modules() if isinstance(m, nn.Linear)]
        handles = [layer.register_forward_hook(look) for layer in layers]
        for _ in range(2):
            world.answer("student", world.inputs["x"].clone())
        look()
        for handle in handles:
            handle.remove()
    assert len(seen) > 20 and all(seen)
