"""A run of one of several experts: within it, the host's schedule has the levels alone that the expert answers for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from ...core.errors import OneStepError
from ...core.families import FAMILIES
from ...core.recipe import Recipe
from ...core.schedule import FlowSchedule
from ..host import Host
from ..settings import Settings

WHOLE = (0.0, 1.0)


@contextmanager
def within_range(host: Host, settings: Settings) -> Iterator[None]:
    """Within, every level that is drawn, learnt at or stepped through lies in the run's noise_range. Raises
    OneStepError for a base that is no flow model."""
    levels, schedule = settings.noise_levels, host.denoiser.schedule
    _check_expert(host, settings)
    if levels == WHOLE:
        yield
        return
    if not isinstance(schedule, FlowSchedule):
        raise OneStepError(f"noise_range is for one of a flow model's experts, which {host.name} is not: set it to 0-1")
    host.denoiser.schedule = replace(schedule, sigma_min=levels[0], sigma_max=levels[1])
    try:
        yield
    finally:
        host.denoiser.schedule = schedule


def _check_expert(host: Host, settings: Settings) -> None:
    """Raises OneStepError for an expert of high noise, which has never seen a picture nearly clean, in the range of
    all. The other draws pictures by itself as well."""
    found = (told for name, told in FAMILIES[host.family].experts if re.search(name, host.name.lower()))
    own = next(found, "")
    if own.endswith("-1") and settings.noise_levels[0] == 0:
        low, _, _ = own.partition("-")
        raise OneStepError(f"{host.name[:80]} is one of two experts, for noise from {low} on: set noise_range to {own}")


def ended(host: Host, settings: Settings, recipe: Recipe) -> Recipe:
    """``recipe`` as a file has it: an expert's ends where its levels do, for the other to draw on. Raises OneStepError
    where its times are not this expert's."""
    low, high = (settings.noise_levels[at] * 1000 for at in (0, 1))
    if not low < min(recipe.timesteps) or max(recipe.timesteps) > high + 1e-6:
        raise OneStepError(
            f"the student's times {recipe.timesteps} do not lie within noise_range {settings.noise_range}: choose the "
            "initial LoRA of this expert, or the range of the other"
        )
    return replace(recipe, end=low)
