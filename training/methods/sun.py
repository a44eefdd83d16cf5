"""SpeedUpNet (SUN, arXiv:2312.08887): a negative prompt in one forward, as an adapter for a few-step student."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ...core.cond import Cond
from ...core.errors import OneStepError
from ...core.negative_adapter import NegativeAttention, heads_of, new_adapter
from ...core.recipe import Recipe
from ...core.sampling import sample
from ...core.schedule import expand
from ..data.cases import cases, watched_case
from ..data.segments import Segments
from ..engine.batch import Batch
from ..engine.inputs import recipe_of_student
from ..engine.prompts import embed
from ..engine.setup import Setup
from ..engine.student import STUDENT
from ..engine.turns import Plan, on_data, one_phase
from ..host import Host
from ..settings import Settings, need_steps, setting
from ..watch.measures import draw, watched
from ..watch.reference import Latents, Reference
from .method import Method, base_as_student
from .multi_step_consistency import MultiStepConsistency, Rollout


@dataclass(frozen=True)
class NegativeSettings:
    """Of sun."""

    negatives: str = setting(
        "", "What is learnt to be kept away from, parted by commas; empty = the parts of the prompts, parted so too."
    )
    push: float = setting(2.5, "How hard the teacher keeps away from a negative, in units of guidance.", 0.01, 30)
    segment_steps: int = setting(2, "Steps of the teacher for one of the student's.", 1, 64)

    def check(self, run: Settings) -> None:
        need_steps(run)

    @property
    def named(self) -> list[str]:
        """The negatives that are named."""
        return [part.strip() for part in self.negatives.split(",") if part.strip()]


def check(host: Host, settings: Settings) -> None:
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


def adapter(host: Host, settings: Settings) -> NegativeAttention:
    """A new adapter for the host's network, whose keys and values are those of the student as it begins."""
    roles = host.denoiser.roles
    heads = heads_of(host.blocks, roles.targets)
    return new_adapter(roles.targets, host.family, heads, settings.seed, roles.state(STUDENT))


def student_recipe(host: Host, settings: Settings) -> Recipe:
    """How the student draws: as the initial LoRA's file says; without one, as the settings do."""
    recipe = recipe_of_student(host, settings)
    if recipe.guidance != 1 or recipe.lora_scale != 1:
        raise OneStepError(
            f"the initial LoRA draws at guidance {recipe.guidance:g} and LoRA scale {recipe.lora_scale:g}: sun needs a "
            "student without guidance and at scale 1"
        )
    return recipe


def segments(setup: Setup) -> Segments:
    """The pool of a run in its folder, with its cases' texts embedded."""
    host, settings, prompts = setup.host, setup.settings, setup.prompts
    found = cases(prompts.texts, settings.own.named, settings)
    texts = [c.prompt for c in found] + [c.negative for c in found] + [c.both for c in found]
    every, count = embed(host, texts, settings, setup.folder / "embeddings"), len(found)
    alone, both = ({size: cond[at] for size, cond in every.conds.items()} for at in (slice(count), slice(-count, None)))
    negatives, rollout = every.conds[every.sizes[0]][count:-count], Rollout(setup.denoise, settings, setup.recipe)
    place = setup.folder / "segments"
    return Segments(host, replace(every, conds=alone), settings, place, rollout.levels, rollout.move, negatives, both)


def plan(setup: Setup) -> Plan:
    """The adapter learns on segments of the student's rollout."""
    pool, loss = segments(setup), partial(MultiStepConsistency(), setup.denoise)
    # the student's steps, and the teacher's with three texts and with two
    cost = setup.recipe.steps + 5.0 * setup.settings.own.segment_steps
    return one_phase(STUDENT, on_data(pool.draw, loss), setup.settings, pool.blocks, cost)


# -- what the watch compares with -------------------------------------------------------------------------------------


class Led:
    """What the loss asks the student for, as a `Denoiser`: G without a negative, moved so that its jump ends at y.

    J(x, D) = y = J(x, G) + (E_n - E_0), and J is linear in D by alpha_r - sigma_r alpha_t / sigma_t. both: prompt and
    negative of each of ``batch``.
    """

    def __init__(self, rollout: Rollout, batch: Batch, both: Cond) -> None:
        self.rollout, self.batch, self.both, of = rollout, batch, both, rollout.denoise
        self.schedule, self.roles, self.guidance, self.token_norm = of.schedule, of.roles, of.guidance, of.token_norm

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        with self.roles.use(STUDENT):
            x0 = self.rollout.denoise(x, sigma, cond)
        segment = int((self.rollout.levels[:-1] - sigma[0]).abs().argmin())
        lower = self.rollout.levels[segment + 1]
        slope = self.schedule.alpha(lower) - lower * self.schedule.alpha(sigma) / sigma
        return x0 + self.rollout.change(self.batch, self.both, x, x0, segment) / expand(slope, x)


def by_change(setup: Setup) -> Reference:
    """The student's own pictures as its teacher's negatives would change them, and as they are without."""
    host, settings, prompts = setup.host, setup.settings, setup.prompts
    rows = watched(len(prompts), settings).tolist()
    named = settings.own.named
    found = {row: watched_case(prompts.texts, named, settings.seed, row) for row in dict.fromkeys(rows)}
    texts = [text for case in found.values() for text in (case.prompt, case.negative, case.both)]
    size = prompts.sizes[0]
    one_size = replace(settings, sizes=f"{size[0]}x{size[1]}")
    every = embed(host, texts, one_size, setup.folder / "embeddings").conds[size]
    at = 3 * torch.tensor([list(found).index(row) for row in rows])
    cond, negatives, both = every[at], every[at + 1], every[at + 2]
    rollout = Rollout(setup.denoise, settings, setup.recipe)

    @torch.no_grad()
    def make(batch: Batch, noise: Tensor) -> Latents:
        led = Led(rollout, batch, both[torch.tensor(list(batch.samples))].to(batch.device))
        x = sample(led, rollout.recipe, batch.cond, noise, lambda step: batch.normal(f"watch renoise {step}"))
        return {"x": x, "plain": draw(host, rollout.recipe, STUDENT, batch, noise, {})}

    return Reference(
        make,
        cond,
        inputs=lambda latents, rows, like: {"negative": negatives[torch.tensor(rows)].to(like.device)},
        above=lambda host, latents, rows: [host.decode(latents["plain"][rows]), host.decode(latents["x"][rows])],
    )


METHOD = Method(
    name="sun",
    title="SpeedUpNet: a negative prompt in one forward, as an adapter",
    paper="arXiv:2312.08887",
    forwards="2.2 + the segment",
    plan=plan,
    settings=NegativeSettings,
    adapter=adapter,
    recipe=student_recipe,
    reference=by_change,
    check=check,
    note=base_as_student,
    adjustable=("steps",),  # which texts a segment is of depends on how many there are
)
