"""Gradient checkpointing by forward hooks: a block is recomputed in backward, under the roles of its forward.

No forward is replaced: the hooks drive the generator on which torch's own non-reentrant checkpoint is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import _checkpoint_without_reentrant_generator

from .errors import OneStepError
from .roles import RoleMap, Roles


@contextmanager
def checkpoint_blocks(blocks: Iterable[nn.Module], roles: Roles) -> Iterator[None]:
    """Within, each of ``blocks`` keeps its inputs alone and recomputes the rest in backward, under its own role map."""
    handles = [handle for block in dict.fromkeys(blocks) for handle in _Checkpointed(roles).hang_on(block)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    if isinstance(value, torch.Tensor):
        return value.clone() if torch.is_grad_enabled() else value
    return {name: _own_entry(entry) for name, entry in value.items()} if isinstance(value, dict) else value


def _own_entry(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


class _Checkpointed:
    """One block's hooks. ``_running`` holds the generators of forwards under way; recomputation passes the hooks by."""

    def __init__(self, roles: Roles) -> None:
        self._roles = roles
        self._running: list[Any] = []
        self._recomputing = False

    def hang_on(self, block: nn.Module) -> tuple[Any, Any]:
        before = block.register_forward_pre_hook(self._before, with_kwargs=True)
        return before, block.register_forward_hook(self._after, prepend=True, always_call=True)

    def _before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        own = _own_inputs(block, args, kwargs)
        if not self._recomputing and torch.is_grad_enabled():
            kept = [_own_entry(value) for value in args], {name: _own_entry(value) for name, value in kwargs.items()}
            contexts = partial(self._contexts, _Unchanged([*kept[0], *kept[1].values()]))
            started = _checkpoint_without_reentrant_generator(
                block, True, contexts, "default", False, True, *kept[0], **kept[1]
            )
            self._running.append(started)
            next(started)
        return own

    def _after(self, block: nn.Module, args: Any, output: Any) -> None:
        if not self._recomputing and self._running:
            next(self._running.pop(), None)

    def _contexts(self, inputs: _Unchanged) -> tuple[Any, Any]:
        return nullcontext(), self._recompute(self._roles.active, inputs)

    @contextmanager
    def _recompute(self, role_map: RoleMap, inputs: _Unchanged) -> Iterator[None]:
        inputs.check()
        self._recomputing = True
        try:
            with self._roles.serving(role_map):
                yield
        finally:
            self._recomputing = False


class _Unchanged:
    """The versions of a block's kept inputs: a host that writes to one later would change what is recomputed."""

    def __init__(self, values: list[Any]) -> None:
        tensors = [value for value in values if isinstance(value, torch.Tensor) and not value.is_inference()]
        self._versions = [(tensor, tensor._version) for tensor in tensors]

    def check(self) -> None:
        if any(tensor._version != version for tensor, version in self._versions):
            raise OneStepError(
                "an input of a checkpointed block was changed in place after its forward, so its gradient would be "
                "wrong: set checkpointing to false for this model, and report it"
            )
