"""WaDi (CVPR 2026, gudaochangsheng/WaDi): vsd of which student and critic are rotations of the base's weights
(`core.rotation_adapter`). Its authors found that what one-step students differ in from their base is direction, hardly
norm. The result is a LoRA of what the student has turned, which is less than that: the run says how much."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ...core.errors import OneStepError
from ...core.rotation_adapter import Rotation, turnable
from ..engine.setup import Setup
from ..engine.student import STUDENT
from ..engine.turns import Plan
from ..host import Host
from ..settings import Settings, setting
from .alternating import Extras, alternating
from .distribution_matching import CRITIC, DistributionMatching
from .matching_settings import (
    ApartSettings,
    CourseSettings,
    CriticSettings,
    Fitting,
    GuidanceSettings,
    LevelSettings,
    PairSettings,
    PictureSettings,
    WeightSettings,
    check_matching,
)
from .method import Method
from .vsd import vsd


@dataclass(frozen=True)
class WadiSettings(
    Fitting,
    PictureSettings,
    CourseSettings,
    LevelSettings,
    ApartSettings,
    CriticSettings,
    PairSettings,
    WeightSettings,
    GuidanceSettings,
):
    """vsd's, with the authors' guidance, critic and step sizes."""

    follow: ClassVar[float] = 0.0
    follow_after: ClassVar[str] = STUDENT
    diversity_anchor: ClassVar[float] = 0.0
    step_loras: ClassVar[bool] = False

    matching_guidance: float = setting(1.5, "Guidance of the teacher and of the critic; 1 = none.", 0, 30)
    critic_rank: int = setting(32, "Rank of the critic's angles; 0 = the student's.", 0, 512)
    critic_learning_rate: float = setting(1e-2, "Critic's step size; of angles it is far larger than of a LoRA.", 0, 1)
    export_rank: int = setting(
        128, "Rank of the LoRA that is made of the rotation; more holds more of it, and is a larger file.", 1, 512
    )


def wadi(settings: Settings, along: float = 0.0) -> DistributionMatching:
    """vsd; each role asked by itself, for its weights are its own. along: how far the matching has come, 0 to 1."""
    return replace(vsd(settings, along), apart=True)


def rotation(host: Host, settings: Settings, rank: int = 0) -> Rotation:
    """A new one of all that can be turned, of the run's rank where none is given."""
    targets, _ = turnable(host.denoiser.roles.targets.values())
    return Rotation(targets, rank or settings.rank, settings.seed, settings.own.export_rank)


def add_critic(setup: Setup) -> None:
    turned = rotation(setup.host, setup.settings, setup.settings.own.critic_rank)
    setup.denoise.roles.add_module(CRITIC, turned.to(setup.host.device))


def plan(setup: Setup) -> Plan:
    return alternating(setup, wadi, Extras(critic=add_critic))


def check(host: Host, settings: Settings) -> None:
    """Raises OneStepError as vsd's, for an initial LoRA, and for a base whose weights cannot be turned."""
    if settings.initial_lora:
        raise OneStepError(
            "wadi turns the base's own weights, and cannot begin as a LoRA: leave initial_lora empty, or choose vsd"
        )
    check_matching(host, settings)
    found, not_served = turnable(host.denoiser.roles.targets.values())
    if not_served:
        first = not_served[0]
        raise OneStepError(
            f"wadi turns the weights of linear layers, and {first.name[:80]} {first.why} ({len(not_served)} such "
            "layers): load the base in bf16 or fp16, as a diffusers folder where layers are fused, or choose vsd, "
            "which learns beside any base"
        )
    if not found:
        raise OneStepError(
            f"wadi turns linear layers, and targets {settings.targets!r} of {host.name[:80]} has none: choose other "
            "targets, or vsd"
        )


METHOD = Method(
    name="wadi",
    title="Variational score distillation by rotations of the weights",
    paper="WaDi, CVPR 2026",
    forwards="10.9 + 4.4 a critic update",
    plan=plan,
    settings=WadiSettings,
    adapter=rotation,
    exports=True,
    check=check,
)
