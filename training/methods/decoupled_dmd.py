"""Decoupled DMD (arXiv:2511.22677), of Z-Image-Turbo: dmd whose two terms look at levels of their own. Matching looks
at all of them, the guidance term (CFG augmentation) at those cleaner than the student's step begins at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from ...core.schedule import NoiseSchedule
from ..engine.student import Drawn
from ..settings import setting
from .alternating import Extras, alternating
from .distribution_matching import DistributionMatching
from .dmd import dmd
from .matching_settings import MatchingSettings, check_matching
from .method import Method
from .sub_interval import cut


@dataclass(frozen=True)
class DecoupledSettings(MatchingSettings):
    """dmd's, its terms apart."""

    separate_levels: bool = setting(
        True,
        "Draw the guidance term's noise level apart from the matching term's, below where the student's step begins; "
        "off = dmd.",
    )


def cleaner(objective: DistributionMatching, schedule: NoiseSchedule, drawn: Drawn) -> DistributionMatching:
    """``objective`` whose guidance term looks at no noisier levels than the student's step begins at: the authors'
    answer of how its levels are drawn (Tongyi-MAI/Z-Image, issue 78), uniform in the network's time."""
    if objective.guidance_levels is None:
        return objective
    begins = float(schedule.share_of(drawn.sigma[:1]))
    return replace(objective, guidance_levels=cut(objective.guidance_levels, 0.0, begins))


METHOD = Method(
    name="decoupled-dmd",
    title="Distribution matching and guidance at noise levels of their own",
    paper="arXiv:2511.22677",
    forwards="9.2 + 3.6 a critic update",
    plan=partial(alternating, objective=dmd, extras=Extras(at_step=cleaner)),
    settings=DecoupledSettings,
    check=check_matching,
)
