"""Gradient checkpointing by hooks: a block keeps its inputs, and backward computes it again under its forward's roles.

No forward is replaced: while a block runs, torch's own hooks on saved tensors (torch.autograd.graph) put an empty slot
in the place of each tensor that autograd wants to keep. Backward asks for the first of them, the block is computed
again from its inputs, and what autograd wants to keep of that fills the slots in the same order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .errors import OneStepError
from .recomputed import BLOCKS, FEED_FORWARDS, recomputed
from .roles import Roles

CHANGED = (
    "an input of a checkpointed block was changed in place after its forward, so its gradient would be wrong: "
    "set checkpointing to false for this model, and report it"
)
OTHERWISE = (
    "a checkpointed {} computed otherwise in backward than in its forward, so its gradient would be wrong: "
    "set checkpointing to false for this model, and report it"
)


@contextmanager
def checkpoint_blocks(blocks: Iterable[nn.Module], roles: Roles) -> Iterator[None]:
    """Within, each of ``blocks`` keeps its inputs alone and recomputes the rest in backward, under its own role map."""
    hooks = [_Hooks(block, roles) for block in dict.fromkeys(blocks)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Checkpoints:
    """``blocks`` under checkpoints of a ``grade`` (see core.recomputed), which may change between two passes. whole:
    whether nothing inside a block may hang on it, as where blocks are compiled: their feed-forwards are then computed
    again with all of the block."""

    def __init__(self, blocks: Iterable[nn.Module], roles: Roles, grade: str, whole: bool = False) -> None:
        self._blocks, self._roles, self._whole = list(blocks), roles, whole
        self._hooks: list[_Hooks] = []
        self.use(grade)

    def use(self, grade: str) -> None:
        """From here on. A graph of before is run backward as it was made."""
        self.remove()
        grade = BLOCKS if self._whole and grade == FEED_FORWARDS else grade
        self._hooks = [_Hooks(block, self._roles) for block in dict.fromkeys(recomputed(self._blocks, grade))]
        self.grade = grade

    def remove(self) -> None:
        """The network is as it was."""
        while self._hooks:
            self._hooks.pop().remove()


@contextmanager
def clone_inputs(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within, each of ``modules`` sees copies of its inputs: for layers whose input the host changes in place
    afterwards, which autograd would otherwise find changed."""
    handles = [module.register_forward_pre_hook(_own_inputs, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _own_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return tuple(map(_own, args)), {name: _own(value) for name, value in kwargs.items()}


def _own(value: Any) -> Any:
    """A copy of what a block may write to: tensors, and the dictionaries in which a host keeps its place."""
    if isinstance(value, Tensor):
        return value.clone() if torch.is_grad_enabled() else value
    return {name: _own_entry(entry) for name, entry in value.items()} if isinstance(value, dict) else value


def _own_entry(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


class _Hooks:
    """One block's hooks. ``_running``: what its forwards under way are to leave, None where no gradient is wanted."""

    def __init__(self, block: nn.Module, roles: Roles) -> None:
        self._roles = roles
        self._running: list[tuple[saved_tensors_hooks, _Frame] | None] = []
        before = block.register_forward_pre_hook(self._before, with_kwargs=True)
        # first of all hooks: what others add to the block's output is not the block's
        self._handles = [before, block.register_forward_hook(self._after, prepend=True, always_call=True)]

    def _before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if not torch.is_grad_enabled():
            self._running.append(None)
            return None
        frame = _Frame(block, args, kwargs, self._roles)
        hooks = saved_tensors_hooks(frame.pack, frame.unpack)
        self._running.append((hooks, frame))
        hooks.__enter__()
        return tuple(map(_given, args)), {name: _given(value) for name, value in kwargs.items()}

    def _after(self, *unused: Any) -> None:
        running = self._running.pop() if self._running else None
        if running is not None:
            hooks, frame = running
            hooks.__exit__()
            frame.done()

    def remove(self) -> None:
        """Off the block; and out of forwards that an interrupt ended, of which torch tells no hook."""
        for handle in self._handles:
            handle.remove()
        while self._running:
            self._after()


class _Slot:
    """In the place of one tensor that autograd wanted to keep, for as long as it wants it. value: the tensor, between
    its recomputation and its use."""

    __slots__ = ("__weakref__", "kind", "value")

    def __init__(self, value: Tensor) -> None:
        self.kind = _kind(value)
        self.value: Tensor | None = None


def _kind(value: Tensor) -> tuple[Any, ...]:
    return value.shape, value.dtype, value.device


class _Frame:
    """One forward of a block: its inputs and surroundings, and the slots that its recomputation fills."""

    def __init__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], roles: Roles) -> None:
        self._block, self._roles, self._role_map = block, roles, roles.active
        self._forward = block.forward  # a compiled one may be given up before backward
        self._args, self._kwargs = tuple(map(_Input, args)), {name: _Input(value) for name, value in kwargs.items()}
        devices = {value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor)}
        self._autocasts = [_autocast_now(kind) for kind in sorted({"cpu", *(device.type for device in devices)})]
        # random layers draw in training mode alone, and a base is in eval mode
        self._random = _Random(devices) if block.training else None
        self._slots: list[weakref.ref[_Slot]] = []

    def done(self) -> None:
        """Its forward is over."""
        for entry in (*self._args, *self._kwargs.values()):
            entry.settle()

    def pack(self, value: Tensor) -> _Slot:
        slot = _Slot(value)
        self._slots.append(weakref.ref(slot))
        return slot

    def unpack(self, slot: _Slot) -> Tensor:
        if slot.value is None:
            self._fill()
        value, slot.value = slot.value, None
        if value is None:
            raise OneStepError(OTHERWISE.format(type(self._block).__name__))
        return value

    def _fill(self) -> None:
        """Compute the block again, and fill every slot that is still wanted."""
        if any(entry.changed for entry in (*self._args, *self._kwargs.values())):
            raise OneStepError(CHANGED)
        found: list[tuple[Any, ...]] = []

        def collect(value: Tensor) -> Tensor:
            slot = self._slots[len(found)]() if len(found) < len(self._slots) else None
            found.append(_kind(value))
            if slot is not None and slot.kind == found[-1]:
                slot.value = value.detach()
            return value.detach()

        self._recompute(collect)
        if len(found) != len(self._slots):
            raise OneStepError(OTHERWISE.format(type(self._block).__name__))

    def _recompute(self, collect: Callable[[Tensor], Tensor]) -> None:
        """The block's forward as it was, hooks on the block itself excepted, which came before and after it."""
        with ExitStack() as stack, torch.enable_grad():
            for autocast in self._autocasts:
                stack.enter_context(autocast())
            if self._random is not None:
                stack.enter_context(self._random.again())
            stack.enter_context(self._roles.serving(self._role_map))
            stack.enter_context(saved_tensors_hooks(collect, _as_it_is))
            args = tuple(_apart(entry.value) for entry in self._args)
            args, kwargs = _own_inputs(self._block, args, {name: _apart(e.value) for name, e in self._kwargs.items()})
            self._forward(*args, **kwargs)


