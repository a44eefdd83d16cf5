"""Adapter guidance distillation (AGD, arXiv:2503.07274): a dial of guidance in one forward, as a small adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...core.errors import OneStepError
from ..host import Host
from ..settings import Settings
from .guidance import GuidanceSettings, adapter, check_adapter, check_guided, guided, guided_recipe, scales
from .method import Method


@dataclass(frozen=True)
class DialSettings(GuidanceSettings):
    """The dial begins at 1, no guidance."""

    automatic: ClassVar[tuple[float, float] | None] = (1.0, 12.0)


def check(host: Host, settings: Settings) -> None:
    """Raises OneStepError where this checkpoint has no guidance to learn, or no place for an adapter."""
    check_guided(host, settings)
    if scales(settings)[0] < 1:
        raise OneStepError(
            f"guidance_low is {scales(settings)[0]:g}: an adapter's dial begins at 1, which is no guidance"
        )
    check_adapter(host, settings)


METHOD = Method(
    name="agd",
    title="Adapter guidance distillation: a guidance dial in one forward, as an adapter",
    paper="arXiv:2503.07274",
    forwards="2.2 + the trajectories",
    plan=lambda setup: guided(setup, conditioned=True),
    settings=DialSettings,
    adapter=adapter,
    recipe=guided_recipe,
    check=check,
    guidance_input=True,
)
