"""How ComfyUI's own nodes draw a recipe, without one of ours: KSampler's values, or sigmas for SamplerCustomAdvanced.

KSampler takes its levels from a scheduler. "simple" at N steps visits every (T / N)th of the model's T times, so that
KSampler (Advanced), which begins and ends at any of the N, reaches lower first levels than pure noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .recipe import Recipe
from .recipe.checks import MOST_STEPS
from .schedule import FlowSchedule, NoiseSchedule, VPSchedule, initial_noise_scale, k_sigma

USUAL_STEPS = 20  # KSampler's own default
FLOW_TIMES = 1000  # entries of ComfyUI's table of a flow model's sigmas (Flux: a multiple)
ZERO_TERMINAL = (1 / 4.8973451890853435e-08 - 1) ** 0.5
"""ComfyUI's sigma of a zero-terminal schedule's last time, which is infinite."""
SCHEDULER = "simple"


@dataclass(frozen=True)
class KSampler:
    """KSampler's widgets."""

    steps: int
    cfg: float
    sampler_name: str
    scheduler: str = SCHEDULER
    denoise: float = 1.0


@dataclass(frozen=True)
class KSamplerAdvanced:
    """KSampler (Advanced)'s widgets; without leftover noise it goes down to 0 in its last step, wherever that ends."""

    steps: int
    cfg: float
    sampler_name: str
    start_at_step: int
    end_at_step: int
    scheduler: str = SCHEDULER
    add_noise: str = "enable"
    return_with_leftover_noise: str = "disable"


@dataclass(frozen=True)
class ManualSigmas:
    """The widget of ManualSigmas, for SamplerCustomAdvanced, with KSamplerSelect's, and CFGGuider's where cfg is not
    1."""

    sigmas: str
    sampler_name: str
    cfg: float


@dataclass(frozen=True)
class CoreNodes:
    """ComfyUI's nodes that draw a recipe: the simplest, where its scheduler visits the recipe's levels, and the general
    ones; or the reason why there are none."""

    simple: KSampler | KSamplerAdvanced | None = None
    general: ManualSigmas | None = None
    reason: str = ""

    def __str__(self) -> str:
        first = [] if self.simple is None else [_ksampler_in_words(self.simple)]
        second = [] if self.general is None or isinstance(self.simple, KSampler) else [_sigmas_in_words(self.general)]
        return "; or ".join([*first, *second]) or self.reason


def core_nodes(recipe: Recipe, schedule: NoiseSchedule) -> CoreNodes:
    """What draws ``recipe`` on a model of ``schedule``."""
    if recipe.time_scale != 1:
        return CoreNodes(reason=f"the network is given {recipe.time_scale:g} of each time, which no node of core does")
    if recipe.prediction is not None:
        reason = f"the network answers {recipe.prediction!r} here, which needs ModelSamplingDiscrete before KSampler"
        return CoreNodes(reason=reason)
    if 0 < recipe.eta < 1:
        return CoreNodes(reason=f"no sampler of KSampler's has eta {recipe.eta:g}")
    levels = recipe.levels(schedule)
    scale = initial_noise_scale(schedule, levels[0])
    if not math.isclose(scale, recipe.initial_noise_scale, rel_tol=1e-6):
        return CoreNodes(
            reason=f"KSampler begins with {scale:.4g} of unit noise at time {recipe.timesteps[0]:g}, this recipe with "
            f"{recipe.initial_noise_scale:.4g}"
        )
    sigmas = k_sigma(schedule, levels).tolist()
    if recipe.end:
        return CoreNodes(general=_manual(recipe, sigmas, float(recipe.end_level(schedule))))
    return CoreNodes(_ksampler(recipe, schedule), _manual(recipe, sigmas))


def by_sigmas(recipe: Recipe) -> CoreNodes:
    """What draws a recipe that comes with its sigmas, whatever its base's schedule is."""
    return CoreNodes(general=_manual(recipe, [math.inf if sigma is None else sigma for sigma in recipe.sigmas]))


def same_sigmas(text: str, sigmas: Sequence[float | None]) -> bool:
    """Whether the widget's ``text`` holds these ``sigmas`` and one that closes them."""
    *own, _ = text.split(",")
    told = [ZERO_TERMINAL if sigma is None else sigma for sigma in sigmas]
    return all(math.isclose(float(one), other, rel_tol=1e-5) for one, other in zip(own, told, strict=True))


