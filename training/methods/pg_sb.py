"""PG-SB (SNOOPI, arXiv:2412.02687): VSD whose guidance is drawn at random for each sample, the same for teacher and
critic, which keeps a fixed scale's collapse away. At a fixed scale it is vsd."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import setting
from .alternating import alternating
from .matching_settings import MatchingSettings, check_matching
from .method import Method
from .vsd import vsd


@dataclass(frozen=True)
class PgSbSettings(MatchingSettings):
    """vsd's, with a range of scales."""

    matching_guidance: float = setting(1.5, "Least guidance that is drawn; 1 = none.", 0, 30)
    guidance_schedule: str = setting(
        "random",
        "Whether the guidance is drawn for each sample between matching_guidance and guidance_end, stays at the first "
        "(vsd), or goes from the first to the second over the run.",
        choices=("constant", "random", "falling"),
    )
    guidance_end: float = setting(6.0, "Greatest guidance that is drawn.", 0, 30)


METHOD = Method(
    name="pg-sb",
    title="Variational score distillation with a random guidance",
    paper="arXiv:2412.02687",
    forwards="9.3 + 3.6 a critic update",
    plan=lambda setup: alternating(setup, vsd),
    settings=PgSbSettings,
    check=check_matching,
)
