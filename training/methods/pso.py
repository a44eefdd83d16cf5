r"""Pairwise sample optimisation (PSO, arXiv:2410.03190): of two pictures under one prompt, a few-step model comes to
draw rather the better one, at its own few levels.

    m = beta (e_0(x_w) - e(x_w) - (e_0(x_l) - e(x_l))),     e(x) = w(lambda_k) mean |D(x_k, c) - x|^2,
    L = -log s(min(m, cap)),                                x_k = alpha_k x + sigma_k n

x_w, x_l: the better and the worse; e_0: of the model as it was; s: the logistic function. It is the offline loss of the
paper, which is Diffusion-DPO's (arXiv:2311.12908, Eq. 14) at the levels k that a few-step model is drawn at; both
pictures have one noise. The paper's margin has no end, and runs of such losses have run away by it: here a pair that is
told apart by the cap teaches nothing more.

Pairs are a person's, or are drawn by the student as it is and ranked by a reward. The paper's own online loss compares
the steps by which such pictures came about, their ratios clipped; here both kinds of pairs have the offline one.
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
from ..engine.student import STUDENT, BackwardSimulation
from ..engine.turns import Phase, Plan, Turn, learning
from ..host import Host
from ..settings import Settings, need_steps, setting
from ..watch.reference import Reference
from .drawn_pairs import RANKED_BY, REWARD_MODEL, DrawnPairs
from .kept import FEW, Hold, as_it_began, before, by_beginning, by_pictures, held, in_few
from .method import Method
from .rewards import ranked, rewards_of


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

    picture_folders: ClassVar[tuple[str, ...]] = (BETTER, WORSE)

    pictures: str = setting(
        "",
        "The folder of your pairs: a folder better and a folder worse in it, with pictures of the same names, and the "
        "prompt of each pair in a .txt file of its name in better. Empty = pairs that the run draws, ranked by reward.",
    )
    reward: str = setting("", RANKED_BY)
    reward_model: str = setting("", REWARD_MODEL)
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

    @property
    def needs_pictures(self) -> bool:
        """Whether it learns of a folder."""
        return not self.reward

    def check(self, run: Settings) -> None:
        need_steps(run)


def recipe(host: Host, settings: Settings) -> Recipe:
    """As it is drawn before."""
    return recipe_as_drawn(host, settings, settings.own.drawn)


def check(host: Host, settings: Settings) -> None:
    """Raises OneStepError where pairs come from nowhere or from two places, and where they cannot be drawn."""
    own, how = settings.own, recipe(host, settings)
    if own.pictures and own.reward:
        raise OneStepError(
            f"pictures is {own.pictures[-100:]!r} and reward is {own.reward[:100]!r}: pairs are of the folder or "
            "of the run's own drawing. Leave one of the two empty"
        )
    if not (own.pictures or own.reward):
        raise OneStepError(
            f"{settings.method} learns from pairs of pictures, and both pictures and reward are empty: give the folder "
            f"in which {BETTER} and {WORSE} lie, or a reward by which the run ranks pictures that it draws itself"
        )
    if own.reward:
        rewards_of(settings, host.device.type == "meta")
        if not in_few(how):
            raise OneStepError(
                f"reward is {own.reward[:100]!r}, and the model is drawn in {how.steps} steps with a guidance of "
                f"{how.guidance:g}: a run draws its pairs in up to {FEW} steps without guidance. Name a few-step "
                "student in initial_lora, set drawn=few, or give a folder in pictures"
            )


def check_files(host: Host, settings: Settings) -> None:
    """Raises OneStepError for a folder that cannot be learnt from."""
    if settings.own.pictures:
        check_pairs(host, settings)


def preference(setup: Setup) -> Preference:
    own = setup.settings.own
    told = natural(setup.denoise) if own.level_weight == "auto" else own.level_weight
    return Preference(setup.recipe, own.beta, own.margin_cap, before(setup), WEIGHTS[told])


@dataclass(frozen=True)
class FromFolder:
    """A person's pairs. cost: forwards of a pair."""

    folder: PreferencePairs
    cost: float = 0.0

    def draw(self, batch: Batch) -> tuple[Batch, Tensor, Tensor, Tensor, dict[str, Any]]:
        """(the samples, the better pictures [B, C, h, w], the worse, whether they differ [B], numbers)."""
        drawn, better, worse = self.folder.draw(batch)
        return drawn, better, worse, torch.ones(len(better), dtype=torch.bool, device=better.device), {}


@dataclass(frozen=True)
class FromStudent:
    """The run's own."""

    drawn: DrawnPairs

    @property
    def cost(self) -> float:
        return self.drawn.cost

    def draw(self, batch: Batch) -> tuple[Batch, Tensor, Tensor, Tensor, dict[str, Any]]:
        pair, numbers = self.drawn(batch)
        return batch, pair.better.x0, pair.worse.x0, pair.told_apart, numbers


def pairs_of(setup: Setup) -> FromFolder | FromStudent:
    """The folder's, made ready, or the run's own."""
    if setup.settings.own.pictures:
        folder = PreferencePairs(setup)
        folder.prepare()
        return FromFolder(folder)
    # whole pictures: the last step's
    simulate = BackwardSimulation(setup.denoise, setup.recipe, only=setup.recipe.steps - 1)
    return FromStudent(DrawnPairs(simulate, ranked(setup)))


@dataclass(frozen=True)
class PairTurns:
    """The loss of the student."""

    setup: Setup
    pairs: FromFolder | FromStudent
    prefer: Preference
    hold: Hold | None

    def prefer_better(self, batch: Batch, share: float, update: int) -> Mapping[str, Any]:
        """Runs backward."""
        denoise, hold = self.setup.denoise, self.hold
        samples, better, worse, differ, numbers = self.pairs.draw(batch)
        # two that are alike: a margin of 0 whatever the student
        margins = self.prefer.margins(denoise, samples, better, worse) * differ
        value = self.prefer.loss(margins)
        # times n / beta: where m = 0 its gradient is half of that of the sums of squares of all elements
        (share * better[0].numel() / self.prefer.beta * value).backward()
        numbers |= {
            "preference": value.detach(),
            "margin": margins.detach().mean(),
            "told_apart": (margins.detach() > 0).double().mean(),
        }
        del margins, value
        return numbers if hold is None else {**numbers, **hold(denoise, batch, share)}


def plan(setup: Setup) -> Plan:
    """The pairs in each update, and what holds beside them."""
    settings, pairs = setup.settings, pairs_of(setup)
    as_it_began(setup)
    turns = PairTurns(setup, pairs, preference(setup), held(setup, settings.own.keep))
    cost = pairs.cost + 2 * learning(settings) + 2 + (turns.hold.cost(settings) if turns.hold else 0.0)
    turn = Turn(STUDENT, turns.prefer_better, settings.learning_rate)
    return Plan([STUDENT], [Phase(settings.method, settings.steps, [turn], cost)])


def by_better(setup: Setup) -> Reference:
    """The better ones of a folder; without one, what the model drew as the run began."""
    return by_pictures(setup, PreferencePairs(setup).better) if setup.settings.own.pictures else by_beginning(setup)


METHOD = Method(
    name="pso",
    title="Preferences from pairs of pictures, yours or the run's own, on a few-step model",
    paper="arXiv:2410.03190",
    forwards="7.1, and two pictures of the student, decoded, where the run draws its pairs",
    plan=plan,
    settings=PsoSettings,
    recipe=recipe,
    reference=by_better,
    check=check,
    check_files=check_files,
)
