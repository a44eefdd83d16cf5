"""step(), not a framework: roles + objective + optimisers -> numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...core.recipe import Recipe
from ..data.pairs import Pairs
from ..host import Host
from ..methods.distribution_matching import CRITIC, DistributionMatching
from ..methods.regression import Regression
from ..settings import Settings
from ..watch.measures import score_metrics
from . import optimizer as adam
from .batch import Batch
from .direct import Direct
from .prompts import Prompts
from .student import STUDENT, generate

EMA = "ema"
Numbers = dict[str, float]
Loss = Callable[[Batch, float], Numbers]
"""(micro-batch, its share of the batch) -> numbers; runs backward itself."""


@dataclass
class Trainer:
    """One run's learning. Every update is a function of the settings, the update's index and the state below.

    objective: the method's, where it matches distributions; direct: the method's, where it asks the student at once.
    place: (update, its turns that are done); a state between two turns is as good as one between updates. numbers: what
    these turns gave. accumulation: micro-batches of a batch; doubled where memory runs out. bad: each role's steps
    dropped in a row. dropped: all of them. whole: not in the middle of a step, where a state would be neither here nor
    there.
    """

    host: Host
    settings: Settings
    recipe: Recipe
    prompts: Prompts
    pairs: Pairs
    objective: DistributionMatching | None
    direct: Direct | None = None
    place: tuple[int, int] = (0, 0)
    numbers: Numbers = field(default_factory=dict)
    accumulation: int = 1
    bad: dict[str, int] = field(default_factory=dict)
    dropped: int = 0
    notes: list[str] = field(default_factory=list)
    whole: bool = True

    def __post_init__(self) -> None:
        roles = self.host.denoiser.roles
        self.regression = Regression(self.recipe)
        self.accumulation = self.settings.accumulation
        learnt = {role: [p for p in roles.parameters(role) if p.requires_grad] for role in self.trained}
        self.optimizers = {role: adam.make(parameters, self.settings) for role, parameters in learnt.items()}

    @property
    def trained(self) -> list[str]:
        """The roles with an optimiser."""
        return [STUDENT] if self.objective is None else [STUDENT, CRITIC]

    # -- the plan of a run --------------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Updates of the run: warm start, critic alone, then the method."""
        return sum(length for _, length in self.phases)

    @property
    def critic_first(self) -> int:
        """Updates of the critic alone."""
        return self.settings.critic_warm_up if self.objective is not None and self.settings.steps else 0

    @property
    def phases(self) -> list[tuple[str, int]]:
        """(name, updates) of each phase, in order."""
        first = [("warm start", self.settings.first_steps), ("critic", self.critic_first)]
        return [*first, (self.settings.method, self.settings.steps)]

    @property
    def _turns(self) -> int:
        """Batches that an update may take: one for each turn of the critic, one for the student."""
        return self.settings.critic_updates + 1

    def phase(self, update: int) -> tuple[str, int, int]:
        """(name, index within the phase, updates of the phase) of ``update``."""
        for name, length in self.phases:
            if update < length:
                return name, update, length
            update -= length
        raise IndexError(f"update {update} is past the end of the run")

    # -- one update ---------------------------------------------------------------------------------------------------

    def step(self, update: int) -> Numbers:
        """Do ``update``, or what is left of it; its numbers, for metrics.jsonl."""
        if self.place[0] != update:
            self.place, self.numbers = (update, 0), {}
        name, index, length = self.phase(update)
        rates = self._rates(name, index, length)
        for turn, (role, loss) in list(enumerate(self._plan(name)))[self.place[1] :]:
            found = self._accumulate(role, update * self._turns + turn, loss)
            self.whole = False
            self.numbers |= found | {f"{role}_norm": self._apply(role, rates[role], found)}
            self.place = (update, turn + 1)
            self.whole = True
        return dict(self.numbers)

    @property
    def stuck(self) -> int:
        """Steps dropped in a row, of the role that has dropped most."""
        return max(self.bad.values(), default=0)

    def _plan(self, name: str) -> Sequence[tuple[str, Loss]]:
        """(role, its loss) of each turn of an update in this phase."""
        if self.direct is not None:
            return [(STUDENT, self._ask)]
        if name in ("warm start", "regression"):
            return [(STUDENT, self._regress)]
        if name == "critic":
            return [(CRITIC, self._teach_critic)]
        return [(CRITIC, self._teach_critic)] * self.settings.critic_updates + [(STUDENT, self._match)]

    def _rates(self, name: str, index: int, length: int) -> dict[str, tuple[float, float]]:
        """(step size, first moment's decay) of each role in this phase."""
        settings = self.settings
        regress = name in ("warm start", "regression") or self.direct is not None
        height = settings.warm_start_rate if name == "warm start" else settings.learning_rate
        critic = adam.rate(index, length if name != "critic" else 10**9, settings.critic_learning_rate, settings)
        return {STUDENT: (adam.rate(index, length, height, settings), 0.9 if regress else 0.0), CRITIC: (critic, 0.0)}

    def _accumulate(self, role: str, key: int, loss: Loss) -> Numbers:
        """Gradients and numbers of ``loss`` over the batch ``key``, in the micro-batches that fit into memory."""
        while True:
            try:
                return self._accumulated(role, key, loss)
            except torch.OutOfMemoryError:
                if self.accumulation >= self.settings.batch:
                    raise
            # outside of the except clause, whose traceback holds on to the tensors of the step that failed
            self._halve(role)

    def _accumulated(self, role: str, key: int, loss: Loss) -> Numbers:
        self.optimizers[role].zero_grad(set_to_none=True)
        total: Numbers = {}
        for batch in self.batches(key):
            self.host.poll()
            share = len(batch) / self.settings.batch
            for name, value in loss(batch, share).items():
                total[name] = total.get(name, 0.0) + share * value
        return total

    def _apply(self, role: str, rate: tuple[float, float], numbers: Numbers) -> float:
        """Clip and step; a step with anything that is no number is dropped and counted. The gradient's norm before
        clipping."""
        optimizer = self.optimizers[role]
        optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"] = rate[0], (rate[1], 0.99)
        parameters = [p for p in self.host.denoiser.roles.parameters(role) if p.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip or math.inf))
        if not all(map(math.isfinite, [norm, *numbers.values()])):
            self.bad[role], self.dropped = self.bad.get(role, 0) + 1, self.dropped + 1
        else:
            self.bad[role] = 0
            optimizer.step()
            if role == STUDENT:
                self._follow()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _follow(self) -> None:
        """The running mean and, where asked, the critic move towards the student (IDA: SenseFlow, arXiv:2506.00523)."""
        roles, settings = self.host.denoiser.roles, self.settings
        if settings.ema:
            # early in a run the mean is short: (1 + n) / (10 + n) after n updates
            seen = float(next(iter(self.optimizers[STUDENT].state.values()))["step"])
            roles.lerp(EMA, STUDENT, 1 - min(settings.ema, (1 + seen) / (10 + seen)))
        if settings.follow and self.objective is not None:
            roles.lerp(CRITIC, STUDENT, settings.follow)

    def _halve(self, role: str) -> None:
        """Out of memory: half the micro-batch, twice the accumulation; the batch stays what it was."""
        self.optimizers[role].zero_grad(set_to_none=True)
        self.accumulation = min(self.settings.batch, self.accumulation * 2)
        torch.cuda.empty_cache()
        self.notes.append(
            f"out of memory: micro-batches of {-(-self.settings.batch // self.accumulation)} from here on"
        )

    # -- what is learnt -----------------------------------------------------------------------------------------------

    def _regress(self, batch: Batch, share: float) -> Numbers:
        return {"regression": self._backward(self.pairs.draw, self.regression, batch, share)}

    def _ask(self, batch: Batch, share: float) -> Numbers:
        assert self.direct is not None
        return {"loss": self._backward(self.direct.draw, self.direct.loss, batch, share)}

    def _backward(self, draw: Any, loss: Callable[..., Tensor], batch: Batch, share: float) -> float:
        """``share`` of the loss's gradient, on the data that ``draw`` gives; the loss for each element."""
        batch, data = draw(batch, batch.step // self._turns)
        value = loss(self.host.denoiser, batch, data)
        (share * value).backward()
        return float(value.detach()) / math.prod(batch.shape)

    def _teach_critic(self, batch: Batch, share: float) -> Numbers:
        assert self.objective is not None
        with torch.no_grad():
            x = generate(self.host.denoiser, self.recipe, batch)
        loss = self.objective.critic_loss(self.host.denoiser, batch, x)
        (share * loss).backward()
        return {"critic": float(loss.detach())}

    def _match(self, batch: Batch, share: float) -> Numbers:
        """<x, sg(G)>.backward(): the sum over a sample's elements, the mean over samples."""
        assert self.objective is not None
        x = generate(self.host.denoiser, self.recipe, batch)
        cotangent, scores = self.objective.cotangent(self.host.denoiser, batch, x)
        x.backward(cotangent * (share / len(batch)))
        if self.settings.anchor:
            self._backward(self.pairs.draw, self.regression, batch, share * self.settings.anchor)
        return score_metrics(scores)

    # -- batches ------------------------------------------------------------------------------------------------------

    def batches(self, key: int) -> Iterator[Batch]:
        """The micro-batches of the batch ``key``."""
        size = -(-self.settings.batch // self.accumulation)
        for start in range(0, self.settings.batch, size):
            yield self.prompts.batch(key, range(start, min(start + size, self.settings.batch)))
