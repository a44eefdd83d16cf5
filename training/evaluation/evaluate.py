"""How good LoRAs are beside their teacher: the same prompts and counts in every row, floors, intervals.

The teacher's pictures on one noise are what the others are compared with. All others (the teacher in one step, the
teacher once more, each LoRA) start from a second noise: the teacher's second row is then the floor of every distance.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...core import randomness
from ...core.cond import Cond
from ...core.denoiser import Denoiser
from ...core.errors import OneStepError
from ...core.factors import State
from ...core.guidance_adapter import with_guidance
from ...core.recipe import Recipe
from ...core.roles import TEACHER
from ...core.router import Router
from ...core.sampling import sample, teacher_sample
from ...core.step_roles import part_of
from ..host import Host
from .measures import peak_bytes, reset_peak
from .scores import Judge, Scores, look
from .table import Row, Table

EACH = 4
"""Pictures of one prompt: variety is measured among them."""
ROLE = "evaluated"


@dataclass(frozen=True)
class Student:
    """A LoRA or a guidance adapter to be measured. denoiser: where the network must be read otherwise than the host
    reads it. module: the adapter, which is told the guidance ``dial``. later: factors of the later steps, where each
    has its own, or of a router's other students."""

    name: str
    state: State
    recipe: Recipe
    denoiser: Denoiser | None = None
    module: Any = None
    dial: float = 1.0
    later: tuple[State, ...] = ()
    router: Router | None = None


@dataclass
class Plan:
    """What every row draws: ``count`` prompts, ``each`` pictures of one after the other."""

    host: Host
    prompts: list[str]
    cond: Cond
    null: Cond
    shape: tuple[int, ...]
    count: int
    each: int
    seed: int
    batch: int
    report: Callable[[int], None]

    @property
    def samples(self) -> int:
        return self.count * self.each

    def noise(self, stream: str) -> Tensor:
        """[N, C, h, w] standard normal."""
        return randomness.normal(self.shape, self.seed, f"evaluate {stream}", 0, range(self.samples))


def evaluate(
    host: Host,
    loras: Sequence[Student],
    prompts: Sequence[str],
    samples: int,
    reference: Tensor | None = None,
    judge: Judge | None = None,
    seed: int = 0,
    *,
    size: tuple[int, int],
    guidance: float = 4.0,
    teacher_steps: int = 25,
    batch: int = 32,
    report: Callable[[int], None] | None = None,
) -> tuple[Table, dict[str, Tensor]]:
    """The table, and each row's pictures [N, 3, H, W] in [0, 1] by its name.

    samples: pictures of every row, rounded down to whole prompts. reference: real pictures [M, 3, H, W] in [0, 1].
    report(n): n more pictures are drawn.
    """
    plan = _plan(host, prompts, samples, seed, size, batch, report or (lambda drawn: None))
    guidance = guidance if host.denoiser.guidance == "cfg" else 1.0
    drawn: list[tuple[Row, Tensor]] = []
    with host.denoiser.roles.installed(), torch.no_grad():
        for name, steps, stream in _teachers(teacher_steps):
            drawn.append(_drawn(plan, name, stream, steps, guidance, _teacher(plan, steps, guidance)))
        for student in loras:
            drawn.append(_student(plan, student))
    scored = _scored(plan, drawn, reference, judge)
    about = {
        "checkpoint": host.name,
        "pictures a row": plan.samples,
        "pictures a prompt": plan.each,
        "size": f"{size[0]}x{size[1]}",
        "seed": seed,
        "teacher's guidance": guidance,
        "real pictures": 0 if reference is None else min(len(reference), plan.samples),
        "judge": judge is not None,
        "device": str(host.device),
    }
    pictures = {row.name: images for row, images in drawn}
    return Table(scored, about, peak_bytes(host.device)[1]), pictures


