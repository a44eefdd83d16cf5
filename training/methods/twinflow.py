r"""TwinFlow (arXiv:2512.05150), as the authors' code has it: mean velocities, and a matching without a critic. What a
critic would say of the student's own pictures the student says itself, at negative times: the twin trajectory.

    twin:      L_adv = |F(y_t, -t) - (n - x)|^2,                x = sg(G(z)),  y_t = (1 - t) x + t n
    matching:  L_rectify = |x - sg(x + clamp(F(y_t, -t) - v(y_t, t), -1, 1))|^2,   x = G(z)

F is the velocity that the student answers with, v that of the true pictures; at t = 1, x = z - F, so that what is said
of x is said of F. `meanflow` beside them is the paper's any-step term: its target is of the same first order.
A plain LoRA has no embedder for a sign. The network is told the negative number, -t / 2 by the rule for two times that
`meanflow` has, a place where no sampler asks it and no base was trained. So what the base says there is taken off and
what it says at t put in its place, ours: the twin begins as the teacher, as a critic does,

    F(y, -t) = F_S(y, -t) - F_T(y, -t) + F_T(y, t)

v is the guided teacher's, which beside a LoRA costs no memory; the paper's, which holds no teacher, is the student's
own F_S(y_t, t), `real_flow` own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.continuous import continuous, leading
from ...core.denoiser import Denoiser, guided
from ...core.roles import TEACHER
from ...core.schedule import add_noise, expand
from ..engine.batch import Batch
from ..engine.levels import LevelSampler, UniformTime
from ..engine.setup import Setup
from ..engine.student import STUDENT, BackwardSimulation
from ..engine.turns import Loss, Phase, Plan, Turn, learning
from ..settings import Settings, need_steps, setting
from .alternating import SMALL_GRADIENTS
from .consistency import check_source, of_whole_range, pictures_of
from .meanflow import MeanFlowSettings, on_pictures
from .method import Method
from .rectified import noise_share


@dataclass(frozen=True)
class TwinFlowSettings(MeanFlowSettings):
    """meanflow's, with the twin and the matching."""

    twin_warm_up: int = setting(
        50, "Updates before the matching, in which the twin learns what the student draws.", 0, 1_000_000
    )
    twin_weight: float = setting(1.0, "Weight of what the twin learns, beside the mean velocities.", 0, 100)
    rectify_weight: float = setting(0.5, "Weight of the matching, beside the mean velocities; 0 = none.", 0, 100)
    real_flow: str = setting(
        "teacher",
        "Whose velocity is the true one in the matching: the teacher's, guided; or the student's own, as the paper has "
        "it, which has to be learnt first.",
        choices=("teacher", "own"),
    )

    def check(self, run: Settings) -> None:
        super().check(run)
        need_steps(run)


@dataclass(frozen=True)
class TwinFlow:
    """real: whose velocity is the true one. guidance: w of the teacher. levels: where both terms look, bound: of the
    difference of velocities."""

    real: str = TEACHER
    guidance: float = 1.0
    levels: LevelSampler = UniformTime()
    bound: float = 1.0

    def twin(self, denoise: Denoiser, batch: Batch, x: Tensor, matched: bool = True) -> tuple[Tensor, Tensor]:
        """(L_adv, a mean over elements and samples; clamp(F(y_t, -t) - v(y_t, t)) [B, ...], without a graph, 0 where
        nothing is matched). x: the student's pictures [B, ...].

        In x0, whatever the schedule: with v = (y - D) / t, F - (n - x) is (x - D) / t, and F - v is (D_real - D) / t.
        """
        schedule, x = denoise.schedule, x.detach()
        sigma = self.levels(schedule, batch.uniform("twin level"))
        x_t, t = add_noise(schedule, x, batch.normal("twin noise"), sigma), expand(noise_share(schedule, sigma), x)
        beyond = leading(denoise, -sigma)
        with torch.no_grad(), denoise.roles.use(TEACHER):
            start = denoise(x_t, sigma, batch.cond) - beyond(x_t, sigma, batch.cond)
        with denoise.roles.use(STUDENT):
            fake = beyond(x_t, sigma, batch.cond) + start
        apart = torch.zeros_like(x)
        if matched:
            apart = ((self._real(denoise, batch, x_t, sigma) - fake.detach()) / t).clamp(-self.bound, self.bound)
        return ((fake - x) / t).square().mean(), apart

    @torch.no_grad()
    def _real(self, denoise: Denoiser, batch: Batch, x_t: Tensor, sigma: Tensor) -> Tensor:
        """D_real [B, ...]."""
        if self.real == TEACHER:
            with denoise.roles.use(TEACHER):
                return guided(denoise, x_t, sigma, batch.cond, batch.nulls(), self.guidance)
        with denoise.roles.use(STUDENT):
            return leading(denoise, sigma)(x_t, sigma, batch.cond)


def rectify(x: Tensor, apart: Tensor) -> Tensor:
    """L_rectify, a mean over elements and samples. x: the student's pictures [B, ...], with their graph."""
    return (x - (x.detach() + apart)).square().mean()


def plan(setup: Setup) -> Plan:
    """The twin with the mean velocities, then the matching too: one role, one optimiser."""
    settings, own, denoise = setup.settings, setup.settings.own, setup.denoise
    pictures, simulate = pictures_of(setup), BackwardSimulation(denoise, setup.recipe)
    flow, more = on_pictures(setup, pictures)
    guidance = settings.guidance if denoise.guidance == "cfg" else 1.0
    terms, learn = TwinFlow(TEACHER if own.real_flow == "teacher" else STUDENT, guidance), learning(settings)

    def of(matched: bool) -> Loss:
        def loss(batch: Batch, share: float, update: int) -> Mapping[str, Any]:
            numbers = dict(flow(batch, share, update))
            with torch.no_grad():
                drawn = simulate(batch)
            value, apart = terms.twin(continuous(denoise), batch, drawn.x0, matched)
            (share * own.twin_weight * value).backward()
            numbers |= {"twin": value.detach(), "x_mean": drawn.x0.mean(), "x_std": drawn.x0.std()}
            if matched:
                # the twin's graph has gone: there is one at a time
                value = rectify(simulate.again(batch, drawn).x0, apart)
                (share * own.rectify_weight * value).backward()
                numbers["apart"] = value.detach().sqrt()
            return numbers

        return loss

    warm = Turn(STUDENT, of(False), settings.learning_rate, falls=False, half_scale=SMALL_GRADIENTS)
    turn = Turn(STUDENT, of(True), settings.learning_rate, half_scale=SMALL_GRADIENTS)
    # the flow's, and the picture's, the twin's and the teacher's two
    cost = learn + more + simulate.cost + learn + 2
    real = 1 if terms.real != TEACHER or guidance == 1 else 2
    phases = [
        Phase("twin", own.twin_warm_up, [warm], cost, *pictures.fresh),
        Phase(settings.method, settings.steps, [turn], cost + real + learn, *pictures.fresh),
    ]
    return Plan([STUDENT], phases)


METHOD = Method(
    name="twinflow",
    title="Mean velocities with a matching and no critic: the student is its own at negative times",
    paper="arXiv:2512.05150",
    forwards="16.9 + the picture",
    plan=plan,
    settings=TwinFlowSettings,
    check=of_whole_range(check_source),
)
