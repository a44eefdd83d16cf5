"""DI* (arXiv:2410.20898): score implicit matching towards the guided teacher, and more of a reward. The matching keeps
what a reward alone would lose. Its paper trains full weights of a one-step SDXL; here it is a LoRA, which as a rule
goes on from a student as initial_lora. Known by its abstract: the reward's weight is ours."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ...core.denoiser import Denoiser
from ..engine.batch import Batch
from ..engine.setup import Setup
from ..engine.turns import Plan
from ..host import Host
from ..settings import Settings, setting
from .alternating import alternating
from .distribution_matching import DistributionMatching, Jacobian, Scores
from .guidance_strategy import ScoreIdentitySettings, check_strategy, note_strategy
from .method import Method
from .rewards import RewardPull, reward_pull, rewards_of
from .score_identity import score_identity
from .sim import PseudoHuber


@dataclass(frozen=True)
class DiStarSettings(ScoreIdentitySettings):
    """sim's, and the reward."""

    huber: float = setting(
        5.4e-4,
        "The matching's constant c, in units of a picture's root of elements: differences below it weigh as their "
        "square.",
        1e-6,
        10,
    )
    reward: str = setting(
        "saturation, contrast",
        "What there is to be more of, several with commas, each times a number if you like (agreement, contrast*0.5): "
        "agreement = picture and prompt as the CLIP in reward_model sees them; saturation and contrast are guards, 0 "
        "for usual pictures and less for burnt ones; or one of your own, given to onestep.distill.",
    )
    reward_weight: float = setting(
        10.0,
        "Weight of the reward beside the matching, whose own gradient is of about length 1 for a picture; reward_pull "
        "among the run's numbers is the length of the reward's: 0.1 to 0.5 is much.",
        0,
        1_000_000,
    )
    reward_model: str = setting(
        "", "The folder of a CLIP of transformers (config.json, model.safetensors, its tokenizer), for agreement."
    )


@dataclass(frozen=True)
class Rewarded:
    """matching: the Jacobian terms of the matching. pull: of the reward."""

    matching: Jacobian
    pull: RewardPull

    def __call__(self, objective: DistributionMatching, denoise: Denoiser, batch: Batch, scores: Scores) -> Tensor:
        pull, numbers = self.pull(batch, scores.x)
        scores.told.update(numbers)
        return self.matching(objective, denoise, batch, scores) + pull


def di_star(settings: Settings, along: float, pull: RewardPull) -> DistributionMatching:
    """sim's, and the reward. along: how far the matching has come, 0 to 1."""
    made = score_identity(settings, along, 1.0, PseudoHuber(settings.own.huber))
    assert made.jacobian is not None
    return replace(made, jacobian=Rewarded(made.jacobian, pull))


def plan(setup: Setup) -> Plan:
    pull = reward_pull(setup)
    return alternating(setup, lambda settings, along: di_star(settings, along, pull))


def check(host: Host, settings: Settings) -> None:
    """Raises OneStepError for rewards that are not there."""
    rewards_of(settings, host.device.type == "meta")
    check_strategy(host, settings)


METHOD = Method(
    name="di-star",
    title="Score implicit matching with a reward of the decoded pictures",
    paper="arXiv:2410.20898",
    forwards="22.5 + 3.6 a critic update, its decoder among them",
    plan=plan,
    settings=DiStarSettings,
    check=check,
    note=note_strategy,
)
