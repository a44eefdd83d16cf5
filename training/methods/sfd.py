"""SFD, score forgetting distillation (arXiv:2409.11219): score identity towards a teacher that is asked for something
else wherever a prompt names what is to be forgotten. The student and its critic are asked by the prompt as it is.

    L = E_keep l(D_T(x_s, c), D_F(x_s, c), x)  +  E_forget l(D_T(x_s, c'), D_F(x_s, c), x),     x = G(z, c)

l: the loss of `score_identity`. c': the prompt with ``instead`` in the place of ``forget``. Its authors' code has both
terms in each update, weighed alike on Stable Diffusion; here each sample is of one of them, with `forget_share`. What
the teacher makes for a warm start, the anchor and the watch is made under c' too. Its paper trains full weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...core.errors import OneStepError
from ..engine.prompts import Prompts, Replaced, embed
from ..host import Host
from ..settings import Settings, setting
from .alternating import alternating
from .distribution_matching import DistributionMatching, DmdWeight
from .guidance_strategy import ScoreIdentitySettings, check_strategy, note_strategy
from .method import Method
from .score_identity import score_identity


@dataclass(frozen=True)
class SfdSettings(ScoreIdentitySettings):
    """What is forgotten, and the loss's alpha."""

    forget: str = setting(
        "", "What is to be forgotten: words as prompts name it, several with commas (cat, cats, kitten)."
    )
    instead: str = setting(
        "", "What is drawn in its place: the words that the teacher reads there (dog); empty = the prompt without them."
    )
    forget_share: float = setting(
        0.5, "Share of the samples that are drawn of the prompts that name it; the others hold the rest.", 0.01, 0.99
    )
    alpha: float = setting(
        1.0,
        "How much of the scores' own distance is taken from the loss: 1 for text to image; the paper has 1.2 on small "
        "pictures without guidance.",
        -0.25,
        1.5,
    )


# -- prompts ----------------------------------------------------------------------------------------------------------


def words_of(settings: Settings) -> list[str]:
    """What is to be forgotten, longest first: of "cat" and "black cat" the longer one is taken out whole."""
    found = {" ".join(word.split()) for word in settings.own.forget.split(",")} - {""}
    return sorted(found, key=lambda word: (-len(word), word))


def pattern_of(settings: Settings) -> re.Pattern[str]:
    """Whole words, in any case, whatever blanks are between them."""
    every = "|".join(r"\s+".join(map(re.escape, word.split())) for word in words_of(settings))
    return re.compile(rf"(?<!\w)(?:{every})(?!\w)", re.IGNORECASE)


def in_its_place(text: str, settings: Settings) -> str:
    """The prompt that the teacher reads."""
    changed = pattern_of(settings).sub(lambda found: settings.own.instead.strip(), text)
    return " ".join(changed.split())


def check_texts(texts: Sequence[str], settings: Settings) -> None:
    """Raises OneStepError where nothing would be forgotten, or nothing held."""
    if not words_of(settings):
        raise OneStepError("sfd forgets what forget names, and forget is empty: give the words, as prompts have them")
    again = pattern_of(settings).search(settings.own.instead)
    if again:
        raise OneStepError(
            f"instead is {settings.own.instead[:60]!r}, which names {again[0]!r}, to be forgotten: give other words"
        )
    naming = sum(bool(pattern_of(settings).search(text)) for text in texts)
    told = ", ".join(repr(word) for word in words_of(settings))[:100]
    if not naming:
        raise OneStepError(
            f"none of the {len(texts)} prompts names {told}: nothing would be forgotten. Add some tens that do, in "
            "the words of forget"
        )
    if naming == len(texts):
        raise OneStepError(
            f"all of the {len(texts)} prompts name {told}: nothing would hold what stays. Add your usual prompts, "
            "which do not"
        )


def prompts(host: Host, settings: Settings, prompts: Prompts, folder: Path) -> Prompts:
    """Those that name it drawn with their share, and asked of the teacher otherwise."""
    pattern, own = pattern_of(settings), settings.own
    named = torch.tensor([bool(pattern.search(text)) for text in prompts.texts])
    by = embed(host, [in_its_place(text, settings) for text in prompts.texts if pattern.search(text)], settings, folder)
    naming, others = named.nonzero()[:, 0], (~named).nonzero()[:, 0]
    # n others and f n s / (1 - s) of the f that name it: each as often as another of its kind
    times = len(others) * own.forget_share / (1 - own.forget_share) / len(naming)
    repeats = (max(1, round(times)), 1) if times >= 1 else (1, max(1, round(1 / times)))
    drawn = torch.cat([naming.repeat(repeats[0]), others.repeat(repeats[1])])
    at = torch.where(named, named.cumsum(0) - 1, -1)
    return replace(prompts, drawn=drawn, replaced=Replaced(by, at))


# -- the method -------------------------------------------------------------------------------------------------------


def sfd(settings: Settings, along: float = 0.0) -> DistributionMatching:
    """sid's. along: how far the matching has come, 0 to 1."""
    own = settings.own
    return score_identity(settings, along, own.alpha, DmdWeight(own.normaliser_floor))


def note(settings: Settings) -> str:
    words, instead = ", ".join(words_of(settings)), settings.own.instead.strip()
    told = f"forgets {words[:80]}: " + (
        f"{instead[:60]} is drawn instead" if instead else "prompts are read without it"
    )
    return "; ".join(filter(None, (told, note_strategy(settings))))


METHOD = Method(
    name="sfd",
    title="Score forgetting distillation: another thing in the place of one that is taught away",
    paper="arXiv:2409.11219",
    forwards="16.2 + 3.6 a critic update",
    plan=lambda setup: alternating(setup, sfd),
    settings=SfdSettings,
    check=check_strategy,
    check_texts=check_texts,
    prompts=prompts,
    note=note,
)
