"""How a method says what is learnt: a run is phases, a phase is updates, an update is turns, a turn is a role and its
loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..settings import Settings
from .batch import Batch

Numbers = dict[str, float]
Loss = Callable[[Batch, float, int], Mapping[str, Any]]
"""(micro-batch, its share of the batch, update) -> numbers for the metrics, also as tensors [] that are still being
computed; runs backward itself."""
Draw = Callable[[Batch, int], tuple[Batch, Any]]
"""(batch, update) -> the samples that this update learns from, in place of the batch's (as many, of the same indices),
and their data: a function of the run's seed, the update and the indices alone."""


def read(numbers: Mapping[str, Any]) -> Numbers:
    """``numbers`` as floats: those that a card computes are waited for once."""
    tensors = {name: value.detach() for name, value in numbers.items() if isinstance(value, Tensor)}
    if not tensors:
        return dict(numbers)
    values = torch.stack(list(tensors.values())).cpu().tolist()
    return {**numbers, **dict(zip(tensors, values, strict=True))}


def nothing() -> None:
    """Follows a step that nothing follows."""


@dataclass(frozen=True)
class Turn:
    """One optimiser's step within an update.

    role: whose tensors take it. learning_rate: its height. beta1: decay of the first moment. falls: whether the step
    size falls along the phase's cosine. then: called after a step that was taken. half_scale: by what the loss is
    multiplied where the network computes in float16, and its gradient divided again, a power of 2: float16 ends at
    6e-8, and a loss that is a mean over many elements has smaller gradients in a network.
    """

    role: str
    loss: Loss
    learning_rate: float
    beta1: float = 0.9
    falls: bool = True
    then: Callable[[], None] = nothing
    half_scale: float = 1.0


@dataclass(frozen=True)
class Phase:
    """``updates`` updates of these turns, in order.

    cost: network forwards of one sample in an update, backward passes counted as forwards of their work. fresh: updates
    of the whole run, from its first, in which data is made that is used again later, at ``fresh_cost`` more. The time
    still to go is reckoned by these. rare: the share of its role's turns in which a part of them is done, by the name
    that a profile has for it, where that is not each.
    """

    name: str
    updates: int
    turns: Sequence[Turn]
    cost: float = 3.0
    fresh: int = 0
    fresh_cost: float = 0.0
    rare: Mapping[str, float] = field(default_factory=dict)

    def teaches(self, role: str) -> bool:
        """Whether one of its turns is this role's."""
        return any(turn.role == role for turn in self.turns)


@dataclass(frozen=True)
class Plan:
    """What a method makes of a run. roles: those with an optimiser; the student is the first."""

    roles: Sequence[str]
    phases: Sequence[Phase]

    @property
    def updates(self) -> int:
        """Of all phases."""
        return sum(phase.updates for phase in self.phases)

    @property
    def turns(self) -> int:
        """Batches that an update may take: the most of any phase."""
        return max(len(phase.turns) for phase in self.phases)

    def at(self, update: int) -> tuple[Phase, int]:
        """The phase of ``update``, and its index within the phase."""
        for phase in self.phases:
            if update < phase.updates:
                return phase, update
            update -= phase.updates
        raise IndexError(f"update {update} is past the end of the run")

    def first_moment(self, role: str, update: int) -> bool:
        """Whether the role's next turns, of the phase of ``update`` or of the next that has any, read what its first
        moment was."""
        phases = iter(self.phases)
        while update >= (phase := next(phases)).updates:
            update -= phase.updates
        for later in (phase, *(phase for phase in phases if phase.updates)):
            decays = [turn.beta1 for turn in later.turns if turn.role == role]
            if decays:
                return any(decays)
        return True

    def cost(self, first: int, last: int) -> float:
        """Updates ``first`` to ``last`` in forwards of one sample."""
        return sum(self.costs(first, last))

    def costs(self, first: int, last: int) -> tuple[float, float]:
        """The same: what learning takes, and what making data takes."""
        at, learning, making = 0, 0.0, 0.0
        for phase in self.phases:
            end = at + phase.updates
            learning += phase.cost * _overlap((first, last), (at, end))
            making += phase.fresh_cost * _overlap((first, min(last, phase.fresh)), (at, end))
            at = end
        return learning, making


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> int:
    return max(0, min(a[1], b[1]) - max(a[0], b[0]))


def learning(settings: Settings) -> float:
    """Forwards of work in one forward with its backward: a frozen base has no weight gradients; recomputation adds a
    forward."""
    return 3.5 if settings.checkpointing else 2.5


def on_data(draw: Draw, loss: Callable[[Batch, Any], Tensor], name: str = "loss") -> Loss:
    """The turn's loss of a method whose loss, a sum over a sample's elements and a mean over samples, is of the data
    that ``draw`` gives. Its number is the loss for each element."""

    return on_data_at(draw, lambda batch, data, update: loss(batch, data), name)


def on_data_at(draw: Draw, loss: Callable[[Batch, Any, int], Tensor], name: str = "loss") -> Loss:
    """The same of a loss that is told the update."""

    def backward(batch: Batch, share: float, update: int) -> Mapping[str, Any]:
        batch, data = draw(batch, update)
        value = loss(batch, data, update)
        (share * value).backward()
        return {name: value.detach() / math.prod(batch.shape)}

    return backward


def with_nulls(draw: Draw, rate: float, stream: str) -> Draw:
    """``draw``, whose samples have the null condition in their prompt's place at ``rate``."""

    def drawn(batch: Batch, update: int) -> tuple[Batch, Any]:
        batch, data = draw(batch, update)
        return batch.with_nulls(rate, stream), data

    return drawn


def one_phase(
    role: str, loss: Loss, settings: Settings, fresh: int = 0, fresh_cost: float = 0.0, beside: float = 0.0
) -> Plan:
    """The plan of a method that learns the same from the first update to the last. fresh, fresh_cost: of its data.
    beside: forwards of a sample besides the one that is learnt from."""
    cost = learning(settings) + beside
    turn = Turn(role, loss, settings.learning_rate)
    return Plan([role], [Phase(settings.method, settings.steps, [turn], cost, fresh, fresh_cost)])
