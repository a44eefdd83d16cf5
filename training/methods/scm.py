"""Continuous-time consistency distillation (sCM, arXiv:2410.11081): the student's answer does not change along the
teacher's trajectory, as its derivative says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.denoiser import Denoiser
from ...core.roles import TEACHER
from ...core.schedule import expand
from ..data.pairs import Pairs
from ..engine.batch import Batch
from ..engine.setup import Setup
from ..engine.student import STUDENT
from ..engine.turns import Loss, Plan, learning, on_data_at, one_phase
from ..settings import NoSettings, setting
from .consistency import Pictures, SourceSettings, check_source, of_whole_range, pictures_of
from .method import Method
from .tangents import Tangent, TangentSettings, tangent_of, wide
from .trig_flow import TrigFlow, rotated


@dataclass(frozen=True)
class AngleSettings(NoSettings):
    """Where it looks, and how the change along the way comes in."""

    time_mean: float = setting(0.2, "Mean of ln tan t, t the angle of a noise level; more = more noise.", -10, 10)
    time_deviation: float = setting(1.6, "Standard deviation of ln tan t.", 0.01, 10)
    tangent_warm_up: float = setting(0.2, "Share of the run over which the change along the way comes in.", 0, 1)


@dataclass(frozen=True)
class ContinuousSettings(TangentSettings, AngleSettings, SourceSettings):
    """Of continuous-time consistency."""


@dataclass(frozen=True)
class ContinuousConsistency:
    """mean, deviation: of ln tan t. tangent: how dF / dt is found. guidance: w of the teacher. lowest,
    highest: of t."""

    mean: float
    deviation: float
    tangent: Tangent
    guidance: float
    lowest: float
    highest: float

    def angles(self, batch: Batch) -> Tensor:
        """t [B], ln tan t ~ N(mean, deviation^2)."""
        normal = torch.special.ndtri(batch.uniform("angle").clamp(1e-9, 1 - 1e-9))
        t = torch.atan(torch.exp(self.mean + self.deviation * normal))
        return t.clamp(self.lowest, self.highest)

    def __call__(self, denoise: Denoiser, batch: Batch, x0: Tensor, warmth: float) -> Tensor:
        """|F - sg(F + g / (rms(g) + 0.1))|^2: a sum over a sample's elements, a mean over samples. warmth: r, 0 to 1,
        the weight of what changes along the way."""
        flow, t = TrigFlow.of(denoise, x0), self.angles(batch)
        x = expand(torch.cos(t), wide(x0)) * x0 + expand(torch.sin(t), wide(x0)) * batch.normal("angle's noise")
        with torch.no_grad():
            with denoise.roles.use(TEACHER):
                dx = flow.velocity(x, t, batch.cond, batch.nulls(), self.guidance)
            with denoise.roles.use(STUDENT):
                change = self.tangent(lambda x, t: flow.velocity(x, t, batch.cond), x, t, dx)
        with denoise.roles.use(STUDENT):
            f = flow.velocity(x, t, batch.cond)
        g = consistency_gradient(x, t, f.detach(), dx, change, warmth)
        return (f - (f.detach() + normalised(g))).square().flatten(1).sum(1).mean()


def consistency_gradient(x: Tensor, t: Tensor, f: Tensor, dx: Tensor, change: Tensor, warmth: float) -> Tensor:
    """g = cos(t) d/dt (cos(t) x - sin(t) F) = -cos^2(t) (F - dx/dt) - r cos(t) sin(t) (x + dF/dt) (Algorithm 1)."""
    cos, sin = expand(torch.cos(t), x), expand(torch.sin(t), x)
    return -(cos**2) * (f - dx) - warmth * cos * sin * (x + change)


LEAST = 0.1
"""c of the tangent's normalisation (sec. 4.1)."""


def normalised(g: Tensor) -> Tensor:
    """g / (rms(g) + c) of each sample; no number becomes 0."""
    rms = g.flatten(1).square().mean(1).sqrt()
    return torch.nan_to_num(g / (expand(rms, g) + LEAST))


def continuous_consistency(setup: Setup) -> ContinuousConsistency:
    """As the settings have it, between the model's least level and the student's first."""
    denoise, own = setup.denoise, setup.settings.own
    flow = TrigFlow.of(denoise, torch.empty(0))
    levels = torch.tensor([denoise.schedule.sigma_min, float(setup.recipe.levels(denoise.schedule)[0])])
    low, high = flow.angle(levels.double()).tolist()
    # at t = 0 there is no velocity
    ends = max(low, 1e-3), high
    guidance = setup.settings.guidance if denoise.guidance == "cfg" else 1.0
    tangent = tangent_of(setup.settings, *ends, rotated)
    return ContinuousConsistency(own.time_mean, own.time_deviation, tangent, guidance, *ends)


def on_pictures(setup: Setup, pictures: Pictures, first: int = 0, every: int = 1) -> tuple[Loss, float]:
    """(its loss on pictures with fresh noise, forwards of a sample besides the one that is learnt from). first: the
    number that its first draw of pictures has. every: updates of the run for each of its own."""
    settings, learn = setup.settings, continuous_consistency(setup)

    def value(batch: Batch, x0: Tensor, update: int) -> Tensor:
        along = min(1.0, max(0, update - first) * every / max(1, settings.steps))
        return learn(setup.denoise, batch, x0, warmth(settings.own.tangent_warm_up, along))

    return on_data_at(pictures.draw, value, "consistency"), 2 + (2 if learn.guidance != 1 else 1)


def beside(setup: Setup, pairs: Pairs) -> tuple[Loss, float]:
    """The same on the teacher's pictures, beside another method's terms."""
    own = setup.settings.own
    first = own.warm_start + getattr(own, "critic_warm_up", 0) + getattr(own, "head_warm_up", 0)
    loss, more = on_pictures(setup, Pictures(None, pairs), first, getattr(own, "anchor_every", 1))
    return loss, learning(setup.settings) + more


def plan(setup: Setup) -> Plan:
    """The student alone."""
    pictures = pictures_of(setup)
    loss, more = on_pictures(setup, pictures)
    return one_phase(STUDENT, loss, setup.settings, *pictures.fresh, beside=more)


def warmth(over: float, along: float) -> float:
    """r = min(1, k / H): 1 from ``over`` of the run on."""
    return min(1.0, along / over) if over else 1.0


METHOD = Method(
    name="scm",
    title="Continuous-time consistency",
    paper="arXiv:2410.11081",
    forwards="6.7 + the picture",
    plan=plan,
    settings=ContinuousSettings,
    check=of_whole_range(check_source),
)
