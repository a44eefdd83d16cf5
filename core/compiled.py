"""torch.compile: the plain network inside what it has wrapped, hooks that act in spite of it, and blocks compiled with
their adapters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import RLock
from traceback import walk_tb
from typing import Any

import torch
from torch import nn

from .memory import is_out_of_memory, notice

GRAPHS = 64
"""Graphs of one block: a role map has two, with and without gradients; then sizes."""
COMPILER = ("torch._dynamo", "torch._functorch", "torch._inductor")
"""Of whose code torch's compiler is made."""
NOT_COMPILED = "blocks are not compiled, and run as they are ({}): set compile_blocks to false, or see docs/kernels.md"


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
    for each role map and shape, which torch guards, and none anew from one turn to the next. Hooks on a block itself,
    such as checkpointing's, stay outside of its graph. Where compiling fails, `core.memory.notice` says so, and all
    that is not compiled yet runs as it is. Afterwards the blocks are as they were.

    blocks: none inside another, and nothing with hooks of Python's own state inside them but ``roles``. settings:
    torch.compile's own, such as ``backend``. No two threads run compiled blocks at once.
    """
    why = lacking()
    if why:
        notice(NOT_COMPILED.format(why))
        yield
        return
    # a shape's graph is its own, whichever came before it: so a run that is continued has the graphs of one that is not
    settings = {"fullgraph": True, "dynamic": False, "recompile_limit": GRAPHS, "isolate_recompiles": True, **settings}
    compiled = _Blocks(list(dict.fromkeys(blocks)), roles, settings)
    token = _compiled.set(compiled)
    try:
        yield
    finally:
        _compiled.reset(token)
        compiled.give_back()


def lacking() -> str:
    """Why blocks cannot be compiled with this torch; "" where they can, if its back end finds its compilers."""
    if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        return f"torch {torch.__version__} counts the graphs of all blocks together; torch 2.13 does not"
    return ""


def gave_up(error: Exception) -> bool:
    """Whether ``error``, which came out of a forward and its backward, passed through torch's compiler, and blocks that
    were compiled are so no more: both can be made again."""
    blocks = _compiled.get()
    modules = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
    if blocks is None or is_out_of_memory(error) or not any(name.startswith(COMPILER) for name in modules):
        return False
    blocks.give_up(error)
    return True


class _Blocks:
    """The blocks whose forwards are compiled. A block's forward of before is in ``_before`` until it is given back."""

    def __init__(self, blocks: list[nn.Module], roles: Any, settings: dict[str, Any]) -> None:
        self._lock, self._roles, self._before = RLock(), roles, {block: vars(block).get("forward") for block in blocks}
        for block in blocks:
            block.forward = self._run(block.forward, settings)

    def give_back(self) -> None:
        while self._before:
            block, forward = self._before.popitem()
            if forward is None:
                del block.forward
            else:
                block.forward = forward

    def _run(self, plain: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., Any]:
        compiled = torch.compile(plain, **settings)

        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                with self._lock, self._roles.traced():
                    return compiled(*args, **kwargs)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                trouble = error
            # what is wrong in the block itself is wrong here too, and raised
            output = plain(*args, **kwargs)
            # a graph of before is run backward by the forward that made it: a checkpoint holds on to that
            self.give_up(trouble)
            return output

        return run

    def give_up(self, error: Exception) -> None:
        """All run as they are from here on, and whoever listens is told why."""
        _compiled.set(None)
        self.give_back()
        notice(NOT_COMPILED.format(_first_line(error)))


_compiled: ContextVar[_Blocks | None] = ContextVar("compiled", default=None)


def _first_line(error: Exception) -> str:
    error = getattr(error, "inner_exception", error)  # what a back end raised, which torch wraps
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:160] if lines else type(error).__name__
