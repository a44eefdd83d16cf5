"""How to sample what was trained: written into a LoRA's header, read by loaders and samplers of both hosts."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import OneStepError
from ..families import FAMILIES
from ..schedule import NoiseSchedule, initial_noise_scale, k_sigma, log_snr, unstretched
from .checks import check_recipe, version_1

VERSION = 2


@dataclass(frozen=True)
class Recipe:
    """A few-step model's sampling.

    timesteps: the network's own times, noisiest first (an index for VP models, 1000 t for flow models).
    initial_noise_scale: standard deviation of the noise that enters at the first, in units of sqrt(alpha^2 + sigma^2)
    there; 1 is unit noise.
    log_snr: lambda = log(alpha / sigma) at each timestep; None stands for -inf (pure noise).
    sigmas: of each timestep, as k-diffusion and ComfyUI's SIGMAS count them (sigma / alpha, a flow model's own sigma);
    None stands for infinity.
    renoise: between steps, fresh noise on x0 (LCM, DMD2); otherwise deterministic, softened by eta in [0, 1] (TCD).
    guidance: classifier-free guidance scale; 1 is none. lora_scale: the strength to load the file at.
    sizes: (width, height) in pixels it was trained at. family: a name in `core.families.FAMILIES`.
    prediction: what the network answers where that is not the base's own habit ("sample" for SDXL-Lightning's one
    step).
    time_scale: the network is given floor(time_scale * time) in place of each time, at the same level (the timestep
    shift of NitroFusion, arXiv:2412.02030). shift: a flow model's, where the base's default does not hold.
    teacher_loras: what was stacked on the base as teacher.
    files: the name of the LoRA file of each step, beside this one (`step_files`); () is this one for all.
    end: the network's time to which the last step leads, where another of several experts draws on; 0 is the picture.
    """

    timesteps: tuple[float, ...]
    initial_noise_scale: float = 1.0
    log_snr: tuple[float | None, ...] = ()
    sigmas: tuple[float | None, ...] = ()
    renoise: bool = False
    eta: float = 0.0
    guidance: float = 1.0
    lora_scale: float = 1.0
    sizes: tuple[tuple[int, int], ...] = ()
    family: str = "unet"
    prediction: str | None = None
    time_scale: float = 1.0
    shift: float | None = None
    teacher_loras: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    end: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        check_recipe(self)

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def told(self) -> tuple[float, ...]:
        """The timesteps, by the name that they have in version 1's files and in code written against it."""
        return self.timesteps

    @property
    def of_base(self) -> Recipe:
        """These steps, of a network that answers and is given times as the base does."""
        return replace(self, prediction=None, time_scale=1.0)

    def levels(self, schedule: NoiseSchedule) -> Tensor:
        """sigma [steps] of the timesteps on ``schedule``, float64."""
        return schedule.sigma_of_time(torch.tensor(self.timesteps, dtype=torch.float64))

    def whole(self) -> Recipe:
        """Itself. Raises OneStepError for the recipe of one of several experts, which leads to no picture alone."""
        if self.end:
            raise OneStepError(
                f"this recipe ends at time {self.end:g}, where another of two experts draws on: draw with both, by "
                "onestep.pipelines.draw_by_experts or in ComfyUI by one One-Step Sample behind the other"
            )
        return self

    def end_level(self, schedule: NoiseSchedule) -> Tensor:
        """sigma of the end, float64."""
        return schedule.sigma_of_time(torch.tensor(self.end, dtype=torch.float64))

    def noise_scale_from(self, schedule: NoiseSchedule, sigma: Tensor) -> float:
        """The initial noise scale where its rules begin at another level ``sigma``: as ComfyUI's samplers begin there,
        if it begins as they do."""
        own = initial_noise_scale(schedule, self.levels(schedule)[0])
        alike = math.isclose(own, self.initial_noise_scale, rel_tol=1e-6)
        return initial_noise_scale(schedule, sigma) if alike else self.initial_noise_scale

    def retimed(self, timesteps: tuple[float, ...], initial_noise_scale: float) -> Recipe:
        """This recipe's rules at other ``timesteps``."""
        own: dict[str, Any] = {"log_snr": (), "sigmas": (), "files": (), "end": 0.0}
        return replace(self, timesteps=timesteps, initial_noise_scale=initial_noise_scale, **own)

    def at_strength(self, schedule: NoiseSchedule, strength: float) -> Recipe:
        """One step from ``strength`` times the first time, begun as this one begins: of a picture noised to there."""
        near = schedule.sigma_of_time(torch.tensor([strength * self.timesteps[0]], dtype=torch.float64))
        # of a table of times the nearest that the network was trained at, and the noise of that
        time = schedule.time_of_sigma(near)
        return self.retimed((float(time),), self.noise_scale_from(schedule, schedule.sigma_of_time(time)[0]))

    @classmethod
    def at(cls, schedule: NoiseSchedule, timesteps: Tensor, **more: Any) -> Recipe:
        """The recipe of ``timesteps`` [steps] on ``schedule``, begun with the noise that ComfyUI's samplers begin with
        there."""
        sigma = schedule.sigma_of_time(timesteps)
        return cls(
            tuple(timesteps.tolist()),
            initial_noise_scale(schedule, sigma[0]),
            tuple(None if level == -torch.inf else level for level in log_snr(schedule, sigma).tolist()),
            tuple(None if level == torch.inf else level for level in k_sigma(schedule, sigma).tolist()),
            **more,
        )

    @classmethod
    def for_student(
        cls,
        schedule: NoiseSchedule,
        steps: int,
        family: str,
        sizes: tuple[tuple[int, int], ...],
        start: float = 1.0,
        **more: Any,
    ) -> Recipe:
        """The recipe a student is trained at: ``steps`` trailing times from pure noise, fresh noise between them.

        start: the share of the model's time at which the first step begins. Below 1 the network is told a lower level,
        as DMD2 (time 399) and SiD (625) do: at a low alpha, eps-prediction multiplies every error by 1 / alpha.
        """
        shares = start * torch.arange(steps, 0, -1, dtype=torch.float64) / steps
        lower = schedule.time_of_sigma(schedule.sigma_at(shares))
        timesteps = unstretched(schedule).trailing(steps) if start == 1 else lower
        return cls.at(schedule, timesteps, renoise=steps > 1, family=family, sizes=sizes, **more)

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """A recipe of this version or an earlier one. Raises OneStepError for a text that is none."""
        try:
            found = json.loads(text)
            version = found.pop("version")
            values = {name: _frozen(value) for name, value in found.items()}
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise OneStepError(
                f"the LoRA's recipe cannot be read ({str(error)[:100]}): choose a preset by name instead"
            ) from error
        if type(version) is int and version == 1:
            values = version_1(values)
        elif type(version) is not int or version != VERSION:
            raise OneStepError(f"the recipe is of version {version!r:.20}: update OneStep, or choose a preset by name")
        unknown = sorted(set(values) - {entry.name for entry in fields(cls)})
        if unknown:
            raise OneStepError(
                f"the recipe holds unknown {str(unknown)[:100]}: update OneStep, or choose a preset by name"
            )
        if "timesteps" not in values:
            raise OneStepError("the LoRA's recipe names no timesteps: choose a preset by name instead")
        if (family := values.get("family", cls.family)) not in FAMILIES:
            raise OneStepError(f"the recipe is for {family!r:.40} models, which are not served: update OneStep")
        return cls(**values)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
