"""Score-regularised continuous-time consistency (rCM, arXiv:2510.08431): scm, which covers all that the teacher draws,
with dmd beside it on the student's own pictures, which keeps them sharp."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import setting
from .alternating import Extras, alternating
from .consistency import of_whole_range
from .dmd import dmd
from .matching_settings import MatchingSettings, check_matching
from .method import Method
from .scm import AngleSettings, beside
from .tangents import TangentSettings


@dataclass(frozen=True)
class RcmSettings(TangentSettings, AngleSettings, MatchingSettings):
    """dmd's, whose anchor is the consistency."""

    anchor: float = setting(
        1.0, "Weight of the continuous-time consistency on the teacher's pictures, beside the matching.", 0, 100
    )
    warm_start: int = setting(
        0, "Updates of regression on the teacher's pairs before both; 0 = none, as the paper.", 0, 1_000_000
    )
    time_mean: float = setting(0.7, "Mean of ln tan t, t the angle of a noise level; more = more noise.", -10, 10)


METHOD = Method(
    name="rcm",
    title="Continuous-time consistency with distribution matching beside it",
    paper="arXiv:2510.08431",
    forwards="12.4 + 3.6 a critic update",
    plan=lambda setup: alternating(setup, dmd, Extras(anchored=beside)),
    settings=RcmSettings,
    check=of_whole_range(check_matching),
)
