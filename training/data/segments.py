"""SpeedUpNet's data: prompts with negatives, and what a negative changes on each segment of a student's way."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...core import randomness
from ...core.cond import Cond
from ...core.denoiser import Denoiser
from ...core.errors import OneStepError
from ...core.recipe import Recipe
from ...core.roles import TEACHER
from ...core.sampling import initial_latents, jump
from ...core.schedule import add_noise
from ..engine.batch import Batch
from ..engine.prompts import Prompts, Size, embed
from ..engine.student import STUDENT, level
from ..host import Host
from ..methods.multi_step_consistency import Moves, between, walked
from ..settings import Settings
from .pairs import Blocks

MOST = 512
"""Different cases of a run."""
EMPTY = 0.1
"""Share of cases with nothing to keep away from."""
SHARE = 0.75
"""Of a segment's time that the teacher walks; the first part is the student's own jump."""


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


def watched_case(texts: Sequence[str], settings: Settings, index: int) -> Case:
    """What a run's watch draws of the prompt at ``index``: without its last part, kept away from that; all of it, kept
    away from a part of another prompt, where it has but one; or kept away from one of the settings' negatives, which it
    is drawn without."""
    prompt, named = texts[index], given(settings)
    own = parts(prompt)
    every = named or list(dict.fromkeys(part for text in texts for part in parts(text)))
    pool = [part for part in every if part not in own]
    # its last part; or what is named, where it has all of that
    last = [at for at in range(1, len(own)) if own[at] in (named or own[-1:]) and own[at] not in own[:at]]
    if last and (not named or not pool):
        return Case(_first(prompt, own, last[-1]), own[last[-1]])
    if not pool:
        return Case(prompt, "")
    return Case(prompt, pool[int(randomness.integers(len(pool), settings.seed, "case watched", 0, [index])[0])])


def _first(prompt: str, every: Sequence[str], count: int) -> str:
    """The first ``count`` of a prompt's parts, cut out of the prompt itself, so that its commas and colons stay."""
    end = 0
    for part in every[:count]:
        end = prompt.index(part, end) + len(part)
    return prompt[:end]


def given(settings: Settings) -> list[str]:
    """The negatives that the settings name."""
    return [part.strip() for part in settings.negatives.split(",") if part.strip()]


def cases(texts: Sequence[str], settings: Settings) -> list[Case]:
    """The cases of a run, a function of its seed. Raises OneStepError where none has anything to keep away from."""
    negatives = given(settings)
    count = min(MOST, max(settings.pairs, len(texts)))
    found = [case(texts, negatives, settings.seed, index) for index in range(count)]
    if not any(case.negative for case in found):
        raise OneStepError(
            f"{len(texts)} prompts, {texts[0]!r:.60} the first, leave nothing to keep away from: give prompts of "
            "several parts, with commas between them, or say in negatives what is to be learnt"
        )
    return found


@dataclass(frozen=True)
class Way:
    """The student's way by its ``recipe`` without a negative, and what a negative would change on it."""

    denoise: Denoiser
    settings: Settings
    recipe: Recipe

    @property
    def levels(self) -> Tensor:
        """[steps + 1]: sigma of each step, and 0."""
        return torch.cat([self.recipe.levels(self.denoise.schedule), torch.zeros(1, dtype=torch.float64)])

    def start(self, batch: Batch, noise: Tensor, segment: int) -> tuple[Tensor, Tensor]:
        """(x, G) where the student begins its ``segment``."""
        denoise = self.denoise
        sigma = level(denoise, self.recipe, 0, batch)
        x = initial_latents(denoise.schedule, noise, sigma, self.recipe.initial_noise_scale)
        with denoise.roles.use(STUDENT):
            x0 = denoise(x, sigma, batch.cond)
            for step in range(1, segment + 1):
                sigma = level(denoise, self.recipe, step, batch)
                x = add_noise(denoise.schedule, x0, batch.normal(f"segment renoise {step}"), sigma)
                x0 = denoise(x, sigma, batch.cond)
        return x, x0

    def change(self, batch: Batch, both: Cond, x: Tensor, x0: Tensor, segment: int) -> Tensor:
        """E_n - E_0 of a ``segment`` that the student begins at x with the answer x0. both: prompt and negative."""
        denoise, settings, null = self.denoise, self.settings, batch.nulls()
        assert null is not None
        first, last = self.levels[segment : segment + 2]
        sigmas = between(denoise.schedule, first, last, SHARE, settings.segment_steps)
        # from the student's own jump
        start = jump(denoise.schedule, x, x0, first.expand(len(x)), sigmas[0].expand(len(x)))
        with denoise.roles.use(TEACHER):
            e_n = walked(denoise, start, sigmas, (batch.cond, null, both), settings.guidance, settings.push)
            e_0 = walked(denoise, start, sigmas, (batch.cond, null, batch.cond), settings.guidance, 0.0)
        return e_n - e_0


