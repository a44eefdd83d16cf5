"""Improved consistency training (arXiv:2310.14189): consistency without a teacher, on neighbouring levels of a grid
that is made finer over the run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...core.errors import OneStepError
from ..engine.setup import Setup
from ..engine.turns import Plan
from ..settings import Settings, setting
from .consistency import check_source, consistency, of_whole_range, pictures_of
from .method import Method
from .near_times import KarrasTimes, TrainingSettings, inverse_gap, reach
from .trajectory import TwoTimes, WholeHuber, same_noise


@dataclass(frozen=True)
class IctSettings(TrainingSettings):
    """And its levels."""

    levels_first: int = setting(10, "Noise levels at the beginning of the run.", 2, 10_000)
    levels_last: int = setting(1280, "Noise levels at its end; they double in stages of as many updates.", 2, 10_000)

    def check(self, run: Settings) -> None:
        super().check(run)
        if self.levels_first > self.levels_last:
            raise OneStepError(f"levels_first {self.levels_first} must not be above levels_last {self.levels_last}")


def levels_at(own: IctSettings, along: float) -> int:
    """N = min(s_0 2^floor(k / K'), s_1) + 1, K' = K / (log2(s_1 / s_0) + 1) (Eq. 8)."""
    stages = math.floor(math.log2(own.levels_last / own.levels_first)) + 1
    return min(own.levels_first * 2 ** int(along * stages), own.levels_last) + 1


def plan(setup: Setup) -> Plan:
    """w d(D(x_t), sg D(x_r)), w = 1 / (t - r), t and r neighbouring levels in sigma / alpha (Eq. 6 to 11)."""
    own, pictures, ends = setup.settings.own, pictures_of(setup), reach(setup.denoise, setup.recipe)

    def objective(along: float) -> TwoTimes:
        times = KarrasTimes(*ends, levels_at(own, along))
        return TwoTimes(times, same_noise, WholeHuber(own.distance_width), inverse_gap, between=True)

    return consistency(setup, objective, 1, pictures, pictures.fresh)


METHOD = Method(
    name="ict",
    title="Consistency of pictures alone, on finer and finer levels",
    paper="arXiv:2310.14189",
    forwards="3.6 + the picture",
    plan=plan,
    settings=IctSettings,
    check=of_whole_range(check_source),
)
