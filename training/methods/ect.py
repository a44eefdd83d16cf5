"""Easy consistency tuning (arXiv:2406.14548): consistency without a teacher, on two noisings of one picture by the same
noise, whose times draw nearer over the run."""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.setup import Setup
from ..engine.turns import Plan
from ..settings import setting
from .consistency import check_source, consistency, of_whole_range, pictures_of
from .method import Method
from .near_times import NearTimes, TrainingSettings, inverse_gap, reach
from .trajectory import TwoTimes, WholeHuber, same_noise


@dataclass(frozen=True)
class EctSettings(TrainingSettings):
    """And how its times draw nearer."""

    stages: int = setting(8, "Stages of the run, of as many updates; in each, two times are nearer.", 1, 16)
    gap_base: float = setting(2.0, "By how many times they are nearer in each stage (q in the paper).", 1.1, 1024)


def plan(setup: Setup) -> Plan:
    """w d(D(x_t), sg D(x_r)), w = 1 / (t - r), t and r in sigma / alpha (Eq. 13)."""
    own, pictures = setup.settings.own, pictures_of(setup)
    ends = reach(setup.denoise, setup.recipe)

    def objective(along: float) -> TwoTimes:
        times = NearTimes(*ends, min(int(along * own.stages), own.stages - 1), own.gap_base)
        return TwoTimes(times, same_noise, WholeHuber(own.distance_width), inverse_gap, between=True)

    return consistency(setup, objective, 1, pictures, pictures.fresh)


METHOD = Method(
    name="ect",
    title="Consistency of pictures alone, its times drawing nearer",
    paper="arXiv:2406.14548",
    forwards="3.6 + the picture",
    plan=plan,
    settings=EctSettings,
    check=of_whole_range(check_source),
)
