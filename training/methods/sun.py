"""Method sun as its settings make it: the student as it draws, the negative adapter, the segments, the loss, and the
pictures that the watch compares it with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...core.cond import Cond
from ...core.errors import OneStepError
from ...core.negative_adapter import NegativeAttention, heads_of, new_adapter
from ...core.recipe import Recipe
from ...core.sampling import sample
from ...core.schedule import expand
from ...core.tensor_file import read_header
from ..data.segments import Way, segments, watched_case
from ..engine.batch import Batch
from ..engine.inputs import recipe_of
from ..engine.prompts import Prompts, embed
from ..engine.student import STUDENT
from ..host import Host
from ..settings import Settings
from ..watch.measures import Kept, Reference, draw, watched
from .multi_step_consistency import MultiStepConsistency


def check_negatives(host: Host, settings: Settings) -> None:
    """Raises OneStepError where this checkpoint has no guidance or no cross-attention to learn by, and for a student
    that is guided."""
    if host.denoiser.guidance != "cfg":
        raise OneStepError(
            f"{host.name} has no trained null condition, so sun's teacher cannot be guided: choose a base that is "
            "drawn with guidance"
        )
    student_recipe(host, settings)
    roles = host.denoiser.roles
    new_adapter(roles.targets, host.family, heads_of(host.blocks, roles.targets), settings.seed)


def negative_adapter(host: Host, settings: Settings) -> NegativeAttention:
    """A new adapter for the host's network, whose keys and values are those of the student as it begins."""
    roles = host.denoiser.roles
    heads = heads_of(host.blocks, roles.targets)
    return new_adapter(roles.targets, host.family, heads, settings.seed, roles.state(STUDENT))


def student_recipe(host: Host, settings: Settings) -> Recipe:
    """How the student draws: as the initial LoRA's file says; without one, as the settings do."""
    if not settings.initial_lora:
        return recipe_of(host, settings)
    text = read_header(settings.initial_lora).metadata.get("onestep.recipe")
    if text is None:
        raise OneStepError("the initial LoRA does not say how it is sampled: give one that onestep distill has made")
    recipe = Recipe.from_json(text)
    if recipe.guidance != 1 or recipe.lora_scale != 1:
        raise OneStepError(
            f"the initial LoRA draws at guidance {recipe.guidance:g} and LoRA scale {recipe.lora_scale:g}: sun needs a "
            "student without guidance and at scale 1"
        )
    return recipe


def sun(host: Host, settings: Settings, prompts: Prompts, folder: Path) -> MultiStepConsistency:
    """The loss, and its segments in ``folder``/segments."""
    return MultiStepConsistency(segments(host, settings, prompts, folder, student_recipe(host, settings)).draw)


class Led:
    """What the loss asks the student for, as a `Denoiser`: G without a negative, moved so that its jump ends at y.

    J(x, D) = y = J(x, G) + (E_n - E_0), and J is linear in D by alpha_r - sigma_r alpha_t / sigma_t. both: prompt and
    negative of each of ``batch``.
    """

    def __init__(self, way: Way, batch: Batch, both: Cond) -> None:
        self.way, self.batch, self.both, of = way, batch, both, way.denoise
        self.schedule, self.roles, self.guidance = of.schedule, of.roles, of.guidance

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        with self.roles.use(STUDENT):
            x0 = self.way.denoise(x, sigma, cond)
        segment = int((self.way.levels[:-1] - sigma[0]).abs().argmin())
        lower = self.way.levels[segment + 1]
        slope = self.schedule.alpha(lower) - lower * self.schedule.alpha(sigma) / sigma
        return x0 + self.way.change(self.batch, self.both, x, x0, segment) / expand(slope, x)


def by_change(host: Host, settings: Settings, prompts: Prompts, folder: Path) -> Reference:
    """The watch's reference: the student's own pictures as its teacher's negatives would change them, and as they are
    without."""
    rows = watched(len(prompts), settings).tolist()
    found = {row: watched_case(prompts.texts, settings, row) for row in dict.fromkeys(rows)}
    texts = [text for case in found.values() for text in (case.prompt, case.negative, case.both)]
    size = prompts.sizes[0]
    alone = replace(settings, sizes=f"{size[0]}x{size[1]}")
    every = embed(host, texts, alone, folder / "embeddings").conds[size]
    at = 3 * torch.tensor([list(found).index(row) for row in rows])
    asked, negatives, both = every[at], every[at + 1], every[at + 2]
    way = Way(host.denoiser, settings, student_recipe(host, settings))

    @torch.no_grad()
    def make(host: Host, settings: Settings, batch: Batch, noise: Tensor) -> Kept:
        led = Led(way, batch, both[torch.tensor(list(batch.samples))].to(batch.device))
        x = sample(led, way.recipe, batch.cond, noise, lambda step: batch.normal(f"watch renoise {step}"))
        return {"x": x, "plain": draw(host, way.recipe, STUDENT, batch, noise, {})}

    return Reference(make, asked, negatives)
