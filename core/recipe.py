"""How to sample what was trained: written into a LoRA's header, read by loaders and samplers of both hosts."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from .errors import OneStepError
from .schedule import NoiseSchedule, log_snr

VERSION = 1
FAMILIES = ("unet", "sd3", "flux")


@dataclass(frozen=True)
class KSampler:
    """The widgets of ComfyUI's KSampler that reproduce a recipe."""

    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """A few-step model's sampling.

    told: the network's own times, noisiest first (an index for VP models, 1000 t for flow models).
    fed: standard deviation of what enters at each step, in units of sqrt(alpha^2 + sigma^2) there; 1 is unit noise.
    log_snr: lambda = log(alpha / sigma) at each told time; None stands for -inf (pure noise).
    renoise: between steps, fresh noise on x0 (LCM, DMD2); otherwise deterministic, softened by eta in [0, 1] (TCD).
    guidance: classifier-free guidance scale; 1 is none. lora_scale: the strength to load the file at.
    sizes: (width, height) in pixels it was trained at. family: "unet", "sd3" or "flux".
    prediction: what the network answers where that is not the base's own habit ("sample" for SDXL-Lightning's one
    step).
    shift: a flow model's, where the base's default does not hold. teacher_loras: what was stacked on the base as
    teacher.
    """

    told: tuple[float, ...]
    fed: tuple[float, ...]
    log_snr: tuple[float | None, ...] = ()
    renoise: bool = False
    eta: float = 0.0
    guidance: float = 1.0
    lora_scale: float = 1.0
    sizes: tuple[tuple[int, int], ...] = ()
    family: str = "unet"
    prediction: str | None = None
    shift: float | None = None
    teacher_loras: tuple[str, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        if not 1 <= len(self.told) <= 64 or len(self.fed) != len(self.told):
            raise OneStepError(
                f"a recipe needs 1 to 64 steps with one fed level each, not {len(self.told)} and {len(self.fed)}"
            )
        if self.log_snr and len(self.log_snr) != len(self.told):
            raise OneStepError(f"a recipe of {len(self.told)} steps has {len(self.log_snr)} log-SNRs: give one each")
        self._check_numbers()
        if any(later >= earlier for earlier, later in zip(self.told, self.told[1:], strict=False)):
            raise OneStepError(f"a recipe's times must fall, noisiest first, not {_times(self.told)[:200]}")
        if self.family not in FAMILIES:
            raise OneStepError(f"a recipe is for one of {FAMILIES}, not {self.family!r:.40}")
        if not 0 <= self.eta <= 1:
            raise OneStepError(f"eta is {self.eta}: it must lie in 0 (deterministic) to 1 (fresh noise)")

    def _check_numbers(self) -> None:
        numbers = [
            *self.told,
            *self.fed,
            self.eta,
            self.guidance,
            self.lora_scale,
            *(side for s in self.sizes for side in s),
        ]
        numbers += [number for number in (*self.log_snr, self.shift) if number is not None]
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise OneStepError(f"a recipe holds {number!r:.40} where a finite number is needed")
        texts = [self.source, *self.teacher_loras, *([] if self.prediction is None else [self.prediction])]
        if not all(isinstance(text, str) for text in texts):
            raise OneStepError("a recipe's source, prediction and teacher_loras must be texts")

    @property
    def steps(self) -> int:
        return len(self.told)

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
        """The recipe a student is trained at: ``steps`` trailing times from unit noise, fresh noise between them.

        start: the share of the model's time that the first step is told. Below 1 the same unit noise is told as a lower
        level, as DMD2 (time 399) and SiD (625) do: at a low alpha, eps-prediction multiplies every error by 1 / alpha.
        """
        shares = start * torch.arange(steps, 0, -1, dtype=torch.float64) / steps
        lower = schedule.time_of_sigma(schedule.sigma_at(shares))
        times = schedule.trailing(steps) if start == 1 else lower
        levels = log_snr(schedule, schedule.sigma_of_time(times)).tolist()
        told, fed = tuple(times.tolist()), (1.0,) * steps
        lambdas = tuple(None if level == -torch.inf else level for level in levels)
        return cls(told, fed, lambdas, renoise=steps > 1, family=family, sizes=sizes, **more)

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Raises OneStepError for a text that is no recipe of a version this package knows."""
        try:
            found = json.loads(text)
            version = found.pop("version")
            values = {name: _frozen(value) for name, value in found.items()}
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise OneStepError(
                f"the LoRA's recipe cannot be read ({str(error)[:100]}): choose a preset by name instead"
            ) from error
        unknown = sorted(set(values) - {entry.name for entry in fields(cls)})
        if version != VERSION or unknown:
            raise OneStepError(
                f"the recipe is of version {version!r:.20} with unknown {str(unknown)[:100]}: "
                "update OneStep, or choose a preset by name"
            )
        try:
            return cls(**values)
        except OneStepError:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            raise OneStepError(
                f"the LoRA's recipe is incomplete ({str(error)[:100]}): choose a preset by name instead"
            ) from error

    def ksampler(self, schedule: NoiseSchedule) -> KSampler | str:
        """The KSampler widgets that reproduce this on a model of ``schedule``, or the reason why none can."""
        if self.prediction is not None:
            return f"the network answers {self.prediction!r} here, which needs ModelSamplingDiscrete before KSampler"
        if any(fed != 1 for fed in self.fed):
            return f"KSampler starts from unit noise, this recipe feeds {self.fed[0]:g}"
        trailing = tuple(schedule.trailing(self.steps).tolist())
        if any(abs(told - time) > 1e-3 for told, time in zip(self.told, trailing, strict=True)):
            return f"KSampler's schedulers give the times {_times(trailing)}, this recipe tells {_times(self.told)}"
        if 1000 % self.steps:
            # its table holds 1000 levels, and it rounds down where trailing spacing rounds to the nearest
            return f"KSampler's schedulers round {self.steps} steps otherwise; 1, 2, 4, 5 or 8 come out the same"
        if 0 < self.eta < 1:
            return f"no sampler of KSampler's has eta {self.eta:g}"
        sampler = "lcm" if self.steps > 1 and (self.renoise or self.eta == 1) else "euler"
        return KSampler(self.steps, self.guidance, sampler, "simple")


def _times(times: tuple[float, ...]) -> str:
    return ", ".join(f"{time:g}" for time in times)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
