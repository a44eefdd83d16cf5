"""torch.compile: the plain network inside what it has wrapped, hooks that act in spite of it, and blocks compiled with
their adapters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
from torch import nn

GRAPHS = 64
"""Graphs of one block: a role map has two, with and without gradients; then sizes."""


def unwrapped(module: Any) -> Any:
    """A module as it was before torch.compile; any other as it is."""
    while isinstance(module, nn.Module) and "_orig_mod" in module._modules:
        module = module._orig_mod
    return module


def uncompile(module: Any, wrapped: bool = True) -> Callable[[], None]:
    """``module`` and its parts run uncompiled until the function that is returned is called.

    Hooks that are hung within what was compiled might not run: guards need not ask for them. module: a network, or
    what torch.compile made of it; ``wrapped``: torch.compile's wrappers too, else what was compiled in place.
    """
    undo: list[tuple[Any, str, Any]] = []
    for part in list(module.modules()):
        if part.__dict__.get("_compiled_call_impl") is not None:  # by module.compile()
            undo.append((part, "_compiled_call_impl", part.__dict__["_compiled_call_impl"]))
            part._compiled_call_impl = None
        if wrapped and "_orig_mod" in part._modules and "forward" in part.__dict__:  # by torch.compile(module)
            undo.append((part, "forward", part.__dict__["forward"]))
            part.__dict__["forward"] = part._modules["_orig_mod"]

    def compile_again() -> None:
        while undo:
            part, name, value = undo.pop()
            part.__dict__[name] = value

    return compile_again


@contextmanager
def uncompiled(module: Any) -> Iterator[None]:
    """Within, ``module`` and its parts run uncompiled."""
    compile_again = uncompile(module)
    try:
        yield
    finally:
        compile_again()


@contextmanager
def compiled_blocks(blocks: Iterable[nn.Module], roles: Any, **settings: Any) -> Iterator[None]:
    """Within, the forward of each of ``blocks`` is compiled with the adapters that ``roles`` add in it: one whole graph
    for each role map, which torch guards, and none anew from one turn to the next. Hooks on a block itself, such as
    checkpointing's, stay outside of its graph.

    blocks: none inside another. settings: torch.compile's own, such as ``backend``. No two threads run compiled blocks
    at once.
    """
    known = inspect.signature(torch.compile).parameters
    settings = {"fullgraph": True, **settings}
    # each block's graphs are counted apart, where torch can
    settings |= {
        name: value for name, value in (("recompile_limit", GRAPHS), ("isolate_recompiles", True)) if name in known
    }
    lock, chosen = RLock(), list(dict.fromkeys(blocks))
    for block in chosen:
        block.forward = _under_roles(torch.compile(block.forward, **settings), roles, lock)
    try:
        yield
    finally:
        for block in chosen:
            del block.forward


def _under_roles(forward: Callable[..., Any], roles: Any, lock: Any) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with lock, roles.traced():
            return forward(*args, **kwargs)

    return run
