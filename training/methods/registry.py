"""The methods by name, as Settings, command line and nodes know them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.recipe import Recipe
from ...core.roles import State
from ..engine.direct import Direct
from ..engine.inputs import recipe_of
from ..engine.prompts import Prompts
from ..engine.student import STUDENT
from ..host import Host
from ..settings import Settings
from ..watch.measures import Referee, by_teacher
from .control import by_controls, check_control, control_adapter, generator_recipe, nct
from .distribution_matching import DistributionMatching
from .dmd import dmd
from .guidance import adapter, agd, guidance_lora, guided_recipe
from .sun import by_change, check_negatives, negative_adapter, student_recipe, sun
from .vsd import vsd


def whose_pictures(settings: Settings) -> str:
    """A word where the few-step student that an adapter is for is not told."""
    if settings.initial_lora:
        return ""
    return f"no initial_lora: {settings.method} takes the base itself, drawn in few steps, for the student"


@dataclass(frozen=True)
class Method:
    """One row of the README's table. forwards: network forwards of one sample in a student update, backward
    included.

    direct: (host, settings, prompts, the run's folder) -> the loss of a method without a critic. side: what learns in
    place of the student's factors. recipe: how the student draws. referee: makes what the watch compares it with.
    check: raises OneStepError for settings that it cannot do with this host. note: what a run tells of its settings as
    it begins, or nothing. adjustable: settings that may be others when a run is continued.
    """

    make: Callable[[Settings], DistributionMatching | None]
    title: str
    paper: str
    forwards: str
    direct: Callable[[Host, Settings, Prompts, Path], Direct] | None = None
    side: Callable[[Host, Settings], Any] | None = None
    recipe: Callable[[Host, Settings], Recipe] = recipe_of
    referee: Referee = by_teacher
    check: Callable[[Host, Settings], None] = lambda host, settings: None
    note: Callable[[Settings], str] = lambda settings: ""
    adjustable: tuple[str, ...] = ("steps", "pairs")

    def __call__(self, settings: Settings) -> DistributionMatching | None:
        """The engine's objective; None where the student regresses on pairs alone."""
        return self.make(settings)


METHODS: dict[str, Method] = {
    "dmd": Method(
        dmd,
        "Distribution matching distillation, data-free",
        "arXiv:2311.18828, arXiv:2405.14867",
        "6 + 4 a critic update",
    ),
    "vsd": Method(
        vsd,
        "Variational score distillation of a generator",
        "arXiv:2305.16213, arXiv:2312.05239",
        "7 + 4 a critic update",
    ),
    "regression": Method(
        lambda settings: None, "Regression on the teacher's ODE pairs", "arXiv:2311.18828, Eq. 9", "3 + the pair"
    ),
    "agd": Method(
        lambda settings: None,
        "Adapter guidance distillation: a guidance dial in one forward, as an adapter",
        "arXiv:2503.07274",
        "3 + the trajectories",
        direct=agd,
        side=adapter,
        recipe=guided_recipe,
    ),
    "guidance-lora": Method(
        lambda settings: None,
        "One guidance in one forward, as a LoRA",
        "arXiv:2503.07274, arXiv:2210.03142",
        "3 + the trajectories",
        direct=guidance_lora,
        recipe=guided_recipe,
    ),
    "nct": Method(
        lambda settings: None,
        "Noise consistency training: a control for a one-step generator, as an adapter",
        "arXiv:2506.19741",
        "4 + the picture",
        direct=nct,
        side=control_adapter,
        recipe=generator_recipe,
        referee=by_controls,
        check=check_control,
        note=whose_pictures,
    ),
    "sun": Method(
        lambda settings: None,
        "SpeedUpNet: a negative prompt in one forward, as an adapter",
        "arXiv:2312.08887",
        "3 + the segment",
        direct=sun,
        side=negative_adapter,
        recipe=student_recipe,
        referee=by_change,
        check=check_negatives,
        note=whose_pictures,
        adjustable=("steps",),  # which texts a segment is of depends on how many there are
    ),
}


def add_student(host: Host, settings: Settings, method: Method, initial: State | None) -> None:
    """The student's role, as the run begins. initial: the initial LoRA's factors. Where the method has a side, that
    alone learns, and the initial LoRA stays under it as it is."""
    roles = host.denoiser.roles
    if method.side is None:
        roles.add(STUDENT, settings.rank, settings.seed, host.device)
    if method.side is not None or initial is not None:
        roles.load(STUDENT, initial or {}, host.device, lineage=settings.seed)
    if method.side is not None:
        for factor in roles.parameters(STUDENT):
            factor.requires_grad_(False)
        roles.add_side(STUDENT, method.side(host, settings).to(host.device))
