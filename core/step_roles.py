"""A LoRA for each step: a role that has factors of its own for each of a few-step model's steps.

The step is read off the network's own time, so that whoever draws or trains need not say which one it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from torch import Tensor

from .role_map import RoleMap

NEAR = 0.25
"""Of the network's own time: by so much a time may lie above the one that a step begins at, and be that step's."""


def part_of(role: str, step: int) -> str:
    """The role that holds what ``role`` has at a step: at the first it is itself."""
    return role if step == 0 else f"{role}@{step + 1}"


class StepRoles:
    """Which roles have parts, and which part serves which rows of a call."""

    def __init__(self) -> None:
        self._times: dict[str, tuple[float, ...]] = {}

    def split(self, role: str, times: Sequence[float]) -> list[str]:
        """``role`` has parts for the steps that begin at the network's ``times``, noisiest first; their names."""
        self._times[role] = tuple(times)
        return self.parts(role)

    def parts(self, role: str) -> list[str]:
        """The role itself, and those of its later steps."""
        return [part_of(role, step) for step in range(max(1, len(self._times.get(role, ()))))]

    def drop(self, role: str) -> None:
        self._times.pop(role, None)

    def step_of(self, role: str, time: float) -> int:
        """A step goes from where it begins down to where the next one does; above the first is the first's."""
        return sum(time <= begins + NEAR for begins in self._times[role][1:])

    def serving(self, chosen: RoleMap | None, batch: int, time: Tensor | None) -> RoleMap | None:
        """``chosen`` with each role's parts in its place, as the rows' times [B] have it."""
        if chosen is None or time is None or not any(role in self._times for role, _ in chosen.blocks):
            return chosen
        # on the meta device times have no numbers: every part takes the same room
        times = [self._noisiest(chosen)] * batch if time.is_meta else time.tolist()
        blocks: list[tuple[str, int | None]] = []
        start = 0
        for (role, _), size in zip(chosen.blocks, chosen.sizes(batch), strict=True):
            rows = times[start : start + size]
            start += size
            if role in self._times:
                runs = groupby(part_of(role, self.step_of(role, at)) for at in rows)
                blocks += [(part, len(list(run))) for part, run in runs]
            else:
                blocks.append((role, size))
        return replace(chosen, blocks=tuple(blocks if len(blocks) > 1 else [(blocks[0][0], None)]))

    def _noisiest(self, chosen: RoleMap) -> float:
        return max(self._times[role][0] for role, _ in chosen.blocks if role in self._times)
