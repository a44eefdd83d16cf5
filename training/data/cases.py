"""Prompts with something to keep away from, as a run of negatives draws them from its prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...core import randomness
from ...core.errors import OneStepError
from ..settings import Settings

MOST = 512
"""Different cases of a run."""
EMPTY = 0.1
"""Share of cases with nothing to keep away from."""


@dataclass(frozen=True)
class Case:
    """A prompt and what it is to keep away from."""

    prompt: str
    negative: str

    @property
    def both(self) -> str:
        """The two as one text, as a person would add a word."""
        return f"{self.prompt}, {self.negative}" if self.negative else self.prompt


def parts(text: str) -> list[str]:
    """A prompt's parts, as commas and colons part them."""
    return [part for part in re.split(r"\s*[,:]\s+", text.strip(" ,:")) if part]


def case(texts: Sequence[str], negatives: Sequence[str], seed: int, index: int) -> Case:
    """The first parts of a prompt, one of them at least; and one of ``negatives``, else a part that this prompt has
    left out or that another one has."""

    def draw(high: int, what: str) -> int:
        return int(randomness.integers(high, seed, f"case {what}", 0, [index])[0])

    prompt = texts[draw(len(texts), "prompt")]
    every = parts(prompt) or [prompt]
    kept = 1 + draw(len(every), "parts")
    others = parts(texts[draw(len(texts), "other")])
    pool = list(negatives) or (every[kept:] if kept < len(every) and draw(2, "own") else others)
    pool = [part for part in pool if part not in every[:kept]]
    empty = not pool or float(randomness.uniform(seed, "case empty", 0, [index])[0]) < EMPTY
    return Case(_first(prompt, every, kept), "" if empty else pool[draw(len(pool), "negative")])


def watched_case(texts: Sequence[str], named: Sequence[str], seed: int, index: int) -> Case:
    """What a run's watch draws of the prompt at ``index``: without its last part, kept away from that; all of it, kept
    away from a part of another prompt, where it has but one; or kept away from one of the ``named`` negatives, which it
    is drawn without."""
    prompt = texts[index]
    own = parts(prompt)
    every = list(named) or list(dict.fromkeys(part for text in texts for part in parts(text)))
    pool = [part for part in every if part not in own]
    # its last part; or what is named, where it has all of that
    last = [at for at in range(1, len(own)) if own[at] in (named or own[-1:]) and own[at] not in own[:at]]
    if last and (not named or not pool):
        return Case(_first(prompt, own, last[-1]), own[last[-1]])
    if not pool:
        return Case(prompt, "")
    return Case(prompt, pool[int(randomness.integers(len(pool), seed, "case watched", 0, [index])[0])])


def _first(prompt: str, every: Sequence[str], count: int) -> str:
    """The first ``count`` of a prompt's parts, cut out of the prompt itself, so that its commas and colons stay."""
    end = 0
    for part in every[:count]:
        end = prompt.index(part, end) + len(part)
    return prompt[:end]


def cases(texts: Sequence[str], negatives: Sequence[str], settings: Settings) -> list[Case]:
    """The cases of a run, a function of its seed. negatives: those that the run names. Raises OneStepError where none
    has anything to keep away from."""
    count = min(MOST, max(settings.pairs, len(texts)))
    found = [case(texts, negatives, settings.seed, index) for index in range(count)]
    if not any(case.negative for case in found):
        raise OneStepError(
            f"{len(texts)} prompts, {texts[0]!r:.60} the first, leave nothing to keep away from: give prompts of "
            "several parts, with commas between them, or say in negatives what is to be learnt"
        )
    return found
