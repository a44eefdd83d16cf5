"""Any-step flow maps (AnyFlow, arXiv:2605.13724): meanflow between any two times, with dmd beside it on the student's
own pictures. Its roll-outs are the steps that the student is drawn in, each to the picture; the paper's shortcuts
between them, and its embedder of the second time, are not part of it here."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import setting
from .alternating import Extras, alternating
from .consistency import of_whole_range
from .dmd import dmd
from .matching_settings import MatchingSettings, check_matching
from .meanflow import FlowTimesSettings, beside
from .method import Method
from .tangents import TangentSettings


@dataclass(frozen=True)
class AnyflowSettings(TangentSettings, FlowTimesSettings, MatchingSettings):
    """dmd's, whose anchor is the flow map."""

    anchor: float = setting(
        1.0, "Weight of the mean velocities on the teacher's pictures, beside the matching.", 0, 100
    )
    warm_start: int = setting(
        0, "Updates of regression on the teacher's pairs before both; 0 = none, as the paper.", 0, 1_000_000
    )


METHOD = Method(
    name="anyflow",
    title="Mean velocities with distribution matching beside them",
    paper="arXiv:2605.13724",
    forwards="12.4 + 3.6 a critic update",
    plan=lambda setup: alternating(setup, dmd, Extras(anchored=beside)),
    settings=AnyflowSettings,
    check=of_whole_range(check_matching),
)
