"""What the objects share that put an adapter on a diffusers network: hooks around each forward, coming off whole."""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any, TypeVar

from torch import nn

from ..core.compiled import uncompile, unwrapped
from ..core.roles import Roles
from ..core.targets import Target, is_linear
from .adapt import called_network, network_of

Hook = Callable[..., Any]
Ours = TypeVar("Ours", bound="OnNetwork")


def network_in(pipe: Any) -> Any:
    """The network of a pipeline, or that network itself."""
    return unwrapped(pipe) if isinstance(pipe, nn.Module) else network_of(pipe)


def targets_in(network: Any) -> dict[str, Target]:
    """By name: peft's own layers stand where the base's stood; what they wrap is theirs."""
    layers = {name: layer for name, layer in network.named_modules() if is_linear(layer) and ".base_layer" not in name}
    return {name: Target(name, layer) for name, layer in layers.items()}


class OnNetwork:
    """An adapter on a network until `remove`; a context too. Subclasses say in ``_before`` what each forward is told,
    and hand the call that they make to ``_begin``."""

    _roles: Roles

    def _attach(
        self, pipe: Any, network: Any, own: Callable[[Hook], Hook] = lambda hook: hook, first: bool = False
    ) -> None:
        """Hang on ``network``, which runs uncompiled meanwhile. own: what each hook is wrapped in. first: before what
        hangs there already."""
        self._calls: dict[int, list[Any]] = {}  # of each thread
        self._compile_again = uncompile(pipe if isinstance(pipe, nn.Module) else called_network(pipe))
        before = network.register_forward_pre_hook(own(self._before), prepend=first, with_kwargs=True)
        self._handles = [before, network.register_forward_hook(own(self._after), always_call=True)]

    def remove(self) -> None:
        """Take the adapter off: the network is as it was."""
        self._roles.remove()
        self._compile_again()
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self: Ours) -> Ours:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.remove()

    def _before(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise NotImplementedError

    def _begin(self, call: Any) -> None:
        self._calls.setdefault(get_ident(), []).append(call)
        call.__enter__()

    def _after(self, network: nn.Module, args: Any, output: Any) -> None:
        calls = self._calls.get(get_ident())
        if calls:
            calls.pop().__exit__(None, None, None)
        if not calls:
            self._calls.pop(get_ident(), None)
