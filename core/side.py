"""Sides: small trained networks beside the base, which add to what some of its layers give or take.

A side belongs to a role, as low-rank factors do: it serves the calls of that role, it never enters the module tree, and
it knows layers by their canonical target names, so that one side fits both hosts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .cond import Cond
from .errors import OneStepError
from .targets import Target


@dataclass
class Call:
    """What one call of the denoiser is about, for the sides that serve it.

    time: [B] the network's own. cond: its conditions. told: what `Roles.use` was given beyond them.
    kept: what a side notes at one layer for another of the same call; written anew where a block is recomputed.
    """

    time: Tensor
    cond: Cond
    told: Mapping[str, Any] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)


class Side(Protocol):
    """An nn.Module whose parameters are its role's. before, after: target names at which it changes what a layer takes
    or gives. Both return the tensor unchanged where they only look."""

    before: frozenset[str]
    after: frozenset[str]

    def take(self, name: str, x: Tensor, call: Call) -> Tensor:
        """What the layer ``name`` takes instead of ``x``."""
        ...

    def give(self, name: str, x: Tensor, output: Tensor, call: Call) -> Tensor:
        """What the layer ``name`` gives instead of ``output``, ``x`` being what it took."""
        ...


PORT = "the network"
"""The name of the port's hook, beside the layers'."""


@dataclass(frozen=True)
class Port:
    """Where a host's U-Net takes what is added to its skips and its middle.

    network: its module. carry: (the forward's keyword arguments, residuals in the order in which the U-Net makes its
    skips, the middle's last) -> the keyword arguments with them.
    """

    network: nn.Module
    carry: Callable[[dict[str, Any], list[Tensor]], dict[str, Any]]


class Sides:
    """The sides of the roles, by role, and the hooks by which they act. A side may have `residuals(x, call)`, what it
    adds to a U-Net that takes x, or None: it needs a port."""

    def __init__(self, targets: Mapping[str, Target], port: Port | None = None) -> None:
        self._targets, self._port = targets, port
        self._of: dict[str, Any] = {}
        self._handles: dict[str, list[Any]] = {}

    def __contains__(self, role: str) -> bool:
        return role in self._of

    def __getitem__(self, role: str) -> Any:
        return self._of[role]

    def add(self, role: str, side: Any) -> None:
        """Raises OneStepError for a layer that this network lacks, or that the host fuses with others."""
        for name in sorted(side.before | side.after):
            target = self._targets.get(name)
            if target is None or target.rows is not None or target.permutation is not None:
                what = "is not in this model" if target is None else "is fused with others here"
                raise OneStepError(f"the adapter needs the layer {name[:100]}, which {what}: choose one of its base")
        if hasattr(side, "residuals") and self._port is None:
            raise OneStepError(
                "the adapter adds to the skips of a U-Net, which this model has not: choose another form"
            )
        self._of[role] = side

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
        for mine, theirs in zip(self.parameters(into), self.parameters(other), strict=True):
            mine.lerp_(theirs.to(mine), weight)

    def parameters(self, role: str) -> list[Tensor]:
        """In the order of their names."""
        return [value for _, value in sorted(self._named(role))]

    def state(self, role: str) -> dict[str, Tensor]:
        """Parameters by name, detached, sharing memory with the live ones."""
        return {name: value.detach() for name, value in self._named(role)}

    def _named(self, role: str) -> list[tuple[str, nn.Parameter]]:
        return list(self._of[role].named_parameters()) if role in self._of else []

    def hang(self, roles: Any) -> None:
        """Hang hooks on the layers that sides need and that have none yet; they obey ``roles.active``."""
        wanted = {name for side in self._of.values() for name in side.before | side.after}
        for name in sorted(wanted - set(self._handles)):
            self._handles[name] = self._hung(name, self._targets[name].module, roles)
        if PORT not in self._handles and any(hasattr(side, "residuals") for side in self._of.values()):
            self._handles[PORT] = [self._hung_at_port(roles)]

    def unhang(self) -> None:
        """Take all hooks off."""
        for handle in [handle for handles in self._handles.values() for handle in handles]:
            handle.remove()
        self._handles.clear()

    def _hung(self, name: str, module: nn.Module, roles: Any) -> list[Any]:
        def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            side, call = self._serving(roles.active)
            if side is None or name not in side.before:
                return None
            return (side.take(name, args[0], call), *args[1:])

        def give(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            side, call = self._serving(roles.active)
            return None if side is None or name not in side.after else side.give(name, args[0], output, call)

        return [module.register_forward_pre_hook(take), module.register_forward_hook(give)]

    def _hung_at_port(self, roles: Any) -> Any:
        assert self._port is not None
        carry = self._port.carry

        def bring(module: nn.Module, args: tuple[Any, ...], more: dict[str, Any]) -> tuple[Any, Any] | None:
            side, call = self._serving(roles.active)
            found = side.residuals(args[0] if args else more["sample"], call) if hasattr(side, "residuals") else None
            return None if found is None else (args, carry(more, found))

        return self._port.network.register_forward_pre_hook(bring, with_kwargs=True)

    def _serving(self, active: Any) -> tuple[Any, Any]:
        """The side of the running call, where it has one."""
        with_side = [role for role, _ in active.blocks if role in self._of] if self._of else []
        if not with_side:
            return None, None
        if len(active.blocks) > 1:
            raise OneStepError("a role with a side adapter serves whole batches: give it a forward of its own")
        if not active.train and torch.is_grad_enabled():
            raise OneStepError("a side adapter's parameters always learn: call it under no_grad to keep them still")
        return self._of[with_side[0]], active.call
