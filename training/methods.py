"""The methods by name, as Settings, command line and nodes know them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .objectives.distribution_matching import DistributionMatching
from .objectives.dmd import dmd
from .objectives.vsd import vsd
from .settings import Settings


@dataclass(frozen=True)
class Method:
    """One row of the README's table. forwards: network forwards of one sample in a student update, backward
    included."""

    make: Callable[[Settings], DistributionMatching | None]
    title: str
    paper: str
    forwards: str

    def __call__(self, settings: Settings) -> DistributionMatching | None:
        """The engine's objective; None where the student regresses on pairs alone."""
        return self.make(settings)


METHODS: dict[str, Method] = {
    "dmd": Method(
        dmd,
        "Distribution matching distillation, data-free",
        "arXiv:2311.18828, arXiv:2405.14867",
        "6 + 4 a critic update",
    ),
    "vsd": Method(
        vsd,
        "Variational score distillation of a generator",
        "arXiv:2305.16213, arXiv:2312.05239",
        "7 + 4 a critic update",
    ),
    "regression": Method(
        lambda settings: None, "Regression on the teacher's ODE pairs", "arXiv:2311.18828, Eq. 9", "3 + the pair"
    ),
}