def _plan(
    host: Host,
    prompts: Sequence[str],
    samples: int,
    seed: int,
    size: tuple[int, int],
    batch: int,
    report: Callable[[int], None],
) -> Plan:
    """The prompts in a seeded order, from the start again where there are too few."""
    if samples < 2:
        raise OneStepError(
            f"samples is {samples}: a distribution needs at least 2 pictures, 256 or more tell something"
        )
    each = min(EACH, samples)
    order = torch.randperm(len(prompts), generator=randomness.generator(seed, "evaluate prompts"))
    chosen = [int(order[row % len(prompts)]) for row in range(samples // each)]
    rows = torch.tensor(chosen).repeat_interleave(each)
    texts = [prompts[row] for row in rows.tolist()]
    cond, null = host.encode(list(prompts), size), host.encode([""], size, negative=True)
    return Plan(host, texts, cond[rows], null, host.latent_shape(size), len(chosen), each, seed, batch, report)


# -- drawing ----------------------------------------------------------------------------------------------------------

Draw = Callable[[Cond, Cond, Tensor, list[int]], Tensor]


def _teachers(steps: int) -> list[tuple[str, int, str]]:
    """(name, steps, noise) of the teacher's rows: what is compared with, the untrained one step, the floor."""
    return [
        (teacher_name(steps), steps, "first"),
        (teacher_name(1), 1, "second"),
        (f"{teacher_name(steps)}, another seed", steps, "second"),
    ]


def teacher_name(steps: int) -> str:
    """The name of the teacher's row."""
    return f"teacher, {steps} step{'s' * (steps > 1)}"


def _teacher(plan: Plan, steps: int, guidance: float) -> Draw:
    def draw(cond: Cond, null: Cond, noise: Tensor, rows: list[int]) -> Tensor:
        with plan.host.denoiser.roles.use(TEACHER):
            return teacher_sample(plan.host.denoiser, cond, null, noise, steps, guidance)

    return draw


def _student(plan: Plan, student: Student) -> tuple[Row, Tensor]:
    roles, recipe = plan.host.denoiser.roles, student.recipe.whole()
    for part, state in enumerate((student.state, *student.later)):
        scaled = {name: (a, b * recipe.lora_scale) for name, (a, b) in state.items()}
        roles.load(part_of(ROLE, part), scaled, plan.host.device)
    if student.later:
        roles.steps.split(ROLE, student.router or recipe.timesteps)
    if student.module is not None:
        roles.add_module(ROLE, student.module.to(plan.host.device))

    def draw(cond: Cond, null: Cond, noise: Tensor, rows: list[int]) -> Tensor:
        cond = cond if student.module is None else with_guidance(cond, student.dial)

        def fresh(step: int) -> Tensor:
            return randomness.normal(plan.shape, plan.seed, f"evaluate renoise {step}", 0, rows).to(noise)

        with roles.use(ROLE, train=False):
            return sample(student.denoiser or plan.host.denoiser, recipe, cond, noise, fresh, null)

    try:
        return _drawn(plan, student.name, "second", recipe.steps, recipe.guidance, draw)
    finally:
        roles.drop(ROLE)


def _drawn(plan: Plan, name: str, stream: str, steps: int, guidance: float, draw: Draw) -> tuple[Row, Tensor]:
    """All pictures of a row, with what they cost."""
    host, noise = plan.host, plan.noise(stream)
    seconds, pictures = 0.0, []
    reset_peak(host.device)
    for rows in torch.arange(plan.samples).split(plan.batch):
        host.poll()
        cond = plan.cond[rows].to(host.device)
        began = time.monotonic()
        latents = draw(
            cond, cond.null_like(plan.null.to(host.device)), noise[rows].to(host.device), rows.tolist()
        ).cpu()
        seconds += time.monotonic() - began
        pictures.append(host.decode(latents))
        plan.report(len(rows))
    forwards = steps * (1 if guidance == 1 else 2)
    return Row(name, steps, forwards, seconds / plan.samples, peak_bytes(host.device)[0], {}), torch.cat(pictures)


# -- scoring ----------------------------------------------------------------------------------------------------------


def _scored(plan: Plan, drawn: list[tuple[Row, Tensor]], reference: Tensor | None, judge: Judge | None) -> list[Row]:
    seen = [look(images, judge, plan.seed) for _, images in drawn]
    real = None if reference is None else look(_as_many(reference, plan, drawn[0][1]), judge, plan.seed)
    scores = Scores(plan.count, plan.each, plan.seed, {} if judge is None else judge.asked(plan.prompts))
    return [replace(row, measures=scores(here, seen[0], real)) for (row, _), here in zip(drawn, seen, strict=True)]


def _as_many(reference: Tensor, plan: Plan, like: Tensor) -> Tensor:
    """As many real pictures as a row has, drawn at random; all of them where there are fewer."""
    if reference.shape[1:] != like.shape[1:]:
        raise OneStepError(
            f"the real pictures are {list(reference.shape[1:])}, the model draws {list(like.shape[1:])}: scale them"
        )
    order = torch.randperm(len(reference), generator=randomness.generator(plan.seed, "evaluate reference"))
    return reference[order[: plan.samples]]
