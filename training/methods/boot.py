r"""BOOT (arXiv:2306.05544): one step, learnt along the teacher's trajectory from noise alone; no picture is needed.

    y_t = (x_t - sigma_t e) / alpha_t is the signal on the trajectory that begins at the noise e, and has an ODE,
    y_s = f + (sigma_s alpha_t) / (alpha_s sigma_t) (y_t - f),   f = D_T(alpha_t y_t + sigma_t e, t),   s < t

    L_BS = |y(e, s) - sg(the step from y(e, t) to s)|^2,   L_BC = |y(e, T) - f(e, T)|^2

y(e, t) is the student's: it sees the noise alone, at the first level T, and is told where it is to lead. The step is
DDIM's, which is exact where f stays as it is. The paper's student is told t in the place of T; here it is told
T - t / 2, as `meanflow`'s, which a plain LoRA can carry: at t = 0 that is T itself, so that any sampler draws its one
step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...core.continuous import leading
from ...core.denoiser import Denoiser, guided
from ...core.errors import OneStepError
from ...core.roles import TEACHER
from ...core.sampling import initial_latents
from ...core.schedule import NoiseSchedule, add_noise, expand
from ..engine.batch import Batch
from ..engine.inputs import recipe_of
from ..engine.setup import Setup
from ..engine.student import STUDENT
from ..engine.turns import Plan, on_data, one_phase
from ..host import Host
from ..settings import NoSettings, Settings, setting
from .consistency import of_whole_range
from .method import Method
from .trajectory import Grid, square


@dataclass(frozen=True)
class BootSettings(NoSettings):
    """Its solver and its boundary."""

    solver_steps: int = setting(
        32,
        "Steps of the teacher's solver from noise to a picture, each of which the student learns from the one before.",
        1,
        1000,
    )
    boundary: float = setting(
        0.1, "Share of the samples that learn where the trajectory begins: what the teacher answers to the noise.", 0, 1
    )


@dataclass(frozen=True)
class Boot:
    """grid: the solver's levels. boundary: the share of L_BC. guidance: w of the teacher. start: e -> x at the first
    level."""

    grid: Grid
    boundary: float
    guidance: float
    start: Callable[[NoiseSchedule, Tensor, Tensor], Tensor]

    def __call__(self, denoise: Denoiser, batch: Batch, noise: Tensor) -> Tensor:
        """L_BS, or L_BC of as many samples as have it: a sum over a sample's elements, a mean over samples."""
        levels = self.grid.levels(denoise.schedule)
        at = 1 + (batch.uniform("boot time") * (len(levels) - 1)).floor().long()
        first = batch.uniform("boot boundary") < self.boundary
        s, t = levels[torch.where(first, 0, at)], levels[torch.where(first, 0, at - 1)]
        high = levels[:1].expand(len(batch))
        x = self.start(denoise.schedule, noise, high)
        with torch.no_grad():
            y_t = self._signal(denoise, batch, x, high, t)
            x_t = torch.where(expand(first, x) > 0, x, add_noise(denoise.schedule, y_t, noise, t))
            with denoise.roles.use(TEACHER):
                f = guided(denoise, x_t, t, batch.cond, batch.nulls(), self.guidance)
            target = torch.where(expand(first, f) > 0, f, led(denoise.schedule, y_t, f, t, s))
        return square(self._signal(denoise, batch, x, high, s), target).mean()

    def _signal(self, denoise: Denoiser, batch: Batch, x: Tensor, high: Tensor, t: Tensor) -> Tensor:
        """y(e, t) [B, ...], without a graph where none is kept."""
        with denoise.roles.use(STUDENT):
            return leading(denoise, t)(x, high, batch.cond)


def led(schedule: NoiseSchedule, y: Tensor, f: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """y_s = f + (sigma_s alpha_t) / (alpha_s sigma_t) (y_t - f) [B, ...]."""
    kept = s * schedule.alpha(t) / (schedule.alpha(s).clamp_min(1e-12) * t)
    return f + expand(kept, f) * (y - f)


def plan(setup: Setup) -> Plan:
    """The student alone, on noise."""
    settings, recipe = setup.settings, setup.recipe
    guidance = settings.guidance if setup.denoise.guidance == "cfg" else 1.0
    start = partial(initial_latents, scale=recipe.initial_noise_scale)
    learn = Boot(Grid(recipe, settings.own.solver_steps), settings.own.boundary, guidance, start)
    loss = on_data(lambda batch, update: (batch, batch.normal("latent")), partial(learn, setup.denoise), "boot")
    return one_phase(STUDENT, loss, settings, beside=1 + (1 if guidance == 1 else 2))


def check(host: Host, settings: Settings) -> None:
    """Raises OneStepError for a student of several steps."""
    steps = recipe_of(host, settings).steps
    if steps != 1:
        raise OneStepError(
            f"boot leads from pure noise to the picture in one step, and student_steps is {steps}: set it to 1, or "
            "choose dmd, tcd or pcm for several"
        )


METHOD = Method(
    name="boot",
    title="The teacher's trajectory from noise alone, step by step into one",
    paper="arXiv:2306.05544",
    forwards="5.6",
    plan=plan,
    settings=BootSettings,
    check=of_whole_range(check),
)
