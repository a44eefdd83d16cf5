r"""MMD finetuning (MMD-DDM, arXiv:2301.07969): the student's pictures come to have the features of the teacher's, by
the maximum mean discrepancy.

    MMD^2 = E k(a, a') + E k(b, b') - 2 E k(a, b),   k(a, b) = (a . b + 1)^3,   a = phi(G(z)), b = phi(x)

The paper's estimate is of a large batch; one of four pictures has none. So the means run over the last
features of either side, kept from update to update, and what a picture of the student learns from is

    L = 2 mean_j k(a, a_j) - 2 mean_j k(a, b_j),

whose gradient is MMD^2's as long as the kept a_j are as the student draws. It does not matter how a batch is cut.
The paper's phi is Inception or CLIP on pictures without prompts, and it goes back through every step. Here phi is the
frozen base itself, asked with the prompt at a low noise level: channels of its blocks in the mean over a picture, and
the prompt's own summary beside them, so that a picture fits its prompt; in units of what the teacher's vary by. One of
the student's steps learns at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...core.denoiser import Denoiser
from ...core.errors import OneStepError
from ...core.features import Features
from ...core.roles import TEACHER
from ...core.schedule import add_noise
from ..data.pairs import Pairs
from ..engine import processes
from ..engine.batch import Batch
from ..engine.setup import Setup
from ..engine.student import STUDENT, BackwardSimulation
from ..engine.turns import Loss, Phase, Plan, Turn, learning, on_data
from ..settings import Settings, setting
from .head_turns import channels_of, check_head, cost_of_term, features_of
from .method import Method
from .regression import Regression

BANKS = "features"
"""The role whose module the kept features are: nothing of it learns."""
LEAST = 16
"""Features of either side that there must be, before the student follows them."""
SPREAD = 0.1
"""Of the mean deviation of all channels, what is added to each one's: channels that hardly vary tell little."""
Phi = Callable[[Denoiser, Batch, Tensor, str], Tensor]
"""(denoise, batch, pictures [B, ...], a name for its noise) -> features [B, D], float32."""


@dataclass(frozen=True)
class MmdSettings:
    """What it looks at, what it keeps, and what comes before."""

    head_blocks: int = setting(
        4, "Blocks of the base whose channels are the features, spread over the network; 1 = the middle one.", 1, 64
    )
    feature_level: float = setting(
        0.1, "Noise level at which the base is asked for features, as a share of the model's time.", 0.0, 1.0
    )
    memory: int = setting(256, "Pictures of either side whose features are kept to compare with.", 32, 65536)
    warm_start: int = setting(
        300, "Updates of regression on the teacher's pairs before the discrepancy; 0 = none.", 0, 1_000_000
    )
    warm_start_rate: float = setting(5e-4, "Student's step size in the warm start.", 0, 1)
    anchor: float = setting(
        0.25,
        "Weight of regression on the teacher's pairs beside the discrepancy, for composition; 0 = none, as the paper.",
        0,
        100,
    )

    def check(self, run: Settings) -> None:
        if run.steps + self.warm_start == 0:
            raise OneStepError("steps and warm_start are both 0: nothing would be trained; give steps at least 1")


class Banks(nn.Module):
    """The last features of either side, [memory, D] each, the newest last. filled: how many are there. groups: how
    many of D are of one kind each, which count alike. batch: the run's."""

    sizes: Tensor

    def __init__(self, memory: int, groups: Sequence[int], batch: int) -> None:
        super().__init__()
        self.before, self.after = frozenset[str](), frozenset[str]()  # of the network's layers it changes none
        self.student, self.teacher, self.filled = (
            nn.Parameter(value, requires_grad=False)
            for value in (*(torch.zeros(memory, sum(groups)) for _ in range(2)), torch.zeros(1))
        )
        # a . b is a mean over each group's channels
        sizes = [float(size) for size in groups for _ in range(size)]
        self.register_buffer("sizes", torch.tensor(sizes), persistent=False)
        self.batch = batch
        self._noted: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def note(self, batch: Batch, student: Tensor, teacher: Tensor) -> None:
        """Features [B, D] of one micro-batch. What is done again, as memory has run out, is noted once."""
        for key in [key for key in self._noted if key[0] != batch.step]:
            del self._noted[key]
        rows = zip(batch.samples, student.detach(), teacher.detach(), strict=True)
        self._noted |= {(batch.step, row): (a, b) for row, a, b in rows}

    @torch.no_grad()
    def settle(self) -> None:
        """What was noted takes the place of the oldest, in all processes alike."""
        new = self.student.new_zeros(self.batch, 2, self.student.shape[1])
        for (_, row), sides in self._noted.items():
            new[row] = torch.stack(sides)
        self._noted.clear()
        new = processes.sum_tensor(new)[-len(self.student) :]
        for bank, rows in zip((self.student, self.teacher), new.unbind(1), strict=True):
            bank.copy_(torch.cat([bank[len(rows) :], rows.to(bank)]))
        self.filled.copy_((self.filled + len(new)).clamp_max(len(self.student)))

    def loss(self, a: Tensor) -> Tensor:
        """L [B] of the student's features ``a`` [B, D]; 0 where too few are kept."""
        there = (torch.arange(len(self.student), device=a.device) >= len(self.student) - self.filled).to(a)
        count = self.filled.clamp_min(1)
        mean = (there[:, None] * self.teacher).sum(0) / count
        spread = ((there[:, None] * (self.teacher - mean).square()).sum(0) / count).sqrt()
        unit = (spread + SPREAD * spread.mean()).clamp_min(1e-6) * self.sizes.sqrt()
        a, ours, theirs = ((value - mean) / unit for value in (a, self.student, self.teacher))
        witness = 2 * (kernel(a, ours) - kernel(a, theirs)) @ there / count
        return witness * (self.filled >= min(LEAST, len(self.student)))


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """(a . b + 1)^3 [B, M] of a [B, D] and b [M, D]."""
    return (a @ b.T + 1) ** 3


