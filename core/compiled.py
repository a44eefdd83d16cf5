"""Networks that torch.compile has wrapped or changed: the plain network inside, and hooks that act in spite of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


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
