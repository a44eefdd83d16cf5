r"""Pairwise sample optimisation (PSO, arXiv:2410.03190): of two pictures under one prompt, a few-step model comes to
draw rather the better one, at its own few levels.

    m = beta (e_0(x_w) - e(x_w) - (e_0(x_l) - e(x_l))),     e(x) = w(lambda_k) mean |D(x_k, c) - x|^2,
    L = -log s(min(m, cap)),                                x_k = alpha_k x + sigma_k n

x_w, x_l: the better and the worse; e_0: of the model as it was; s: the logistic function. It is the offline loss of the
paper, which is Diffusion-DPO's (arXiv:2311.12908, Eq. 14) at the levels k that a few-step model is drawn at; both
pictures have one noise. The paper's margin has no end, and runs of such losses have run away by it: here a pair that is
told apart by the cap teaches nothing more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...core.denoiser import Denoiser
from ...core.errors import OneStepError
from ...core.recipe import Recipe
from ...core.roles import TEACHER
from ...core.sampling import levels_of
from ...core.schedule import add_noise, cast_as
from ..data.preference_pairs import BETTER, WORSE, PreferencePairs, check_pairs
from ..engine.as_drawn import recipe_as_drawn
from ..engine.batch import Batch
from ..engine.levels import WEIGHTS, LevelWeight, at, natural, v_weight
from ..engine.setup import Setup
from ..engine.student import STUDENT
from ..engine.turns import Phase, Plan, Turn, learning
from ..host import Host
from ..settings import Settings, need_steps, setting
from ..watch.reference import Reference
from .kept import as_it_began, before, by_pictures, held
from .method import Method


@dataclass(frozen=True)
class Preference:
    """recipe: whose levels are looked at. before: the role of the model as it was. beta, cap: of the margin. weight: of
    the squared error in x0."""

    recipe: Recipe
    beta: float
    cap: float
    before: str = TEACHER
    weight: LevelWeight = v_weight

    def margins(self, denoise: Denoiser, batch: Batch, better: Tensor, worse: Tensor) -> Tensor:
        """m [B], with the student's graph. better, worse: [B, C, h, w]."""
        levels = levels_of(denoise.schedule, self.recipe, len(batch))
        sigma, noise = levels[batch.choice(len(levels), "pair's level")], batch.normal("pair's noise")

        def error(role: str, x: Tensor) -> Tensor:
            x_k = add_noise(denoise.schedule, x, noise, sigma)
            with denoise.roles.use(role):
                left = (denoise(x_k, sigma, batch.cond) - x).square().flatten(1).mean(1)
            return cast_as(at(self.weight, denoise.schedule, sigma), left) * left

        with torch.no_grad():
            was = error(self.before, better) - error(self.before, worse)
        # m = beta (e_0(x_w) - e_0(x_l) - (e(x_w) - e(x_l)))
        return self.beta * (was - (error(STUDENT, better) - error(STUDENT, worse)))

    def loss(self, margins: Tensor) -> Tensor:
        """-log s(min(m, cap)), a mean over samples."""
        return -logsigmoid(margins.clamp_max(self.cap)).mean()


@dataclass(frozen=True)
class PsoSettings:
    """Its pairs, and how far they are told apart."""

    needs_pictures: ClassVar[bool] = True
    picture_folders: ClassVar[tuple[str, ...]] = (BETTER, WORSE)

    pictures: str = setting(
        "",
        "The folder of your pairs: a folder better and a folder worse in it, with pictures of the same names, and the "
        "prompt of each pair in a .txt file of its name in better.",
    )
    caption: str = setting("", "The prompt of pairs without a .txt file; empty = each needs one.")
    beta: float = setting(
        10.0,
        "How soon a pair counts as told apart: the margin of its squared errors times this; larger stays nearer to the "
        "model as it was. Hundreds have been seen to unmake a sampler.",
        0.01,
        10_000,
    )
    margin_cap: float = setting(
        3.0, "The margin from which on a pair teaches nothing more: at 3 it is told apart with 95%.", 0.1, 100
    )
    keep: float = setting(
        0.0,
        "Weight that holds the model, where it is drawn on the run's prompts, to what it was; 0 = none.",
        0,
        1000,
    )
    drawn: str = setting(
        "auto",
        "How the model is drawn: auto = as its initial LoRA or its own name says; few = in student_steps; many = in "
        "teacher_steps with guidance, as a base that is not distilled; or a preset's name.",
    )
    level_weight: str = setting(
        "v",
        "How errors weigh over the model's levels: v counts each of them, the noisiest too; auto = as an error of what "
        "the network predicts, the authors' own.",
        choices=("auto", *WEIGHTS),
    )

    def check(self, run: Settings) -> None:
        need_steps(run)


def recipe(host: Host, settings: Settings) -> Recipe:
    """As it is drawn before."""
    return recipe_as_drawn(host, settings, settings.own.drawn)


def check(host: Host, settings: Settings) -> None:
    """Raises OneStepError where no pairs are named."""
    if not settings.own.pictures:
        raise OneStepError(
            f"{settings.method} learns from pairs of pictures, and pictures is empty: give the folder in which "
            f"{BETTER} and {WORSE} lie"
        )
    recipe(host, settings)


def preference(setup: Setup) -> Preference:
    own = setup.settings.own
    told = natural(setup.denoise) if own.level_weight == "auto" else own.level_weight
    return Preference(setup.recipe, own.beta, own.margin_cap, before(setup), WEIGHTS[told])


def plan(setup: Setup) -> Plan:
    """The pairs in each update, and what holds beside them."""
    pairs, settings, denoise = PreferencePairs(setup), setup.settings, setup.denoise
    pairs.prepare()
    as_it_began(setup)
    prefer, hold = preference(setup), held(setup, settings.own.keep)

    def loss(batch: Batch, share: float, update: int) -> Mapping[str, Any]:
        drawn, better, worse = pairs.draw(batch)
        margins = prefer.margins(denoise, drawn, better, worse)
        value = prefer.loss(margins)
        # times n / beta: where m = 0 its gradient is half of that of the sums of squares of all elements
        (share * better[0].numel() / prefer.beta * value).backward()
        numbers = {
            "preference": value.detach(),
            "margin": margins.detach().mean(),
            "told_apart": (margins.detach() > 0).double().mean(),
        }
        del margins, value
        return numbers if hold is None else {**numbers, **hold(denoise, batch, share)}

    cost = 2 * learning(settings) + 2 + (hold.cost(settings) if hold else 0.0)
    turn = Turn(STUDENT, loss, settings.learning_rate)
    return Plan([STUDENT], [Phase(settings.method, settings.steps, [turn], cost)])


def by_better(setup: Setup) -> Reference:
    return by_pictures(setup, PreferencePairs(setup).better)


METHOD = Method(
    name="pso",
    title="Preferences from your pairs of pictures, on a few-step model",
    paper="arXiv:2410.03190",
    forwards="7.1",
    plan=plan,
    settings=PsoSettings,
    recipe=recipe,
    reference=by_better,
    check=check,
    check_files=check_pairs,
)
