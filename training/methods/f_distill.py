"""f-distill (arXiv:2502.15681): dmd2 whose matching goes by another f-divergence than the reverse KL, with the ratio of
the densities from the discriminator. By the reverse KL it is dmd2."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from .alternating import Extras, alternating
from .dmd import dmd
from .dmd2 import check
from .head_settings import HeadSettings, RatioSettings
from .head_turns import weighing_head_turns
from .method import Method


@dataclass(frozen=True)
class FDistillSettings(RatioSettings, HeadSettings):
    """dmd2's, with the divergence."""


METHOD = Method(
    name="f-distill",
    title="Distribution matching by another f-divergence, with a discriminator",
    paper="arXiv:2502.15681",
    forwards="9.6 + 3.6 a critic update + 3.1 a head update",
    plan=partial(alternating, objective=dmd, extras=Extras(head=weighing_head_turns)),
    settings=FDistillSettings,
    check=check,
)
