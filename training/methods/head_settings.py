"""The settings of the methods with a discriminator head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...core.errors import OneStepError
from ..settings import Settings, setting
from .discriminator import LOSSES
from .f_divergence import WEIGHTS
from .matching_settings import Fitting, MatchingSettings, OneTermSettings


@dataclass(frozen=True)
class DiscriminatorSettings:
    """What the head is, and how it learns."""

    head_learning_rate: float = setting(1e-4, "Head's step size.", 0, 1)
    head_updates: int = setting(1, "Updates of the head for each of the student's.", 1, 100)
    head_blocks: int = setting(
        1, "Blocks of the base that the head looks at: 1 = the middle one, more are spread over the network.", 1, 64
    )
    head_width: int = setting(256, "Channels of the head.", 8, 4096)
    head_loss: str = setting(
        "softplus",
        "The discriminator's loss: the non-saturating one (DMD2), or the hinge (LADD).",
        choices=tuple(LOSSES),
    )
    head_cells: bool = setting(
        False,
        "Judge each cell of a block's picture by itself (LADD), not the whole: sharper, and it can hold a student that "
        "has lost its variety where it is.",
    )
    head_penalty: float = setting(
        0.0,
        "Weight of the head's penalty for answering otherwise to a real picture with a little noise (APT); 0 = none.",
        0,
        1e5,
    )
    head_penalty_noise: float = setting(0.1, "Deviation of that noise.", 1e-4, 10)


@dataclass(frozen=True)
class GanSettings:
    """The discriminator's term beside the matching. Weights are DMD2's and FastGen's for SDXL."""

    gan_weight: float = setting(
        5e-3, "Weight of the discriminator's term beside the matching, once it has risen; 0 = none.", 0, 100
    )
    gan_start: float = setting(
        0.5, "Share of the matching's updates after which the discriminator's term begins to rise.", 0, 1
    )
    gan_ramp: float = setting(
        0.25, "Share of the matching's updates over which it rises to its weight; 0 = at once.", 0, 1
    )
    head_level_low: float = setting(0.02, "Least noise level at which the head looks, as a share of the time.", 0, 1)
    head_level_high: float = setting(0.98, "Greatest noise level at which the head looks, as a share of it.", 0, 1)


class HeadFitting(Fitting):
    """What of these settings does not go together."""

    def check(self: Any, run: Settings) -> None:
        Fitting.check(self, run)
        if self.head_level_low >= self.head_level_high:
            raise OneStepError(
                f"head_level_low {self.head_level_low} must be below head_level_high {self.head_level_high}"
            )


@dataclass(frozen=True)
class HeadSettings(HeadFitting, DiscriminatorSettings, GanSettings, MatchingSettings):
    """dmd's, then of the term, then of the head."""


@dataclass(frozen=True)
class OneTermHeadSettings(HeadFitting, DiscriminatorSettings, GanSettings, OneTermSettings):
    """The same of a loss that is one term."""


@dataclass(frozen=True)
class RatioSettings:
    """The divergence, and the ratio of the densities that it goes by. Bounds are FastGen's."""

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


@dataclass(frozen=True)
class PicturesSettings:
    """Whose pictures are real."""

    real_pictures: str = setting(
        "",
        "A folder of pictures that are to count as real, empty = the teacher's own, so that "
        "none are needed. They are cut to the run's sizes.",
    )
