"""The settings of the methods with a discriminator head."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.errors import OneStepError
from ..settings import Settings, setting
from .discriminator import LOSSES
from .matching_settings import MatchingSettings


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


@dataclass(frozen=True)
class HeadSettings(DiscriminatorSettings, GanSettings, MatchingSettings):
    """dmd's, then of the term, then of the head."""

    def check(self, run: Settings) -> None:
        MatchingSettings.check(self, run)
        if self.head_level_low >= self.head_level_high:
            raise OneStepError(
                f"head_level_low {self.head_level_low} must be below head_level_high {self.head_level_high}"
            )


@dataclass(frozen=True)
class PicturesSettings:
    """Whose pictures are real."""

    real_pictures: str = setting(
        "",
        "A folder of pictures that are to count as real, empty = the teacher's own, so that "
        "none are needed. They are cut to the run's sizes.",
    )
