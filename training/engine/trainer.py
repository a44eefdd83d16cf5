"""step(), not a framework: roles + a method's plan + optimisers -> numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ...core.checkpoint import Checkpoints
from ...core.compiled import gave_up
from ...core.memory import OutOfMemory, attempt, exhausted, release
from ...core.recipe import Recipe
from ...core.recomputed import BLOCKS, heavier
from ..host import Host
from ..settings import Settings
from . import host_moments, processes
from . import optimizer as adam
from .batch import Batch
from .prompts import Prompts
from .student import STUDENT
from .turns import Numbers, Plan, Turn, read

EMA = "ema"


@dataclass
class Trainer:
    """One run's learning. Every update is a function of the settings, the update's index and the state below.

    place: (update, its turns that are done); a state between two turns is as good as one between updates. numbers: what
    these turns gave. bad: each role's steps dropped in a row. dropped: all of them. taken: the steps that each role's
    optimiser has taken. whole: not in the middle of a step, where a state would be neither here nor there.

    What follows leaves what is learnt alone, and takes less memory where that runs out. checkpoints: of the network's
    blocks. sliced: whether rows of several roles are asked one role after the other. accumulation: micro-batches of a
    batch. moments_on_host: whether they lie there between two steps.
    """

    host: Host
    settings: Settings
    recipe: Recipe
    prompts: Prompts
    plan: Plan
    place: tuple[int, int] = (0, 0)
    numbers: Numbers = field(default_factory=dict)
    checkpoints: Checkpoints | None = None
    sliced: bool = False
    accumulation: int = 1
    moments_on_host: bool = False
    bad: dict[str, int] = field(default_factory=dict)
    dropped: int = 0
    taken: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    whole: bool = True

    def __post_init__(self) -> None:
        roles = self.host.denoiser.roles
        self.accumulation = self.settings.accumulation
        learnt = {role: [p for p in roles.parameters(role) if p.requires_grad] for role in self.plan.roles}
        # a host whose weights are cast at each use says what they are cast to
        dtypes = {getattr(self.host, "computing_dtype", None), *(p.dtype for p in self.host.network.parameters())}
        self.in_half = torch.float16 in dtypes
        self.optimizers = {role: adam.make(parameters, self.settings) for role, parameters in learnt.items()}

    # -- one update ---------------------------------------------------------------------------------------------------

    def step(self, update: int) -> Numbers:
        """Do ``update``, or what is left of it; its numbers, for metrics.jsonl."""
        if self.place[0] != update:
            self.place, self.numbers = (update, 0), {}
        phase, index = self.plan.at(update)
        self.forget_moments(update)
        for number, turn in list(enumerate(phase.turns))[self.place[1] :]:
            rate = adam.rate(index, phase.updates if turn.falls else 10**9, turn.learning_rate, self.settings)
            found = self.accumulate(turn, update, number)
            self.whole = False
            self._apply(turn, rate, found)
            self.numbers |= found
            self.place = (update, number + 1)
            self.whole = True
        return dict(self.numbers)

    def forget_moments(self, update: int) -> None:
        """What no turn to come reads is freed before a graph takes the room: a warm start's first moments; and what
        lies on the host goes there."""
        for role, optimizer in self.optimizers.items():
            if not self.plan.first_moment(role, update):
                adam.forget_first_moments(optimizer)
            if self.moments_on_host:
                host_moments.send(optimizer)

    @property
    def stuck(self) -> int:
        """Steps dropped in a row, of the role that has dropped most."""
        return max(self.bad.values(), default=0)

    @property
    def remedy(self) -> str:
        """What to do where steps are no numbers."""
        half = "The base is in float16, which ends at 65504: load it in bfloat16 or float32, or lower" * self.in_half
        return f"{half or 'Lower'} learning_rate or guidance, then restart"

    def accumulate(self, turn: Turn, update: int, number: int = 0) -> Numbers:
        """Gradients and numbers of a turn's loss over its batch, the norm of all gradients among them, in the
        micro-batches that fit into memory. A card is waited for once."""
        while True:
            try:
                found, why = attempt(lambda: self._accumulated(turn, update, number))
            except Exception as error:
                if gave_up(error):
                    continue
                raise
            if found is not None:
                break
            self._lessen(turn.role, why)
        # outside of what is tried again: where memory ran out in one process, the others wait here, once
        parameters = self.host.denoiser.roles.parameters(turn.role)
        processes.sum_gradients(parameters)
        name = f"{turn.role}_norm"
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        numbers = read({**found, name: norm})
        norm_of_all = {name: numbers.pop(name)}  # every process has it
        return processes.sum_numbers(numbers) | norm_of_all

    def _accumulated(self, turn: Turn, update: int, number: int) -> dict[str, Any]:
        self.optimizers[turn.role].zero_grad(set_to_none=True)
        total: dict[str, Any] = {}
        scale = turn.half_scale if self.in_half else 1.0
        for batch in self.batches(update * self.plan.turns + number):
            self.host.poll()
            share = len(batch) / self.settings.batch
            for name, value in turn.loss(batch, scale * share, update).items():
                total[name] = total.get(name, 0.0) + share * value
        if scale != 1:
            for value in self.host.denoiser.roles.parameters(turn.role):
                if value.grad is not None:
                    value.grad.div_(scale)
        return total

    def _apply(self, turn: Turn, rate: float, numbers: Numbers) -> None:
        """Clip and step; a step with anything that is no number is dropped and counted."""
        role, optimizer = turn.role, self.optimizers[turn.role]
        optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"] = rate, (turn.beta1, 0.99)
        parameters = [p for p in self.host.denoiser.roles.parameters(role) if p.grad is not None]
        if self.settings.max_grad_norm:
            norm = torch.full((), numbers[f"{role}_norm"], device=self.host.device)
            torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.max_grad_norm, norm)
        if not all(map(math.isfinite, numbers.values())):
            self.bad[role], self.dropped = self.bad.get(role, 0) + 1, self.dropped + 1
        else:
            self.bad[role] = 0
            self._step(optimizer)
            self.taken[role] = self.taken.get(role, 0) + 1
            if role == STUDENT:
                self._average()
            turn.then()
        optimizer.zero_grad(set_to_none=True)

    def _average(self) -> None:
        """The running mean moves towards the student."""
        if self.settings.ema:
            # early in a run the mean is short: (1 + n) / (10 + n) after n updates
            seen = float(self.taken[STUDENT])
            self.host.denoiser.roles.lerp(EMA, STUDENT, 1 - min(self.settings.ema, (1 + seen) / (10 + seen)))

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimiser's step. Where memory runs out in it, some tensors may have moved and others not."""
        work = partial(host_moments.step, optimizer) if self.moments_on_host else optimizer.step
        found, why = attempt(lambda: (work(),))
        if found is None:
            raise OutOfMemory(
                f"out of memory in the optimiser's step ({why}): what was learnt is in the last state. Choose a lower "
                "rank, fewer targets or optimizer=adamw8bit, or close what else uses the card"
            )

    # -- less memory --------------------------------------------------------------------------------------------------

    @property
    def recompute(self) -> str:
        """What of the network is computed again in backward, a grade of core.recomputed."""
        return self.checkpoints.grade if self.checkpoints else BLOCKS

    @recompute.setter
    def recompute(self, grade: str) -> None:
        # streamed blocks are all computed again
        if self.checkpoints and grade != self.checkpoints.grade and not self.host.streamed:
            self.checkpoints.use(grade)

    def _lessen(self, role: str, why: str) -> None:
        """Out of memory: compute more of the network again; then rows of roles one after the other and half the
        micro-batch, with twice the accumulation; then moments to the host. The batch stays what it was."""
        self.optimizers[role].zero_grad(set_to_none=True)
        release()
        more = heavier(self.recompute)
        if more is not None:
            self.recompute = more
            did = f"{more} are computed again in backward"
        elif self.accumulation < self.settings.batch:
            self.sliced, self.accumulation = True, min(self.settings.batch, self.accumulation * 2)
            did = f"micro-batches of {-(-self.settings.batch // self.accumulation)}"
        elif not self.moments_on_host and self.host.device.type == "cuda" and host_moments.serves(self.settings):
            self.moments_on_host = True
            did = "the optimiser's moments lie in the host's memory"
        else:
            raise exhausted(f"the {role}'s step", why)
        self.notes.append(f"out of memory: {did} from here on")

    # -- batches ------------------------------------------------------------------------------------------------------

    def batches(self, key: int) -> Iterator[Batch]:
        """The micro-batches of the batch ``key``, of this process's rows."""
        size, rows = -(-self.settings.batch // self.accumulation), processes.own(self.settings.batch)
        for start in range(rows.start, rows.stop, size):
            batch = self.prompts.batch(key, range(start, min(start + size, rows.stop)))
            yield replace(batch, sliced=self.sliced)
