"""LADD (arXiv:2403.12015): the student learns from the discriminator alone, which reads the frozen base's features of
noisy latents; what is real are the teacher's own pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ...core.errors import OneStepError
from ..data.pairs import Pairs
from ..engine.batch import Batch
from ..engine.levels import LogitNormalTime
from ..engine.setup import Setup
from ..engine.student import STUDENT, BackwardSimulation
from ..engine.turns import Loss, Phase, Plan, Turn, learning, on_data
from ..settings import Settings, setting
from .discriminator import HEAD, LOSSES
from .head_settings import DiscriminatorSettings, PicturesSettings
from .head_turns import HeadTurns, add_head, check_head, cost_of_term, real_pictures
from .method import Method
from .regression import Anchored, Regression


@dataclass(frozen=True)
class LaddSettings(PicturesSettings, DiscriminatorSettings):
    """The head's, where it looks, and what comes before."""

    # measured: at 1e-4 it has told nothing apart after 200 updates, and the student follows noise
    # (benchmarks/results/recipe.md)
    head_learning_rate: float = setting(1e-3, "Head's step size.", 0, 1)
    head_blocks: int = setting(
        4, "Blocks of the base that the head looks at, spread over the network; 1 = the middle one.", 1, 64
    )
    head_loss: str = setting(
        "hinge", "The discriminator's loss: the hinge (LADD), or the non-saturating one (DMD2).", choices=tuple(LOSSES)
    )
    head_cells: bool = setting(True, "Judge each cell of a block's picture by itself (LADD), or the whole.")
    head_warm_up: int = setting(50, "Updates of the head alone, before the student follows it.", 0, 1_000_000)
    warm_start: int = setting(
        300, "Updates of regression on the teacher's pairs before the discriminator; 0 = none.", 0, 1_000_000
    )
    warm_start_rate: float = setting(5e-4, "Student's step size in the warm start.", 0, 1)
    anchor: float = setting(
        0.0, "Weight of regression on the teacher's pairs beside the discriminator; 0 = none, as the paper.", 0, 100
    )
    level_mean: float = setting(
        1.0,
        "Where the head looks: mean of the noise level's logit; above 0 it looks at shapes, below at texture.",
        -5,
        5,
    )
    level_deviation: float = setting(1.0, "Deviation of the noise level's logit.", 1e-3, 10)

    def check(self, run: Settings) -> None:
        if run.steps + self.warm_start == 0:
            raise OneStepError("steps and warm_start are both 0: nothing would be trained; give steps at least 1")


@dataclass(frozen=True)
class Learning:
    """The student's turn: <x, sg(G)>.backward() with G the discriminator's alone, and the anchor beside it."""

    head: HeadTurns
    beside: Loss

    def learn(self, batch: Batch, share: float, update: int) -> Mapping[str, Any]:
        x0 = self.head.simulate(batch).x0
        cotangent, numbers = self.head.told(batch, x0)
        x0.backward(cotangent * (share / len(batch)))
        numbers = {**numbers, "x_mean": x0.detach().mean(), "x_std": x0.detach().std()}
        del x0, cotangent
        anchor = self.head.setup.settings.own.anchor
        return {**numbers, **(self.beside(batch, share * anchor, update) if anchor else {})}


def plan(setup: Setup, anchored: Anchored | None = None) -> Plan:
    """A warm start, the head alone, then head and student in turn. anchored: what stands beside the discriminator in
    the place of regression."""
    settings, own = setup.settings, setup.settings.own
    pairs = Pairs(setup.host, setup.prompts, settings, setup.folder / "pairs")
    regress = on_data(pairs.draw, partial(Regression(setup.recipe), setup.denoise), "regression")
    simulate = BackwardSimulation(setup.denoise, setup.recipe)
    discriminator = add_head(setup, LogitNormalTime(own.level_mean, own.level_deviation))
    head = HeadTurns(setup, discriminator, real_pictures(setup, pairs), simulate)
    anchor, anchor_cost = anchored(setup, pairs) if anchored else (regress, learning(settings))
    student = Turn(STUDENT, Learning(head, anchor).learn, settings.learning_rate, 0.0)
    warm = Turn(STUDENT, regress, own.warm_start_rate)
    learn, made = learning(settings), (pairs.blocks, pairs.solve_cost)
    update = own.head_updates * head.cost_of_turn + simulate.cost - 1 + learn + cost_of_term(settings)
    of_head = made if head.draws_pairs else (0, 0.0)
    ahead = own.head_warm_up if settings.steps else 0
    return Plan(
        [STUDENT, HEAD],
        [
            Phase("warm start", own.warm_start, [warm], learn, *made),
            Phase(
                "head",
                ahead,
                [replace(head.turns[0], falls=False)],
                head.cost_of_turn,
                *(made if head.draws_pairs else (0, 0.0)),
            ),
            Phase(
                settings.method,
                settings.steps,
                [*head.turns, student],
                update + (anchor_cost if own.anchor else 0.0),
                *(made if own.anchor else of_head),
            ),
        ],
    )


METHOD = Method(
    name="ladd",
    title="Latent adversarial distillation: a discriminator alone",
    paper="arXiv:2403.12015",
    forwards="4 + 3.1 a head update",
    plan=plan,
    settings=LaddSettings,
    check=check_head,
)
