"""How far apart two hosts may draw one picture, by float32's arithmetic alone."""

from __future__ import annotations

from typing import Any

import torch

from onestep.core.schedule import FlowSchedule

UNITS = 150
"""Of float32's 2^-23 of a prediction's std, between two orders of evaluating one network of some hundred layers: four
times the worst that was seen (38 on another processor, with a LoRA as strong as the base)."""


def between_hosts(schedule: Any, first: float | None = None) -> float:
    """The largest difference of two latents, as a share of their std, where sampling begins at the network's own time
    ``first`` (None: the noisiest).

    x0 = (x - sigma eps) / alpha: the rounding of eps, UNITS 2^-23, comes out 1 / alpha as large, 2.7 times at the
    automatic start of a student of one step and 15 times at the noisiest level of Stable Diffusion. Flow, with
    x0 = x - sigma v, divides by nothing.
    """
    sigma = torch.tensor(schedule.sigma_max, dtype=torch.float64)
    if first is not None:
        sigma = schedule.sigma_of_time(torch.tensor(first, dtype=torch.float64))
    divides = 1.0 if isinstance(schedule, FlowSchedule) else float(schedule.alpha(sigma))
    return UNITS * 2.0**-23 / divides
