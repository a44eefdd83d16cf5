"""A LoRA for each step, or for each kind of prompt: a role that has factors of its own for each of a few-step model's
steps, or for each of several students that share the prompts.

The step is read off the network's own time, the student off the prompt's summary (core.router), so that whoever draws
or trains need not say which one it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby

from torch import Tensor

from .cond import Cond
from .errors import OneStepError
from .role_map import RoleMap
from .router import Router

NEAR = 0.25
"""Of the network's own time: by so much a time may lie above the one that a step begins at, and be that step's."""


def part_of(role: str, step: int) -> str:
    """The role that holds what ``role`` has at a step: at the first it is itself."""
    return role if step == 0 else f"{role}@{step + 1}"


class StepRoles:
    """Which roles have parts, and which part serves which rows of a call."""

    def __init__(self) -> None:
        self._times: dict[str, tuple[float, ...]] = {}
        self._routers: dict[str, Router] = {}
        self._told: int | None = None

    def split(self, role: str, by: Sequence[float] | Router) -> list[str]:
        """``role`` has parts for the steps that begin at the network's times ``by``, noisiest first, or for the
        students of a router; their names."""
        if isinstance(by, Router):
            self._routers[role] = by
        else:
            self._times[role] = tuple(by)
        return self.parts(role)

    def router(self, role: str) -> Router | None:
        """What tells a role's parts apart that are students."""
        return self._routers.get(role)

    @contextmanager
    def told(self, student: int) -> Iterator[None]:
        """Within, every prompt is ``student``'s: whoever knows it spares the router to wait for a card."""
        before, self._told = self._told, student
        try:
            yield
        finally:
            self._told = before

    def parts(self, role: str) -> list[str]:
        """The role itself, and those of its later steps or of its other students."""
        of: Sequence[object] = self._times.get(role, ()) or range(len(self._routers.get(role, ())))
        return [part_of(role, part) for part in range(max(1, len(of)))]

    def drop(self, role: str) -> None:
        self._times.pop(role, None)
        self._routers.pop(role, None)

    def step_of(self, role: str, time: float) -> int:
        """A step goes from where it begins down to where the next one does; above the first is the first's."""
        return sum(time <= begins + NEAR for begins in self._times[role][1:])

    def serving(
        self, chosen: RoleMap | None, batch: int, time: Tensor | None, cond: Cond | None = None
    ) -> RoleMap | None:
        """``chosen`` with each role's parts in its place, as the rows' times [B] or prompts have it."""
        if chosen is None or time is None or not any(self._split(role) for role, _ in chosen.blocks):
            return chosen
        blocks: list[tuple[str, int | None]] = []
        start = 0
        for (role, _), size in zip(chosen.blocks, chosen.sizes(batch), strict=True):
            rows = slice(start, start + size)
            start += size
            if self._split(role):
                runs = groupby(part_of(role, part) for part in self._parts_at(role, time[rows], cond, rows))
                blocks += [(part, len(list(run))) for part, run in runs]
            else:
                blocks.append((role, size))
        return replace(chosen, blocks=tuple(blocks if len(blocks) > 1 else [(blocks[0][0], None)]))

    def _split(self, role: str) -> bool:
        return role in self._times or role in self._routers

    def _parts_at(self, role: str, times: Tensor, cond: Cond | None, rows: slice) -> list[int]:
        router = self._routers.get(role)
        if router is not None:
            if self._told is not None:
                return [self._told] * len(times)
            if cond is None:
                raise OneStepError(f"which of {len(router)} students serves is told by the prompt: give its condition")
            return router.of(cond[rows])
        # on the meta device times have no numbers: every part takes the same room
        return [0] * len(times) if times.is_meta else [self.step_of(role, at) for at in times.tolist()]