class _Input:
    """What a block was given, as it was then: itself where the block leaves it alone, else a copy made before.

    The block itself is always given what its caller gave, and no copy: a node more between the two would add up the
    parts of an input's gradient in another order.
    """

    __slots__ = ("_copy", "_version", "_wanted", "value")

    def __init__(self, value: Any) -> None:
        tensor = isinstance(value, Tensor)
        # what a block adds to in place may ask for a gradient only from then on
        self._wanted = tensor and value.requires_grad
        self.value = value if tensor else _own(value)
        self._copy = value.detach().clone() if tensor else None
        self._version = _version(value)

    def settle(self) -> None:
        if self._copy is not None and (self._version is None or self.changed):
            self.value = self._copy.requires_grad_(self._wanted)
            self._version = _version(self.value)
        self._copy = None

    @property
    def changed(self) -> bool:
        return _version(self.value) != self._version


def _version(value: Any) -> int | None:
    """Of what may be written in place and tells of it."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


def _given(value: Any) -> Any:
    """What a block sees: a dictionary of its own, as the caller goes on writing into his."""
    return value if isinstance(value, Tensor) else _own(value)


def _apart(value: Any) -> Any:
    """An input without its history: what is computed again is nobody's graph."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _as_it_is(value: Tensor) -> Tensor:
    return value


def _autocast_now(kind: str) -> Callable[[], AbstractContextManager[Any]]:
    """Makes the autocast that is on for devices of this kind, or its absence."""
    if not torch.amp.is_autocast_available(kind):
        return nullcontext
    on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return partial(torch.autocast, kind, dtype=dtype, enabled=on, cache_enabled=torch.is_autocast_cache_enabled())


class _Random:
    """Where torch's generators stand: the CPU's and those of CUDA devices."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = [(device, torch.cuda.get_rng_state(device)) for device in devices if device.type == "cuda"]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within, they stand there again; afterwards where they stood before."""
        with torch.random.fork_rng([device for device, _ in self._cuda]):
            torch.set_rng_state(self._cpu)
            for device, state in self._cuda:
                torch.cuda.set_rng_state(state, device)
            yield
