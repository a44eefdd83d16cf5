r"""Teacher, student, critic: one frozen base, seen with this low-rank adapter, with that one, or with none.

    W x  ->  W x + B (A x),   A [r, in], B [out, r]      (LoRA, arXiv:2106.09685, Eq. 3, alpha = r)

Adapters live beside the network, never in it: forward hooks add their product to a layer's output, so no module is
renamed, no parameter enters the module tree, and nobody's ``requires_grad`` is touched at a switch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from itertools import accumulate
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from .adapted_layer import AdaptedLayer
from .adapter_module import AdapterModules, Call, Port
from .casts import Casts
from .cond import Cond
from .errors import OneStepError
from .factors import State as State
from .factors import blended, initial, initial_b, leaf, lerp
from .hook import hook
from .per_thread import PerThread
from .role_map import TEACHER as TEACHER
from .role_map import Captured, RoleMap, Served, inputs_of
from .router import Router
from .step_roles import StepRoles
from .targets import Target


class Roles:
    """Named adapters on the same targets. The role ``"teacher"``, and any target a role has no factors for, is the
    base.

    Factors are float32 leaf tensors that require grad; the product runs in the layer's compute dtype. port: a U-Net's.
    """

    def __init__(self, targets: Sequence[Target], port: Port | None = None) -> None:
        self.targets = {target.name: target for target in targets}
        self._factors: dict[str, State] = {}
        self.modules = AdapterModules(self.targets, port)
        self._lineage: dict[str, int] = {}
        self._active, self._chosen = PerThread(RoleMap()), PerThread[RoleMap | None](None)
        self.active_here = self._active.get
        self._handles: list[Any] = []
        self.steps = StepRoles()
        self.casts = Casts(self.targets)

    # -- which role serves a call -------------------------------------------------------------------------------------

    def use(self, role: str, *, train: bool = True, **inputs: Any) -> Any:
        """Within, every call is served by ``role``. ``train=False``: its factors get no gradient, its input still
        does. inputs: what the role's adapter module is to know beyond a call's time and conditions."""
        return self._choose(RoleMap(((self._known(role), None),), train, inputs))

    def rows(self, blocks: Sequence[tuple[str, int]], *, train: bool = True) -> Any:
        """Within, one forward serves contiguous blocks of rows: ``[("teacher", 4), ("critic", 2)]`` for a batch of
        6."""
        return self._choose(RoleMap(tuple((self._known(role), rows) for role, rows in blocks), train))

    def _choose(self, chosen: RoleMap) -> AbstractContextManager[None]:
        return self._chosen.set(chosen)

    def capture(self, batch: int, time: Tensor | None = None, cond: Cond | None = None) -> Captured:
        """The role map of the call about to be made, checked against its batch. time: [B] the network's own; time and
        cond are what adapter modules are given."""
        chosen = self.steps.serving(self._chosen.get(), batch, time, cond) or RoleMap()
        sizes = chosen.sizes(batch)
        call = None if time is None or cond is None else Call(time, cond, chosen.inputs)
        role_map = replace(chosen, call=call, served=self._rows_served(chosen, sizes), batch=batch)
        here = get_ident()  # a graphics card's part of backward runs in another thread than the forward did
        now = partial(self._chosen.get, here)
        return Captured(role_map, self.serving(role_map), lambda: self.steps.serving(now(), batch, time, cond))

    def serving(self, role_map: RoleMap) -> AbstractContextManager[None]:
        """Within, in this thread, the hooks obey ``role_map``: a forward, or its recomputation during backward."""
        return self._active.set(role_map)

    def of_rows(self, rows: Sequence[int]) -> RoleMap:
        """The running call's role map for some of its rows, in their order."""
        active = self.active
        sizes = active.sizes(active.batch or len(rows))
        ends = list(accumulate(sizes))
        counts = [sum(end - size <= row < end for row in rows) for size, end in zip(sizes, ends, strict=True)]
        blocks = tuple((role, n) for (role, _), n in zip(active.blocks, counts, strict=True) if n)
        here = replace(active, blocks=((blocks[0][0], None),) if len(blocks) == 1 else blocks)
        some, call = list(rows), active.call
        if call is not None:
            inputs = inputs_of(call.inputs, some)
            call = replace(call, time=call.time[some], cond=call.cond[some], inputs=inputs, cache={})
        served = self._rows_served(here, here.sizes(len(rows)))
        return replace(here, call=call, served=served, batch=len(rows), rows=tuple(rows))

    @property
    def active(self) -> RoleMap:
        """The role map that this thread's running forward obeys."""
        return self.active_here()

    @contextmanager
    def traced(self) -> Iterator[None]:
        """Within, a compiler sees this thread's role map (core.compiled)."""
        self._active.traced = self.active_here()
        try:
            yield
        finally:
            self._active.traced = RoleMap()

    # -- the adapters -------------------------------------------------------------------------------------------------

    def add(self, role: str, rank: int, seed: int, device: torch.device | str = "cpu") -> None:
        """A new role: A ~ U(-1, 1) / sqrt(fan in), drawn from (seed, target name) alone, and B = 0.

        Roles of one seed share their A, so that a lerp of factors approximates a lerp of their products.
        """
        if rank < 1:
            raise OneStepError(f"rank must be at least 1, not {rank}: 16 to 128 is usual, 64 the default")
        self._factors[role] = {
            name: (leaf(initial(target, rank, seed), device), initial_b(target, rank, device))
            for name, target in self.targets.items()
        }
        self._lineage[role] = seed

    def load(self, role: str, state: State, device: torch.device | str = "cpu", lineage: int = -1) -> None:
        """A role from given factors, e.g. of a file; targets that it lacks stay the base's. Copies them."""
        foreign = sorted(set(state) - set(self.targets))
        if foreign:
            raise OneStepError(
                f"{len(foreign)} adapted layers are not in this model, {foreign[0]} the first: "
                "choose a LoRA of its base"
            )
        for name, (a, b) in state.items():
            self._check_shapes(name, a, b)
        self._factors[role] = {name: (leaf(a, device), leaf(b, device)) for name, (a, b) in state.items()}
        self._lineage[role] = lineage

    def add_module(self, role: str, module: Any) -> None:
        """``role`` is served by ``module`` (core.adapter_module) as well; without factors it is the base and that."""
        self.modules.add(role, module)
        if self._handles:
            self.modules.install(self)
        self._factors.setdefault(role, {})
        self._lineage.setdefault(role, 0)

    def split(self, role: str, by: Sequence[float] | Router) -> None:
        """``role`` gets factors of its own, such as it has, for each of the steps that begin at the times ``by``, or
        for each of a router's students."""
        for part in self.steps.split(role, by)[1:]:
            self.load(part, self.state(role), self._device(role), self._lineage[role])

    def drop(self, role: str) -> None:
        """Forget ``role``, its factors and its adapter module, if it is there."""
        for part in self.steps.parts(role)[1:]:
            self._factors.pop(part, None)
        self.steps.drop(role)
        self.casts.drop()
        self._factors.pop(role, None)
        self.modules.drop(role)
        self._lineage.pop(role, None)

    def state(self, role: str) -> State:
        """The factors by target name, detached, sharing memory with the live ones."""
        return {name: (a.detach(), b.detach()) for name, (a, b) in self._factors[self._known(role)].items()}

    def parameters(self, role: str) -> list[Tensor]:
        """A and B of each target, in the order of target names, whatever order the host's tree has; of each step where
        it has several; then its adapter module's."""
        factors = [factor for part in self.steps.parts(role) for factor in self._in_order(part)]
        return factors + self.modules.parameters(role)

    def _in_order(self, role: str) -> list[Tensor]:
        return [factor for name in sorted(self._factors[role]) for factor in self._factors[role][name]]

    def learns(self, role: str) -> bool:
        """Whether its factors, not those of its adapter module, may take a gradient."""
        return any(factor.requires_grad for factor in self._in_order(role))

    def names(self) -> list[str]:
        return list(self._factors)

    def copy(self, source: str, into: str, device: torch.device | str | None = None) -> None:
        """``into`` becomes a copy of ``source``, on ``device`` where it is new. Live tensors of its shapes are written
        in place, so an optimiser keeps them; factors that do not learn are shared."""
        self.modules.copy(source, into)
        if self._factors[self._known(source)] and not self.learns(source):
            self._factors[into], self._lineage[into] = dict(self._factors[source]), self._lineage[source]
        elif self._alike(into, source):
            for mine, theirs in zip(self._in_order(into), self._in_order(source), strict=True):
                mine.detach().copy_(theirs.detach())
            self._lineage[into] = self._lineage[source]
        else:
            self.load(into, self.state(source), device or self._device(source), self._lineage[source])

    @torch.no_grad()
    def lerp(self, into: str, other: str, weight: float) -> None:
        """``into`` <- (1 - weight) ``into`` + weight ``other``, of the products B A.

        Roles of one lineage and rank are blended factor by factor, in place (approximately right: they share their A's
        start). Others are blended exactly: the stacked factors' product, its rank found by SVD, in new tensors.
        """
        self.modules.lerp(into, other, weight)
        for mine, theirs in zip(self.steps.parts(into), self.steps.parts(other), strict=True):
            self._lerp(mine, theirs, weight)

    def _lerp(self, into: str, other: str, weight: float) -> None:
        if self._lineage[into] == self._lineage[other] >= 0 and self._alike(into, other):
            lerp([factor.detach() for factor in self._in_order(into)], self._in_order(other), weight)
        else:
            mine, theirs = self.state(into), self.state(other)
            products = {name: blended(mine.get(name), theirs.get(name), weight) for name in {**mine, **theirs}}
            self.load(into, products, self._device(into))

    def _alike(self, role: str, other: str) -> bool:
        """Whether two roles have factors of equal shapes on the same targets."""
        shapes = [
            {name: (a.shape, b.shape) for name, (a, b) in self._factors.get(r, {}).items()} for r in (role, other)
        ]
        return role in self._factors and shapes[0] == shapes[1]

    # -- hooks --------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """One forward hook on each host layer that carries a target, unless they are installed already."""
        if self._handles:
            return
        bound: dict[nn.Module, list[Target]] = {}
        for target in self.targets.values():
            bound.setdefault(target.module, []).append(target)
        for module, here in bound.items():
            self._handles.append(module.register_forward_hook(hook(AdaptedLayer(here), self)))
        self.modules.install(self)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within, the hooks are installed; after, only if they were before."""
        before = bool(self._handles)
        self.install()
        try:
            yield
        finally:
            if not before:
                self.remove()

    def remove(self) -> None:
        """Take the hooks off; the network is as it was."""
        self.modules.remove()
        while self._handles:
            self._handles.pop().remove()

    def _rows_served(self, chosen: RoleMap, sizes: list[int]) -> tuple[Served, ...]:
        """The blocks whose role has factors, in order."""
        ends = list(accumulate(sizes))
        alone = len(sizes) == 1
        return tuple(
            Served(self._factors[role], None if alone else slice(end - size, end))
            for (role, _), size, end in zip(chosen.blocks, sizes, ends, strict=True)
            if self._factors.get(role)
        )

    def unprepared(self, layer: AdaptedLayer, active: RoleMap, x: Tensor, output: Tensor) -> Tensor | None:
        """For `hook`: the layer's output within `serving`, which no `capture` has prepared, or None where it stays."""
        serves = any(layer.serves(self._factors.get(role, {})) for role, _ in active.blocks)
        return self.added(layer, active, x, output) if serves else None

    def added(self, layer: AdaptedLayer, active: RoleMap, x: Tensor, output: Tensor) -> Tensor:
        """For `hook`: the layer's output with each block's products."""
        if len(active.blocks) == 1:
            loras = layer.loras(self._factors.get(active.blocks[0][0], {}), None, active.train)
            return layer.added(x, output, loras) if loras else output
        loras, start = [], 0
        for (role, _), size in zip(active.blocks, active.sizes(len(x)), strict=True):
            rows, start = slice(start, start + size), start + size
            loras += layer.loras(self._factors.get(role, {}), rows, active.train) if size else []
        return layer.added(x, output, loras) if loras else output

    # -- small checks -------------------------------------------------------------------------------------------------

    def _known(self, role: str) -> str:
        if role != TEACHER and role not in self._factors:
            raise OneStepError(f"no role {role!r} here: the roles are {[TEACHER, *self._factors]}")
        return role

    def _device(self, role: str) -> torch.device:
        return next((a.device for a, _ in self._factors[role].values()), torch.device("cpu"))

    def _check_shapes(self, name: str, a: Tensor, b: Tensor) -> None:
        rank, target = len(a), self.targets[name]
        found, wanted = (tuple(a.shape), tuple(b.shape)), (target.shape_a(rank), target.shape_b(rank))
        if found != wanted:
            raise OneStepError(
                f"the LoRA's {name} has shapes {found}, this model needs {wanted}: it was made for another base"
            )
