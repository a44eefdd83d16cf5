"""SANA-Sprint's recipe (arXiv:2503.09641): scm with ladd beside it. The paper's student is told its guidance, which a
plain LoRA cannot be: here it learns the run's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ..settings import setting
from .consistency import of_whole_range
from .head_turns import check_head
from .ladd import LaddSettings, plan
from .method import Method
from .scm import AngleSettings, beside
from .tangents import TangentSettings


@dataclass(frozen=True)
class SanaSprintSettings(TangentSettings, AngleSettings, LaddSettings):
    """ladd's, whose anchor is the consistency."""

    anchor: float = setting(
        1.0, "Weight of the continuous-time consistency on the teacher's pictures, beside the discriminator.", 0, 100
    )
    warm_start: int = setting(
        0, "Updates of regression on the teacher's pairs before both; 0 = none, as the paper.", 0, 1_000_000
    )


METHOD = Method(
    name="sana-sprint",
    title="Continuous-time consistency with a discriminator beside it",
    paper="arXiv:2503.09641",
    forwards="10.7 + 3.1 a head update",
    plan=partial(plan, anchored=beside),
    settings=SanaSprintSettings,
    check=of_whole_range(check_head),
)
