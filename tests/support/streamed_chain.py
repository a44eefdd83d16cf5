"""A chain of blocks of different sizes, to count what a ring moves and to see what it computes with."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import torch
from delayed_link import only_of_the_ring
from role_networks import call, roles_on
from torch import Tensor, nn

import onestep.core.streaming as streaming
from onestep.core.checkpoint import checkpoint_blocks

CPU = torch.device("cpu")


class Block(nn.Module):
    """Its width differs from its neighbours', so that no weight fits in another's place."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, hidden), nn.Linear(hidden, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Chain(nn.Module):
    """``order``: of its blocks in a forward; until: how many of them run before it stops by an exception."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList([Block(5 + 40 * ((3 * index) % 4)) for index in range(count)])
        self.order: Sequence[int] = range(count)
        self.until = count

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for place, index in enumerate(self.order):
            if place == self.until:
                raise InterruptedError
            h = self.blocks[index](h)
        return self.last(h)


class Streamed:
    """A chain with two roles, streamed by ``link``, or resident where there is none. module: whose `streamed`."""

    def __init__(self, count: int, link: Any = None, module: ModuleType = streaming) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(count)
            self.network = Chain(count).requires_grad_(False)
            self.x = torch.randn(4, 5)
        self.roles = roles_on(self.network, student=0, critic=1)
        self.blocks, self._link, self._module = list(self.network.blocks), link, module
        self.stream: Any = None
        self._stack = ExitStack()

    def __enter__(self) -> Streamed:
        enter = self._stack.enter_context
        if self._link is not None:
            self.stream = enter(self._module.streamed(self.network, self.blocks, CPU, self._link))
            enter(only_of_the_ring(self.stream))
        enter(checkpoint_blocks(self.blocks, self.roles))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()

    def answer(self, role: Any = "teacher") -> Tensor:
        with torch.no_grad():
            return call(self.roles, self.network, self.x, role)

    def gradients(self, role: Any = "student") -> list[Tensor]:
        """The answer, and gradients of its sum of squares by x and the student's factors."""
        x, factors = self.x.clone().requires_grad_(), self.roles.parameters("student")
        answer = call(self.roles, self.network, x, role)
        found = torch.autograd.grad(answer.square().sum(), [x, *factors])
        return [answer.detach(), *found]

    def moved(self, work: Any) -> tuple[int, int]:
        """(copies, bytes) that ``work`` began."""
        before = self.stream.copies, self.stream.bytes
        work()
        return self.stream.copies - before[0], self.stream.bytes - before[1]


def sizes_of(blocks: Sequence[nn.Module]) -> list[int]:
    """Bytes of each block in the ring: of its weights, each begun at a multiple of 512."""
    return [sum(-(-4 * p.numel() // 512) * 512 for p in block.parameters()) for block in blocks]


def equal(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
