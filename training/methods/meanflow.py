r"""Mean velocities (MeanFlow, arXiv:2505.13447): the student answers with the velocity from one time to another, so
that one step is the whole way.

    u(y_t, t, r) = 1 / (t - r) int_r^t v dtau,      (t - r) u = int v   =>   u = v - (t - r) du/dt

y and t are those of straight lines (`rectified`), v the guided teacher's. The second time is told as t - r / 2, which a
plain LoRA can carry (TwinFlow, arXiv:2512.05150): where a step leads to the picture, r = 0, that is the time itself, so
that any sampler that renoises draws the student.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...core.cond import Cond
from ...core.continuous import continuous, leading
from ...core.denoiser import Denoiser, guided
from ...core.errors import OneStepError
from ...core.roles import TEACHER
from ...core.schedule import expand
from ..data.pairs import Pairs
from ..engine.batch import Batch
from ..engine.setup import Setup
from ..engine.student import STUDENT
from ..engine.turns import Loss, Plan, learning, on_data, one_phase
from ..settings import NoSettings, Settings, setting
from .consistency import Pictures, SourceSettings, check_source, of_whole_range, pictures_of
from .method import Method
from .rectified import LEAST, level_of, noise_share
from .tangents import Tangent, TangentSettings, straight_on, tangent_of, wide


@dataclass(frozen=True)
class FlowTimesSettings(NoSettings):
    """Where two times lie."""

    time_mean: float = setting(
        -0.4, "Mean of the logit of both times, of which the later is t and the other r.", -10, 10
    )
    time_deviation: float = setting(1.0, "Standard deviation of the logit of both times.", 0.01, 10)
    picture_share: float = setting(
        0.5, "Share of the samples whose second time is the picture's, as in every step that is drawn.", 0, 1
    )
    same_share: float = setting(
        0.25, "Share of the samples whose two times are one, on which it is flow matching to the teacher.", 0, 1
    )

    def check(self, run: Settings) -> None:
        super().check(run)
        if self.picture_share + self.same_share > 1:
            raise OneStepError(
                f"picture_share {self.picture_share:g} and same_share {self.same_share:g} are shares of the same "
                "samples: together they must not be above 1"
            )


@dataclass(frozen=True)
class MeanFlowSettings(TangentSettings, FlowTimesSettings, SourceSettings):
    """Its pictures, its times, its tangents."""


@dataclass(frozen=True)
class TwoLogits:
    """t and r, logistic of N(mean, deviation^2) each, the later first; r is 0 for ``picture`` of the samples and t for
    ``same`` of them. highest: of t."""

    mean: float
    deviation: float
    picture: float
    same: float
    highest: float

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(t, r), [B] each."""
        both = torch.stack([self._one(batch, stream) for stream in ("flow time", "flow end")])
        t, r = both.max(0).values, both.min(0).values
        kind = batch.uniform("flow kind")
        r = torch.where(kind < self.picture, torch.zeros_like(r), r)
        return t, torch.where(kind >= 1 - self.same, t, r)

    def _one(self, batch: Batch, stream: str) -> Tensor:
        normal = torch.special.ndtri(batch.uniform(stream).clamp(1e-9, 1 - 1e-9))
        return torch.sigmoid(self.mean + self.deviation * normal).clamp(LEAST, self.highest)


@dataclass(frozen=True)
class MeanFlow:
    """guidance: w of the teacher."""

    times: TwoLogits
    tangent: Tangent
    guidance: float

    def __call__(self, denoise: Denoiser, batch: Batch, x0: Tensor) -> Tensor:
        """S / sg(S + c), S = |u - sg(v - (t - r) du/dt)|^2 (Eq. 10, 11 and 22 with p = 1), a mean over samples."""
        denoise, (t, r) = continuous(denoise), self.times(batch)
        y = expand(1 - t, wide(x0)) * x0 + expand(t, wide(x0)) * batch.normal("flow noise")
        mean = partial(velocity, leading(denoise, level_of(denoise.schedule, r)), x0.dtype, batch.cond)
        with torch.no_grad():
            with denoise.roles.use(TEACHER):
                v = velocity(denoise, x0.dtype, batch.cond, y, t, batch.nulls(), self.guidance)
            with denoise.roles.use(STUDENT):
                change = self.tangent(mean, y, t, v)
        with denoise.roles.use(STUDENT):
            u = mean(y, t)
        s = (u - (v - expand(t - r, v) * change)).square().flatten(1).sum(1)
        return (s / (s.detach() + SMALL)).mean()


SMALL = 1e-2
"""c of the weight."""


def velocity(
    denoise: Denoiser, dtype: torch.dtype, cond: Cond, y: Tensor, t: Tensor, null: Cond | None = None, w: float = 1.0
) -> Tensor:
    """(y - D) / t [B, ...] in float64, ``denoise`` being given latents of ``dtype``."""
    sigma = level_of(denoise.schedule, t)
    x = (expand(denoise.schedule.alpha(sigma) + sigma, y) * y).to(dtype)
    return (y - wide(guided(denoise, x, sigma, cond, null, w))) / expand(t, y)


def mean_flow(setup: Setup) -> MeanFlow:
    """As the settings have it, up to the student's first level."""
    denoise, own = setup.denoise, setup.settings.own
    highest = float(noise_share(denoise.schedule, setup.recipe.levels(denoise.schedule)[0]))
    times = TwoLogits(own.time_mean, own.time_deviation, own.picture_share, own.same_share, highest)
    guidance = setup.settings.guidance if denoise.guidance == "cfg" else 1.0
    return MeanFlow(times, tangent_of(setup.settings, LEAST, highest, straight_on), guidance)


def on_pictures(setup: Setup, pictures: Pictures) -> tuple[Loss, float]:
    """(its loss on pictures with fresh noise, forwards of a sample besides the one that is learnt from)."""
    learn = mean_flow(setup)
    loss = on_data(pictures.draw, partial(learn, setup.denoise), "flow")
    return loss, 2 + (2 if learn.guidance != 1 else 1)


def beside(setup: Setup, pairs: Pairs) -> tuple[Loss, float]:
    """The same on the teacher's pictures, beside another method's terms."""
    loss, more = on_pictures(setup, Pictures(None, pairs))
    return loss, learning(setup.settings) + more


def plan(setup: Setup) -> Plan:
    """The student alone."""
    pictures = pictures_of(setup)
    loss, more = on_pictures(setup, pictures)
    return one_phase(STUDENT, loss, setup.settings, *pictures.fresh, beside=more)


METHOD = Method(
    name="meanflow",
    title="Mean velocities: one step is the whole way",
    paper="arXiv:2505.13447, arXiv:2512.05150",
    forwards="6.7 + the picture",
    plan=plan,
    settings=MeanFlowSettings,
    check=of_whole_range(check_source),
)