@dataclass
class Segments(Blocks):
    """Segments of the student's way without a negative, and where its negative would have them end.

    prompts: of the cases. negatives, both: the other texts of each case, in their order.
    """

    way: Way
    negatives: Cond
    both: dict[Size, Cond]
    stream = "segment"

    def draw(self, batch: Batch, update: int) -> tuple[Batch, Moves]:
        drawn, (x, end, segment, at) = self._take(batch, update)
        sigmas = self.way.levels
        negative = self.negatives[at.cpu()].to(drawn.device)
        return drawn, Moves(x, sigmas[segment.cpu()], sigmas[segment.cpu() + 1], end, negative)

    def _segment(self, block: int) -> int:
        """One for a block: its samples walk together."""
        return int(randomness.integers(self.way.recipe.steps, self.settings.seed, "segment", block, [0])[0])

    def _sides(self, block: int, kept: dict[str, Tensor]) -> tuple[Tensor, ...]:
        rows = range(self.settings.batch)
        at = torch.stack([self._prompt(block, row) for row in rows])
        return kept["x"], kept["end"], torch.full((len(rows),), self._segment(block)), at

    @torch.no_grad()
    def _make(self, block: int, micro: int) -> dict[str, Tensor]:
        noise, made = self._noise(block), []
        for rows, batch in self._slices(block, micro):
            at = torch.stack([self._prompt(block, row) for row in rows])
            both = self.both[self._size(block)][at].to(batch.device)
            made.append([side.cpu() for side in self._move(batch, both, noise[rows].to(batch.device), block)])
        x, end = (torch.cat(side) for side in zip(*made, strict=True))
        return {"x": x, "end": end}

    def _move(self, batch: Batch, both: Cond, noise: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """(x, y) of a block's segment."""
        segment, schedule = self._segment(block), self.host.denoiser.schedule
        x, x0 = self.way.start(batch, noise, segment)
        sigma, lower = (value.expand(len(x)) for value in self.way.levels[segment : segment + 2])
        # y = J(x, G) + (E_n - E_0)
        return x, jump(schedule, x, x0, sigma, lower) + self.way.change(batch, both, x, x0, segment)


def segments(host: Host, settings: Settings, prompts: Prompts, folder: Path, recipe: Recipe) -> Segments:
    """The pool of a run in ``folder``/segments, with its cases' texts embedded."""
    found = cases(prompts.texts, settings)
    texts = [c.prompt for c in found] + [c.negative for c in found] + [c.both for c in found]
    every, count = embed(host, texts, settings, folder / "embeddings"), len(found)
    asked, both = ({size: cond[at] for size, cond in every.conds.items()} for at in (slice(count), slice(-count, None)))
    negatives = every.conds[every.sizes[0]][count:-count]
    way = Way(host.denoiser, settings, recipe)
    return Segments(host, replace(every, conds=asked), settings, folder / "segments", way, negatives, both)