def usage_hint(recipe: Recipe, schedule: NoiseSchedule) -> str:
    """One line for a person: how the LoRA of ``recipe`` draws, in ComfyUI's own nodes where it does."""
    count = f"{recipe.steps} step{'s' * (recipe.steps > 1)}"
    core, strength = core_nodes(recipe, schedule), f" at strength {recipe.lora_scale:g}" * (recipe.lora_scale != 1)
    if core.reason:
        return (
            f"The LoRA draws in {count}. In ComfyUI: Load One-Step LoRA and One-Step Sample of OneStep ({core.reason})"
        )
    return f"The LoRA draws in {count}. In ComfyUI, with its own nodes: LoraLoaderModelOnly{strength}, then {core}"


def nearest_start(schedule: VPSchedule, sigma: float) -> float:
    """The time where one step of KSampler (Advanced) begins nearest to ``sigma`` (= sigma / alpha), at up to 20
    steps."""
    times = torch.cat([simple_times(schedule, steps) for steps in range(1, USUAL_STEPS + 1)])
    levels = k_sigma(schedule, schedule.sigma_of_time(times))
    return float(times[(levels.log() - math.log(sigma)).abs().argmin()])


def simple_times(schedule: NoiseSchedule, steps: int) -> Tensor:
    """The times [steps] of ComfyUI's scheduler "simple": sigmas[-(1 + int(x T / steps))] of a table of T."""
    table = schedule.times if isinstance(schedule, VPSchedule) else FLOW_TIMES
    index = torch.tensor([int(x * (table / steps)) for x in range(steps)], dtype=torch.float64)
    if isinstance(schedule, VPSchedule):
        return table - 1 - index
    return schedule.time_of_sigma(schedule.sigma_at(1 - index / table))


def _ksampler(recipe: Recipe, schedule: NoiseSchedule) -> KSampler | KSamplerAdvanced | None:
    """The fewest steps of "simple" that the recipe's times follow one another in."""
    wanted, sampler = torch.tensor(recipe.timesteps, dtype=torch.float64), _sampler(recipe)
    for steps, times in _grids(schedule, recipe.steps):
        for start in range(steps - recipe.steps + 1):
            if torch.allclose(times[start : start + recipe.steps], wanted, rtol=0, atol=1e-4):
                if start == 0 and steps == recipe.steps:
                    return KSampler(steps, recipe.guidance, sampler)
                return KSamplerAdvanced(steps, recipe.guidance, sampler, start, start + recipe.steps)
    return None


def _grids(schedule: NoiseSchedule, least: int) -> Iterator[tuple[int, Tensor]]:
    for steps in range(least, MOST_STEPS + 1):
        # tables of 1000 and of 10,000 entries (Flux) agree where the steps divide both
        if isinstance(schedule, VPSchedule) or (isinstance(schedule, FlowSchedule) and FLOW_TIMES % steps == 0):
            yield steps, simple_times(schedule, steps)


def _manual(recipe: Recipe, sigmas: list[float], end: float = 0.0) -> ManualSigmas:
    """With the closing 0, or an expert's end, to ten digits, which is more than float32 holds; never with an exponent,
    which ManualSigmas does not read."""
    finite = [min(sigma, ZERO_TERMINAL) for sigma in (*sigmas, *([end] if end else []))]
    texts = (f"{sigma:.{max(1, 10 - len(str(int(sigma))))}f}".rstrip("0").rstrip(".") for sigma in finite)
    return ManualSigmas(", ".join([*texts, *([] if end else ["0"])]), _sampler(recipe), recipe.guidance)


def _sampler(recipe: Recipe) -> str:
    return "lcm" if (recipe.steps > 1 or recipe.end) and (recipe.renoise or recipe.eta == 1) else "euler"


def _ksampler_in_words(node: KSampler | KSamplerAdvanced) -> str:
    name = "KSampler" if isinstance(node, KSampler) else "KSampler (Advanced)"
    return f"{name} with " + ", ".join(f"{widget} {_plain(value)}" for widget, value in asdict(node).items())


def _sigmas_in_words(node: ManualSigmas) -> str:
    guider = "BasicGuider" if node.cfg == 1 else f"CFGGuider at cfg {node.cfg:g}"
    return (
        f"RandomNoise, {guider}, KSamplerSelect {node.sampler_name} and ManualSigmas {node.sigmas} into "
        "SamplerCustomAdvanced"
    )


def _plain(value: float | str) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
