"""Which role serves which rows of a call: captured by the call it serves, and never read again at its backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .adapter_module import Call
from .errors import OneStepError

if TYPE_CHECKING:
    from .adapted_layer import Table
    from .factors import State

TEACHER = "teacher"
Blocks = tuple[tuple[str, int | None], ...]


class Served:
    """Rows of a call that a role's factors serve. rows: which, None for all. tables: the factors by the dtype that they
    are needed in; plain: whether plain torch adds them there. Both are filled as the call goes on."""

    __slots__ = ("factors", "plain", "rows", "tables")

    def __init__(self, factors: State, rows: slice | None) -> None:
        self.factors, self.rows = factors, rows
        self.tables: dict[torch.dtype, Table] = {}
        self.plain: dict[torch.dtype, bool] = {}


@dataclass(frozen=True)
class RoleMap:
    """Which role serves which rows of a batch, in order. A single block of ``None`` rows serves all of them.

    call: what a running call is about; inputs: what `Roles.use` was given for the adapter modules. Of a running call,
    batch: its rows, served: those that have factors; rows: where it answers some of another call's, which.
    """

    blocks: Blocks = ((TEACHER, None),)
    train: bool = True
    inputs: Mapping[str, Any] = field(default_factory=dict)
    call: Call | None = None
    served: tuple[Served, ...] | None = None
    batch: int | None = None
    rows: tuple[int, ...] = ()

    def sizes(self, batch: int) -> list[int]:
        sizes = [batch if rows is None else rows for _, rows in self.blocks]
        if sum(sizes) != batch:
            raise OneStepError(
                f"the roles' rows {sizes} do not add up to the batch of {batch}: give rows for each sample"
            )
        return sizes


def inputs_of(inputs: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """What `Roles.use` was given, for some rows of a call: tensors of n rows serve a call of k n rows over and over."""
    return {
        name: value[[row % len(value) for row in rows]] if isinstance(value, Tensor) and value.ndim else value
        for name, value in inputs.items()
    }


Chosen = Callable[[], RoleMap | None]


class Captured:
    """The role map of one call: a context for its forward, and a guard on its result."""

    def __init__(self, role_map: RoleMap, serving: AbstractContextManager[None], chosen: Chosen) -> None:
        """serving: within, the hooks obey ``role_map``. chosen: the role map that is chosen when it is called."""
        self._map, self._serving, self._chosen = role_map, serving, chosen

    def __enter__(self) -> None:
        self._serving.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self._serving.__exit__(*exc)

    def guard(self, output: Tensor) -> Tensor:
        """``output``, which refuses to run backward inside ``use`` or ``rows`` of other roles than it was built
        with."""
        if output.requires_grad:
            output.register_hook(self._check)
        return output

    def _check(self, gradient: Tensor) -> None:
        now = self._chosen()
        if now is not None and now.blocks != self._map.blocks:
            raise OneStepError(
                f"a graph built as {self._map.blocks} was run backward under {now.blocks}: "
                "run backward where the forward was made, or outside of every role"
            )
