r"""A base that does not fit: its blocks' weights lie on the host and pass through a ring of two on the device.

    copies:    block 2 | block 3 | block 4 | ...            on a side stream, host to device only
    computes:  block 1 | block 2 | block 3 | ...            one forward for the rows of all roles; backward likewise

The weights are frozen, so nothing is ever copied back. A block has one of the two slots for good: what was computed in
it finds its weights at the same address in backward, whoever kept a reference to them. In a forward, and again in
backward before its first node, each block is copied once, if it is not in the ring still; while it computes, the copy
of the next is under way, by the order of the last pass. Weights outside of blocks, adapters, their moments, gradients
and activations stay on the device. Results are those of resident weights, bit for bit.

What it takes on the device is in `footprint`: what is no block's, and twice the largest block. What it moves is every
block's weights in each forward and again in each backward, over the card's link to the host: a pass whose arithmetic
takes longer than that copy is as fast as with resident weights, but for its first block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import OneStepError
from .packed import Packed, Weight, size_of, weights_of
from .stream_link import Link, link_of
from .stream_rest import moved

FORWARD, BACKWARD = "forward", "backward"
SLOTS = 2


@dataclass(frozen=True)
class Footprint:
    """Bytes of a network's weights while it is streamed. resident: on the device, always. ring: of the two slots there.
    streamed: on the host, and moved in each forward and again in each backward."""

    resident: int
    ring: int
    streamed: int

    @property
    def device(self) -> int:
        """In the place of the whole network's."""
        return self.resident + self.ring


def footprint(network: nn.Module, blocks: Iterable[nn.Module]) -> Footprint:
    """What `streamed` of the same would take; a shell of the network, on the meta device, will do."""
    chosen = list(_streamable(network, blocks).values())
    sizes = [size_of(weights) for weights in chosen]
    inside = sum(_bytes(weight.value) for weights in chosen for weight in weights)
    whole = sum(_bytes(value) for value in (*network.parameters(), *network.buffers()))
    return Footprint(whole - inside, SLOTS * max(sizes, default=0), sum(sizes))


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


@contextmanager
def streamed(
    network: nn.Module, blocks: Iterable[nn.Module], device: torch.device, link: Link | None = None
) -> Iterator[Stream]:
    """Within, the weights of ``blocks`` lie on the host and are copied to ``device`` as they are needed, and all else
    that ``network`` has lies there; afterwards every weight is where it was.

    A gradient is right only where each of these blocks is computed again in backward, by `checkpoint_blocks`; elsewhere
    autograd refuses it, since what it kept has been written over.
    """
    link = link or link_of(device)
    chosen = _streamable(network, blocks)
    if not any(chosen.values()):
        raise OneStepError("this network has no blocks of frozen weights to stream: set streaming to off")
    stream: Stream | None = None
    try:
        stream = Stream(chosen, link)
        with moved(network, {id(w.value) for weights in chosen.values() for w in weights}, device):
            yield stream
    finally:
        if stream is not None:
            stream.close()


def _streamable(network: nn.Module, blocks: Iterable[nn.Module]) -> dict[nn.Module, list[Weight]]:
    """The outermost of ``blocks`` with the weights that each has for itself: one that is used elsewhere too stays."""
    outermost = _outermost(list(dict.fromkeys(blocks)))
    found = {block: weights_of(block) for block in outermost}
    within = {id(module) for block in outermost for module in block.modules()}
    owners = Counter(id(weight.value) for weights in found.values() for weight in weights)
    owners.update(
        id(value) for module in network.modules() if id(module) not in within for value in module.parameters(False)
    )
    return {block: [w for w in weights if owners[id(w.value)] == 1] for block, weights in found.items()}


def _outermost(blocks: list[nn.Module]) -> list[nn.Module]:
    inner = {id(part) for block in blocks for part in list(block.modules())[1:]}
    return [block for block in blocks if id(block) not in inner]


