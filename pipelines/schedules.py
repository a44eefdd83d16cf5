"""A diffusers scheduler as the contract's: what its network answers, and the noise schedule it was trained with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.errors import OneStepError
from ..core.families import FAMILIES
from ..core.schedule import FlowSchedule, NoiseSchedule, SizeShift, StepsShift, VPSchedule


def prediction_of(scheduler: Any) -> str:
    """ "epsilon", "v_prediction", "sample" or "flow"."""
    if _is_flow(scheduler):
        return "flow"
    if scheduler.config.get("timestep_type") == "continuous" or "EDM" in type(scheduler).__name__:
        raise OneStepError(
            f"the scheduler {type(scheduler).__name__} has EDM's noise levels (as CosXL's and Playground's), which are "
            "not supported yet: use a base of Stable Diffusion's own levels"
        )
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction", "sample") or "beta_schedule" not in scheduler.config:
        raise OneStepError(
            f"the scheduler {type(scheduler).__name__} with prediction_type {kind!r} is not known here: "
            "give the pipeline the scheduler its checkpoint was published with"
        )
    return str(kind)


def schedule_of(scheduler: Any, family: str | None = None, distilled: bool = False) -> NoiseSchedule:
    """The noise schedule that a network was trained with, from its scheduler's configuration. family: the network's,
    whose own it is where the scheduler leaves the shift to the pipeline. distilled: which has one shift for every size
    then, as Krea 2 Turbo's."""
    config = scheduler.config
    if _is_flow(scheduler):
        known = FAMILIES[family].schedule if family else None
        terminal = float(config.get("shift_terminal") or 0.0)
        if not (isinstance(known, FlowSchedule) and known.by_steps and config.get("use_dynamic_shifting", False)):
            return FlowSchedule(_shift(config), terminal=terminal)
        if isinstance(known.by_steps, StepsShift):
            return known
        if distilled:
            return FlowSchedule(known.shift, terminal=terminal)
        return replace(
            known, by_steps=_by_size(config, known.by_steps.tokens, FAMILIES[str(family)].largest), terminal=terminal
        )
    return VPSchedule.from_betas(_betas(config), zero_terminal=bool(config.get("rescale_betas_zero_snr", False)))


def schedule_in(pipe: Any, family: str) -> NoiseSchedule:
    """The same of a pipeline, which says whether its model is distilled, as one that is made of it does."""
    told = pipe.config
    return schedule_of(pipe.scheduler, family, bool(told.get("is_distilled", told.get("_is_distilled", False))))


def _by_size(config: Mapping[str, Any], tokens: int, largest: int) -> SizeShift:
    """Of a scheduler that leaves mu to its pipeline, which finds it by the picture's ``tokens``."""
    # where its class has no such entries, what diffusers' pipelines take
    ends = (("base", 256, 0.5), ("max", largest, 1.15))
    low, high = (
        (int(config.get(f"{end}_image_seq_len", length)), float(config.get(f"{end}_shift", shift)))
        for end, length, shift in ends
    )
    return SizeShift(tokens, low, high, config.get("time_shift_type", "exponential") != "exponential")


def _is_flow(scheduler: Any) -> bool:
    config = scheduler.config
    told = config.get("use_flow_sigmas", False) or config.get("prediction_type") in ("flow", "flow_prediction")
    return bool(told) or type(scheduler).__name__.startswith("FlowMatch")


def _shift(config: Mapping[str, Any]) -> float:
    """The factor by which steps move towards noise. Where it grows with the picture it is that of the largest."""
    if not config.get("use_dynamic_shifting", False):
        return float(config.get("shift", config.get("flow_shift", 1.0)))
    shift = float(config.get("max_shift", 1.15))
    return math.exp(shift) if config.get("time_shift_type", "exponential") == "exponential" else shift


def _betas(config: Mapping[str, Any]) -> Tensor:
    if config.get("trained_betas") is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    start, end, times = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    kind = config["beta_schedule"]
    if kind == "linear":
        return torch.linspace(start, end, times, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, times, dtype=torch.float64) ** 2
    if kind == "squaredcos_cap_v2":
        # arXiv:2102.09672, Eq. 17
        bar = torch.cos((torch.linspace(0, 1, times + 1, dtype=torch.float64) + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - bar[1:] / bar[:-1]).clamp_max(0.999)
    raise OneStepError(f"the beta schedule {kind!r} is not known here: use linear, scaled_linear or cosine betas")
