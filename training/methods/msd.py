r"""Multi-student distillation (MSD, arXiv:2410.23274): the prompts fall into K kinds, and each has its own student.

    c -> k = argmin_j |e(c) - m_j|^2;    student k and its critic learn by dmd's loss of the prompts that k draws

e(c): the text, summed up (`Cond.summary`); m_j: centroids by k-means. The students share the frozen base: each is a
LoRA, and so is each critic. They learn in turns, an update of all turns for one of them, so that a batch takes what
dmd's takes; the factors and moments of all of them are held. A teacher of the paper's first stage, for students smaller
than the teacher, is not needed: these are as large. The paper is known by its abstract; that kinds are clusters of text
summaries is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ...core.errors import OneStepError
from ...core.roles import Roles
from ...core.router import Router
from ..engine.batch import Batch
from ..engine.clusters import clustered, summaries
from ..engine.prompts import Prompts
from ..engine.setup import Setup
from ..engine.student import STUDENT
from ..engine.trainer import EMA
from ..engine.turns import Loss, Plan
from ..host import Host
from ..settings import Settings, setting
from .alternating import Extras, add_critic, alternating
from .distribution_matching import CRITIC
from .dmd import dmd
from .matching_settings import (
    ApartSettings,
    CourseSettings,
    CriticSettings,
    Fitting,
    FollowSettings,
    FollowTurnSettings,
    GuidanceSettings,
    LevelSettings,
    PairSettings,
    PictureSettings,
    WeightSettings,
    check_matching,
)
from .method import Method


@dataclass(frozen=True)
class MsdSettings(
    Fitting,
    PictureSettings,
    FollowTurnSettings,
    CourseSettings,
    LevelSettings,
    ApartSettings,
    FollowSettings,
    CriticSettings,
    PairSettings,
    WeightSettings,
    GuidanceSettings,
):
    """dmd's, and how many students there are. Each has one LoRA for all of its steps, and all that it learns in an
    update is of its own prompts."""

    step_loras: ClassVar[bool] = False
    diversity_anchor: ClassVar[float] = 0.0
    anchor_every: ClassVar[int] = 1  # type: ignore[misc]

    students: int = setting(
        4,
        "Students, each for one kind of prompts and in a LoRA file of its own; each takes one of so many updates, so "
        "give as many times the steps.",
        1,
        64,
    )


def router_of(prompts: Prompts, settings: Settings) -> tuple[Router, Prompts]:
    """What tells the students apart, and the prompts, of which a batch is all of one's."""
    # of every size the text is the same
    found = summaries(prompts.conds[prompts.sizes[0]])
    router, rows = clustered(found, settings.own.students, settings.seed)
    return router, replace(prompts, groups=rows, turns=settings.own.critic_updates + 1)


@dataclass(frozen=True)
class OfOneStudent:
    """A turn's loss, in which all is of the update's one student."""

    loss: Loss
    roles: Roles
    students: int

    def __call__(self, batch: Batch, share: float, update: int) -> Mapping[str, Any]:
        with self.roles.steps.told(update % self.students):
            return self.loss(batch, share, update)


def prompts(host: Host, settings: Settings, prompts: Prompts, folder: Path) -> Prompts:
    """Those of one student in each update."""
    if settings.own.students == 1:
        return prompts
    grouped = router_of(prompts, settings)[1]
    if not all(len(rows) for rows in grouped.groups):
        raise OneStepError(
            f"the texts of the {len(prompts)} prompts are of fewer than {settings.own.students} kinds to this model: "
            "lower students, or give more prompts that differ"
        )
    return grouped


def plan(setup: Setup) -> Plan:
    """dmd's, with parts of each role for the students."""
    if setup.settings.own.students == 1:
        return alternating(setup, dmd)
    router, roles = router_of(setup.prompts, setup.settings)[0], setup.denoise.roles
    for role in (STUDENT, EMA):
        roles.split(role, router)

    def critics(setup: Setup) -> None:
        add_critic(setup)
        roles.split(CRITIC, router)

    made, phases = alternating(setup, dmd, Extras(critic=critics)), []
    for phase in made.phases:
        turns = [replace(turn, loss=OfOneStudent(turn.loss, roles, len(router))) for turn in phase.turns]
        phases.append(replace(phase, turns=turns))
    return replace(made, phases=phases)


def check_texts(texts: Sequence[str], settings: Settings) -> None:
    """Raises OneStepError for fewer prompts than students."""
    if len({*texts}) < settings.own.students:
        raise OneStepError(
            f"students is {settings.own.students}, and there are {len({*texts})} different prompts: give each student "
            "some tens of prompts at least, or lower students"
        )


def check(host: Host, settings: Settings) -> None:
    """Raises OneStepError as dmd's, and for fewer updates than there are students."""
    check_matching(host, settings)
    if settings.steps < settings.own.students:
        raise OneStepError(
            f"steps is {settings.steps}, and there are {settings.own.students} students: give each an update at least"
        )


def note(settings: Settings) -> str:
    each = settings.steps // settings.own.students
    return f"{settings.own.students} students share the prompts by kind and learn in turns, about {each} updates each"


METHOD = Method(
    name="msd",
    title="Several students, each a LoRA for its kind of prompts",
    paper="arXiv:2410.23274",
    forwards="8.2 + 3.6 a critic update",
    plan=plan,
    settings=MsdSettings,
    check=check,
    check_texts=check_texts,
    prompts=prompts,
    note=note,
)
