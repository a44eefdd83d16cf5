"""f-distill (arXiv:2502.15681): dmd2 whose matching goes by another f-divergence than the reverse KL, with the ratio of
the densities from the discriminator. By the reverse KL it is dmd2."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ..settings import setting
from .alternating import Extras, alternating
from .dmd import dmd
from .dmd2 import check
from .f_divergence import WEIGHTS
from .head_settings import HeadSettings
from .head_turns import weighing_head_turns
from .method import Method


@dataclass(frozen=True)
class FDistillSettings(HeadSettings):
    """dmd2's, with the divergence. Bounds of the ratio are FastGen's."""

    divergence: str = setting(
        "jensen-shannon",
        "Which divergence the matching brings down: from the reverse KL (dmd2), which seeks single modes, to the KL, "
        "which covers all.",
        choices=tuple(WEIGHTS),
    )
    ratio_low: float = setting(0.1, "Least ratio of the teacher's density to the student's.", 1e-4, 1)
    ratio_high: float = setting(20.0, "Greatest ratio of the teacher's density to the student's.", 1, 1e4)
    ratio_memory: float = setting(
        0.9, "Share of the ratios' running means that an update of the head keeps.", 0, 0.9999
    )


METHOD = Method(
    name="f-distill",
    title="Distribution matching by another f-divergence, with a discriminator",
    paper="arXiv:2502.15681",
    forwards="9.6 + 3.6 a critic update + 3.1 a head update",
    plan=partial(alternating, objective=dmd, extras=Extras(head=weighing_head_turns)),
    settings=FDistillSettings,
    check=check,
)
