"""DMD2 (arXiv:2405.14867): dmd with a discriminator head, whose real pictures are the teacher's own. At gan_weight 0 a
student is told what dmd tells it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ..host import Host
from ..settings import Settings
from .alternating import Extras, alternating
from .dmd import dmd
from .head_settings import HeadSettings, PicturesSettings
from .head_turns import check_head, head_turns
from .matching_settings import check_matching
from .method import Method


@dataclass(frozen=True)
class Dmd2Settings(PicturesSettings, HeadSettings):
    """dmd's, the head's, and whose pictures are real."""


def check(host: Host, settings: Settings) -> None:
    """Raises OneStepError for a base or settings that it cannot serve."""
    check_matching(host, settings)
    check_head(host, settings)


METHOD = Method(
    name="dmd2",
    title="Distribution matching with a discriminator on the base's features",
    paper="arXiv:2405.14867",
    forwards="9.6 + 3.6 a critic update + 3.1 a head update",
    plan=partial(alternating, objective=dmd, extras=Extras(head=head_turns)),
    settings=Dmd2Settings,
    check=check,
)
