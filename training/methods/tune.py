r"""Tuning a few-step model on a person's own pictures, without losing the few steps.

    L = E w(lambda) |D(x_t, c) - x|^2  +  keep E |D(x_k, c') - D_0(x_k, c')|^2

The first term is the ordinary loss on pictures x with their captions c, at any level t (arXiv:2006.11239, Eq. 14, in
x0). It teaches what the pictures show, and by itself it unmakes a few-step model: asked for x at a high level, a
network answers with the mean of all pictures that it may be. The second holds what the model was before, D_0 (its
adapter off, or as it began), where it is drawn: x_k are its own states at its own few levels, on the run's prompts c'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ...core.denoiser import Denoiser
from ...core.errors import OneStepError
from ...core.memory import notice
from ...core.recipe import Recipe
from ...core.schedule import add_noise, cast_as
from ..data.captioned_pictures import CaptionedPictures, captioned
from ..engine.as_drawn import recipe_as_drawn
from ..engine.batch import Batch
from ..engine.levels import WEIGHTS, LevelSampler, LevelWeight, at, natural, usual_levels
from ..engine.setup import Setup
from ..engine.student import STUDENT
from ..engine.turns import Phase, Plan, Turn, learning
from ..host import Host
from ..settings import Settings, need_steps, setting
from ..watch.reference import Reference
from .kept import as_it_began, by_pictures, held
from .method import Method


@dataclass(frozen=True)
class Ordinary:
    """levels: where it looks. weight: of the squared error in x0."""

    levels: LevelSampler
    weight: LevelWeight

    def __call__(self, denoise: Denoiser, batch: Batch, x: Tensor) -> Tensor:
        """w |D(x_t) - x|^2, a sum over a sample's elements, a mean over samples. x: pictures, [B, C, h, w]."""
        sigma = self.levels(denoise.schedule, batch.uniform("picture's level"))
        x_t = add_noise(denoise.schedule, x, batch.normal("picture's noise"), sigma)
        with denoise.roles.use(STUDENT):
            error = (denoise(x_t, sigma, batch.cond) - x).square().flatten(1).sum(1)
        return (cast_as(at(self.weight, denoise.schedule, sigma), error) * error).mean()


@dataclass(frozen=True)
class TuneSettings:
    """Its pictures, and how much stays."""

    needs_pictures: ClassVar[bool] = True

    pictures: str = setting("", "The folder of your pictures, each with its caption in a .txt file of its name.")
    caption: str = setting("", "The caption of pictures without a .txt file; empty = each needs one.")
    caption_dropout: float = setting(
        0.05,
        "Share of the pictures that are learnt without their caption, for a base that is drawn with guidance.",
        0,
        1,
    )
    keep: float = setting(
        1.0,
        "Weight that holds the model where it is drawn, on the run's prompts, to what it was; 0 = ordinary training, "
        "after which few steps draw worse.",
        0,
        1000,
    )
    drawn: str = setting(
        "auto",
        "How the model is drawn that is tuned: auto = as its initial LoRA or its own name says; few = in "
        "student_steps; many = in teacher_steps with guidance, as a base that is not distilled; or a preset's name.",
    )
    level_weight: str = setting(
        "auto",
        "How the pictures' error weighs over noise levels: auto = as an error of what the network predicts.",
        choices=("auto", *WEIGHTS),
    )

    def check(self, run: Settings) -> None:
        need_steps(run)


def ordinary(denoise: Denoiser, settings: Settings) -> Ordinary:
    """Levels as models of its kind are trained at."""
    told = settings.own.level_weight
    return Ordinary(usual_levels(denoise), WEIGHTS[natural(denoise) if told == "auto" else told])


def recipe(host: Host, settings: Settings) -> Recipe:
    """As it is drawn before it is tuned."""
    return recipe_as_drawn(host, settings, settings.own.drawn)


def check(host: Host, settings: Settings) -> None:
    """Raises OneStepError where no pictures are named."""
    if not settings.own.pictures:
        raise OneStepError("tune learns from your pictures, and pictures is empty: give the folder that they lie in")
    recipe(host, settings)


def check_files(host: Host, settings: Settings) -> None:
    """Raises OneStepError without pictures, and for one that has no caption or fits no size."""
    captioned(host, settings)


def plan(setup: Setup) -> Plan:
    """Both terms in each update."""
    pictures, settings, denoise = CaptionedPictures(setup), setup.settings, setup.denoise
    own, recipe = settings.own, setup.recipe
    pictures.prepare()
    as_it_began(setup)
    learn, hold = ordinary(denoise, settings), held(setup, own.keep)
    if hold is None:
        drawn = f"{recipe.steps} steps with guidance {recipe.guidance:g}"
        notice("ordinary training: no few steps are held" + f", for the model draws in {drawn}" * bool(own.keep))

    def loss(batch: Batch, share: float, update: int) -> Mapping[str, Any]:
        some, x = pictures.draw(batch)
        value = learn(denoise, some.with_nulls(own.caption_dropout, "caption"), x)
        (share * value).backward()
        numbers = {"pictures": value.detach() / x[0].numel()}
        return numbers if hold is None else {**numbers, **hold(denoise, batch, share)}

    cost = learning(settings) + (hold.cost(settings) if hold else 0.0)
    turn = Turn(STUDENT, loss, settings.learning_rate)
    return Plan([STUDENT], [Phase(settings.method, settings.steps, [turn], cost)])


def by_own_pictures(setup: Setup) -> Reference:
    return by_pictures(setup, CaptionedPictures(setup))


METHOD = Method(
    name="tune",
    title="A style or subject from your pictures, the few steps kept",
    paper="arXiv:2006.11239, Eq. 14, beside a drift to the model as it was",
    forwards="6.1",
    plan=plan,
    settings=TuneSettings,
    recipe=recipe,
    reference=by_own_pictures,
    check=check,
    check_files=check_files,
)