@dataclass(frozen=True)
class BaseFeatures:
    """phi: the frozen base's channels at ``level`` of its time, and the prompt's mean."""

    features: Features
    level: float

    def __call__(self, denoise: Denoiser, batch: Batch, x: Tensor, stream: str) -> Tensor:
        sigma = denoise.schedule.sigma_at(torch.full((len(x),), self.level, dtype=torch.float64))
        x_s = add_noise(denoise.schedule, x, batch.normal(f"{stream} features"), sigma)
        with denoise.roles.use(TEACHER), self.features.kept(x_s) as found:
            denoise(x_s, sigma, batch.cond)
        means = [value.float().flatten(2).mean(2) for value in found]
        return torch.cat([*means, batch.cond.summary.to(means[0])], 1)

    def groups(self, setup: Setup) -> list[int]:
        """How many features there are, of pictures and of prompts."""
        batch = setup.prompts.batch(0, [0])
        prompt = batch.cond.summary.shape[1]
        return [sum(channels_of(setup, self.features)), prompt]


@dataclass(frozen=True)
class Discrepancy:
    """The student's turn: <x, sg(dL/dx)>.backward(), L in units of a sum over a sample's elements, and the anchor
    beside it."""

    setup: Setup
    pairs: Pairs
    simulate: BackwardSimulation
    phi: Phi
    banks: Banks
    beside: Loss

    def learn(self, batch: Batch, share: float, update: int) -> Mapping[str, Any]:
        """The teacher's pictures are of the same prompts."""
        drawn, (_, real) = self.pairs.draw(batch, update)
        here = replace(drawn, sliced=batch.sliced)
        with torch.no_grad():
            theirs = self.phi(self.setup.denoise, here, real, "teacher's")
        x0 = self.simulate(here).x0
        cotangent, ours, loss = pull(self.setup.denoise, here, self.phi, self.banks, x0)
        self.banks.note(batch, ours, theirs)
        x0.backward(cotangent * (share / len(batch)))
        numbers = {"mmd": loss.mean(), "x_mean": x0.detach().mean(), "x_std": x0.detach().std()}
        del x0, cotangent
        anchor = self.setup.settings.own.anchor
        return {**numbers, **(self.beside(batch, share * anchor, update) if anchor else {})}


def pull(denoise: Denoiser, batch: Batch, phi: Phi, banks: Banks, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(d dL/dx [B, ...], d the elements of a sample; the features of x [B, D]; L [B]), without a graph."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        a = phi(denoise, batch, x, "student's")
        loss = banks.loss(a)
        # times d before the network's backward: float16 ends at 6e-8
        (found,) = torch.autograd.grad(x[0].numel() * loss.sum(), x)
    return found, a.detach(), loss.detach()


def plan(setup: Setup) -> Plan:
    """A warm start, then the discrepancy."""
    settings, own = setup.settings, setup.settings.own
    pairs = Pairs(setup.host, setup.prompts, settings, setup.folder / "pairs")
    regress = on_data(pairs.draw, partial(Regression(setup.recipe), setup.denoise), "regression")
    simulate = BackwardSimulation(setup.denoise, setup.recipe)
    phi = BaseFeatures(features_of(setup.host, settings), own.feature_level)
    banks = Banks(own.memory, phi.groups(setup), settings.batch).to(setup.host.device)
    setup.denoise.roles.add_module(BANKS, banks)
    learn, made = learning(settings), (pairs.blocks, pairs.solve_cost)
    learner = Discrepancy(setup, pairs, simulate, phi, banks, regress)
    turn = Turn(STUDENT, learner.learn, settings.learning_rate, 0.0, then=banks.settle)
    cost = simulate.cost - 1 + learn + cost_of_term(settings) + 1 + (learn if own.anchor else 0.0)
    warm = Turn(STUDENT, regress, own.warm_start_rate)
    phases = [
        Phase("warm start", own.warm_start, [warm], learn, *made),
        Phase(settings.method, settings.steps, [turn], cost, *made),
    ]
    return Plan([STUDENT], phases)


METHOD = Method(
    name="mmd",
    title="The teacher's features by maximum mean discrepancy, without a critic",
    paper="arXiv:2301.07969",
    forwards="7.6",
    plan=plan,
    settings=MmdSettings,
    check=check_head,
)