class Stream:
    """The ring and the blocks that pass through it. copies, bytes: begun so far."""

    def __init__(self, chosen: dict[nn.Module, list[Weight]], link: Link) -> None:
        self.copies = self.bytes = 0
        self._link = link
        self._packed: dict[nn.Module, Packed] = {}
        self._handles: list[Any] = []
        self._slot: dict[nn.Module, int] = {}
        self._holds: list[nn.Module | None] = [None] * SLOTS
        self._tickets: list[Any] = [None] * SLOTS
        self._order = _Order()
        self._given: dict[int, int | None] = {}
        try:
            for block, weights in chosen.items():
                if weights:
                    self._packed[block] = Packed(weights, link.host)
            size = max(len(packed.memory) for packed in self._packed.values())
            self._ring = [link.slot(size) for _ in range(SLOTS)]
            for block in self._packed:
                self._handles.append(block.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True))
                self._handles.append(block.register_forward_hook(self._after))
        except BaseException:
            self.close()
            raise

    # -- when a block is needed ---------------------------------------------------------------------------------------

    def _before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._given = {id(value): _version(value) for value in _tensors((args, kwargs))}
        self._need(FORWARD, block)

    def _after(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Its part of backward, and so its recomputation, begins at its outputs' nodes: autograd runs nodes in the
        reverse of their order. What it only hands on is another block's."""
        if not torch.is_grad_enabled():
            return
        for value in _tensors(output):
            handed_on = id(value) in self._given and self._given[id(value)] == _version(value)
            if value.grad_fn is not None and not handed_on:
                value.grad_fn.register_prehook(lambda gradients: self._again(block))

    def _again(self, block: nn.Module) -> None:
        """Its nodes are about to run, if need be after `close`, when the weights are where they were."""
        if block in self._packed:
            self._need(BACKWARD, block)

    # -- the ring -----------------------------------------------------------------------------------------------------

    def _need(self, way: str, block: nn.Module) -> None:
        """What is asked of the device from here on finds the weights of ``block``; then the next one's copy begins."""
        self._order.at(way, block)
        slot = self._slot_of(block)
        if self._holds[slot] is not block:
            self._begin(block, slot)
        if self._tickets[slot] is not None:
            self._link.wait(self._tickets[slot])
            self._tickets[slot] = None
            self._packed[block].show()
        following = self._order.following(way, block)
        if following is not None:
            other = self._slot_of(following)
            if other != slot and self._holds[other] is not following:
                self._begin(following, other)

    def _slot_of(self, block: nn.Module) -> int:
        """Found at the first use: the other one than the block's before it."""
        if block not in self._slot:
            self._slot[block] = len(self._slot) % SLOTS
            self._packed[block].bind(self._ring[self._slot[block]])
        return self._slot[block]

    def _begin(self, block: nn.Module, slot: int) -> None:
        before, self._holds[slot], self._tickets[slot] = self._holds[slot], None, None
        if before is not None:
            self._packed[before].hide()
        memory = self._packed[block].memory
        self._tickets[slot] = self._link.copy(self._ring[slot][: len(memory)], memory)
        self._holds[slot] = block
        self.copies, self.bytes = self.copies + 1, self.bytes + len(memory)

    def close(self) -> None:
        """No hooks, no ring; the weights where they were."""
        while self._handles:
            self._handles.pop().remove()
        self._link.close()
        self._holds, self._tickets, self._ring = [None] * SLOTS, [None] * SLOTS, []
        while self._packed:
            self._packed.popitem()[1].unpack()


class _Order:
    """In which order blocks were needed, and so will be. A pass begins at the block that was the first of all."""

    def __init__(self) -> None:
        self._last: tuple[str, nn.Module] | None = None
        self._first: nn.Module | None = None
        self._next: dict[tuple[str, nn.Module], nn.Module] = {}

    def at(self, way: str, block: nn.Module) -> None:
        """``block`` is needed."""
        if self._last == (way, block):
            return
        self._first = self._first or block
        before, self._last = self._last, (way, block)
        if before is not None and before[0] == way and self._within(way, before[1], block):
            self._next[before] = block
            if way == FORWARD:
                self._next.setdefault((BACKWARD, block), before[1])

    def _within(self, way: str, one: nn.Module, other: nn.Module) -> bool:
        """Whether both are of one pass."""
        return (other if way == FORWARD else one) is not self._first

    def following(self, way: str, block: nn.Module) -> nn.Module | None:
        """The block after ``block`` in a pass; None at its end, or where that is not known yet."""
        return self._next.get((way, block))


def _version(value: Tensor) -> int | None:
    """Of a tensor that tells of what is written into it."""
    return None if value.is_inference() else value._version


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from _tensors(entry)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
