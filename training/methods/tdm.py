"""TDM (arXiv:2503.06674) for students of several steps that draw along their own trajectory: each step is matched in
its own sub-interval of noise levels. Of one step it is dmd."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...core.recipe import Recipe
from ..engine.inputs import recipe_of
from ..engine.levels import WEIGHTS
from ..engine.setup import Setup
from ..engine.turns import Plan
from ..host import Host
from ..settings import Settings, setting
from .alternating import Extras, alternating
from .dmd import dmd
from .matching_settings import MatchingSettings, check_matching
from .method import Method
from .sub_interval import SubInterval


@dataclass(frozen=True)
class TdmSettings(MatchingSettings):
    """dmd's, with the sub-interval."""

    critic_weight: str = setting(
        "min-snr",
        "How the critic's error weighs over noise levels: by min(SNR, 5), as the paper has it, or as an error of v, of "
        "the noise (eps), of a flow model's velocity, of the picture (x0).",
        choices=tuple(WEIGHTS),
    )
    interval: str = setting(
        "step",
        "The noise levels that each step is matched at: its own, or all above its end.",
        choices=("step", "above"),
    )


def plan(setup: Setup) -> Plan:
    return alternating(setup, dmd, Extras(at_step=SubInterval(whole=setup.settings.own.interval == "above")))


def recipe(host: Host, settings: Settings) -> Recipe:
    """Deterministic: each step goes on from where the one before it has ended."""
    return replace(recipe_of(host, settings), renoise=False, eta=0.0)


METHOD = Method(
    name="tdm",
    title="Trajectory distribution matching, for several steps",
    paper="arXiv:2503.06674",
    forwards="8.2 + 3.6 a critic update + the steps before",
    plan=plan,
    settings=TdmSettings,
    check=check_matching,
    recipe=recipe,
)
