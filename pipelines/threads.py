"""One network in several threads: what a thread hangs in it acts in that thread's forwards alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..core.errors import OneStepError

Context = TypeVar("Context", bound=Callable[..., AbstractContextManager[Any]])
_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_MAKING = threading.Lock()


def lock_of(thing: Any) -> Any:
    """The re-entrant lock of a network, held by whoever changes it, or of a tokenizer, held by whoever uses it."""
    with _MAKING:
        return _LOCKS.setdefault(thing, threading.RLock())


def one_at_a_time(network_of: Callable[[Any], Any]) -> Callable[[Context], Context]:
    """For a context manager of a pipeline: another thread's waits until this one has left it."""

    def decorated(context: Context) -> Context:
        @wraps(context)
        @contextmanager
        def alone(pipe: Any, *args: Any, **more: Any) -> Iterator[Any]:
            with lock_of(network_of(pipe)), context(pipe, *args, **more) as found:
                yield found

        return alone  # type: ignore[return-value]

    return decorated


def is_here(thread: int) -> bool:
    """Whether this is that thread. What is compiled does not ask: see `only_here`."""
    return torch.compiler.is_compiling() or threading.get_ident() == thread


def only_here(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A network's hook for the forwards of this thread: those of all others go on as without it.

    Raises OneStepError in other threads where the network is compiled, which would carry the change unasked.
    """
    here = threading.get_ident()

    def mine(module: nn.Module, args: Any, *more: Any) -> Any:
        # more: in another thread it may lack the keyword arguments, of which a hook is said to take them a moment later
        if threading.get_ident() == here:
            return hook(module, args, *more)
        if "_orig_mod" in module._modules:
            raise OneStepError(
                "another thread steers this compiled network: wait until it has done so, or give each thread a "
                "pipeline of its own"
            )
        return None

    return mine


def processors_of(network: Any) -> dict[str, Any]:
    """`attn_processors`, which not every network of diffusers has."""
    found = ((path, module) for path, module in network.named_modules() if hasattr(module, "get_processor"))
    return {f"{path}.processor": module.get_processor() for path, module in found}


def set_processors(network: Any, processors: Mapping[str, Any]) -> None:
    """`set_attn_processor`, but at no moment does another thread find an attention without a processor, or a module
    more or less in the network's tree: one that is there, an IP-Adapter's, is covered, and comes back by its own."""
    for name, processor in processors.items():
        attention = network.get_submodule(name.removesuffix(".processor"))
        if attention._modules.get("processor") is processor:
            attention.__dict__.pop("processor", None)
        else:
            attention.__dict__["processor"] = processor
