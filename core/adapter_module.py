"""Adapter modules: small trained networks beside the base, which add to what some of its layers give or take.

An adapter module belongs to a role, as low-rank factors do: it serves the calls of that role, it never enters the
network's module tree, and it knows layers by their canonical target names, so that one file fits both hosts.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .cond import Cond
from .errors import OneStepError
from .factors import lerp
from .targets import Target


@dataclass
class Call:
    """What one call of the denoiser is about, for the adapter modules that serve it.

    time: [B] the network's own. cond: its conditions. inputs: what `Roles.use` was given beyond them.
    cache: what an adapter notes at one layer for another of the same call; written anew where a block is recomputed.
    """

    time: Tensor
    cond: Cond
    inputs: Mapping[str, Any] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict)


class AdapterModule(Protocol):
    """An nn.Module whose parameters are its role's. before, after: target names at which it changes what a layer takes
    or gives. Both return the tensor unchanged where they only look."""

    before: frozenset[str]
    after: frozenset[str]

    def on_input(self, name: str, x: Tensor, call: Call) -> Tensor:
        """What the layer ``name`` takes instead of ``x``."""
        ...

    def on_output(self, name: str, x: Tensor, output: Tensor, call: Call) -> Tensor:
        """What the layer ``name`` gives instead of ``output``, ``x`` being what it took."""
        ...


PORT = "the network"
"""The name of the port's hook, beside the layers'."""


@dataclass(frozen=True)
class Port:
    """Where adapter modules act beside the layers that carry LoRAs.

    network: the host's. carry: (a U-Net's forward's keyword arguments, what is added to its skips in the order in which
    it makes them, and last to its middle) -> the keyword arguments with them; None for other networks. entry: a layer
    besides, by which a picture enters; None where that is among those that carry LoRAs.
    """

    network: nn.Module
    carry: Callable[[dict[str, Any], list[Tensor]], dict[str, Any]] | None = None
    entry: Target | None = None


class AdapterModules:
    """The adapter modules of the roles, by role, and the hooks by which they act. One may have `residuals(x, call)`,
    what it adds to a U-Net that takes x, or None: it needs a port."""

    def __init__(self, targets: dict[str, Target], port: Port | None = None) -> None:
        beside = {} if port is None or port.entry is None else {port.entry.name: port.entry}
        self.places, self._port = ChainMap(targets, beside), port
        self._of: dict[str, Any] = {}
        self._handles: dict[str, list[Any]] = {}

    def __contains__(self, role: str) -> bool:
        return role in self._of

    def __getitem__(self, role: str) -> Any:
        return self._of[role]

    def add(self, role: str, adapter: Any) -> None:
        """Raises OneStepError for a layer that this network lacks, or that the host fuses with others."""
        for name in sorted(adapter.before | adapter.after):
            target = self.places.get(name)
            if target is None or target.rows is not None or target.permutation is not None:
                what = "is not in this model" if target is None else "is fused with others here"
                raise OneStepError(f"the adapter needs the layer {name[:100]}, which {what}: choose one of its base")
        if hasattr(adapter, "residuals") and (self._port is None or self._port.carry is None):
            raise OneStepError(
                "the adapter adds to the skips of a U-Net, which this model has not: choose another form"
            )
        self._of[role] = adapter

    def drop(self, role: str) -> None:
        self._of.pop(role, None)

    @torch.no_grad()
    def copy(self, source: str, into: str) -> None:
        """Live parameters are written in place, so an optimiser keeps them."""
        if source not in self._of:
            self.drop(into)
        elif into in self._of:
            self._of[into].load_state_dict(self._of[source].state_dict())
        else:
            self._of[into] = deepcopy(self._of[source])

    @torch.no_grad()
    def lerp(self, into: str, other: str, weight: float) -> None:
        """``into`` <- (1 - weight) ``into`` + weight ``other``, parameter by parameter, in place."""
        lerp(self.parameters(into), self.parameters(other), weight)

    def parameters(self, role: str) -> list[Tensor]:
        """In the order of their names."""
        return [value for _, value in sorted(self._named(role))]

    def state(self, role: str) -> dict[str, Tensor]:
        """Parameters by name, detached, sharing memory with the live ones."""
        return {name: value.detach() for name, value in self._named(role)}

    def _named(self, role: str) -> list[tuple[str, nn.Parameter]]:
        return list(self._of[role].named_parameters()) if role in self._of else []

    def install(self, roles: Any) -> None:
        """Install hooks on the layers that adapters need and that have none yet; they obey ``roles.active``."""
        wanted = {name for adapter in self._of.values() for name in adapter.before | adapter.after}
        for name in sorted(wanted - set(self._handles)):
            self._handles[name] = self._hooks(name, self.places[name].module, roles)
        if PORT not in self._handles and any(hasattr(adapter, "residuals") for adapter in self._of.values()):
            self._handles[PORT] = [self._port_hook(roles)]

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in [handle for handles in self._handles.values() for handle in handles]:
            handle.remove()
        self._handles.clear()

    def _hooks(self, name: str, module: nn.Module, roles: Any) -> list[Any]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            adapter, call = self._serving(roles.active)
            if adapter is None or name not in adapter.before:
                return None
            return (adapter.on_input(name, args[0], call), *args[1:])

        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            adapter, call = self._serving(roles.active)
            return (
                None if adapter is None or name not in adapter.after else adapter.on_output(name, args[0], output, call)
            )

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def _port_hook(self, roles: Any) -> Any:
        assert self._port is not None and self._port.carry is not None
        carry = self._port.carry

        def add(module: nn.Module, args: tuple[Any, ...], more: dict[str, Any]) -> tuple[Any, Any] | None:
            adapter, call = self._serving(roles.active)
            found = (
                adapter.residuals(args[0] if args else more["sample"], call) if hasattr(adapter, "residuals") else None
            )
            return None if found is None else (args, carry(more, found))

        return self._port.network.register_forward_pre_hook(add, with_kwargs=True)

    def _serving(self, active: Any) -> tuple[Any, Any]:
        """The adapter of the running call, where it has one."""
        with_adapter = [role for role, _ in active.blocks if role in self._of] if self._of else []
        if not with_adapter:
            return None, None
        if len(active.blocks) > 1:
            raise OneStepError("a role with an adapter module serves whole batches: give it a forward of its own")
        if not active.train and torch.is_grad_enabled():
            raise OneStepError("an adapter module's parameters always learn: call it under no_grad to keep them still")
        return self._of[with_adapter[0]], active.call
