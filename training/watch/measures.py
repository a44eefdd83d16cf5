"""The watch: a few numbers that say whether a student learns, far cheaper than judging its pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import unfold

from ...core import randomness
from ...core.memory import Slices
from ...core.recipe import Recipe
from ...core.sampling import sample
from ..engine.batch import Batch
from ..engine.prompts import Tick, silent
from ..engine.setup import Setup
from ..engine.turns import Numbers
from ..host import Host
from ..settings import Settings
from .look import apart, look, looks
from .reference import Latents, Reference

EACH = 4
"""Pictures of one prompt: variety is measured among them."""


@dataclass
class Watch:
    """Student against teacher on fixed prompts and fixed noise, in latents.

    distance: how far apart they look to the frozen base (`look`), 0 = alike; of a base without blocks the detail.
    detail: sliced Wasserstein between their 3x3 patches, 0 = same distribution of detail.
    content: rms of each prompt's mean picture against the teacher's, over the teacher's rms.
    variety: mean distance between pictures of one prompt, as a share of the teacher's.
    spread: standard deviation of all latents, as a share of the teacher's; above 1 is burnt, below 1 is dull.

    Where there is a "plain" drawing to compare with, as a control's or a negative's student has it, distance is what
    the student misses of what it is asked for, as a share of what the plain drawing misses; where there are a person's
    "pictures", how far it looks from these, as a share of how far the plain drawing does.
    """

    batch: Batch
    noise: Tensor
    latents: Latents
    reference: Reference
    slices: Slices
    seen: list[Tensor] | None = None  # of what the distance is to, once it is looked at
    plain: float | None = None  # how far the plain drawing looks from it, once that is known

    @classmethod
    def prepare(
        cls,
        setup: Setup,
        reference: Reference,
        latents: Latents | None = None,
        tick: Tick = silent,
        slices: Slices | None = None,
        held_out: bool = False,
    ) -> Watch:
        """The fixed prompts and noise, with what the student is compared with: made here, unless a run has it. slices:
        in which pictures are drawn; of no more samples at once than a step with gradients takes, where they are not
        given. held_out: other noise, and other prompts where the run has more than the watch draws and the reference
        has none of its own."""
        prompts, settings = setup.prompts, setup.settings
        rows = watched(len(prompts), settings)
        if held_out and reference.cond is None:
            rows = others(len(prompts), rows)
        batch = prompts.of(prompts.sizes[0], rows, -2 if held_out else -1, range(len(rows)))
        if reference.cond is not None:
            batch = replace(batch, cond=reference.cond.to(batch.device))
        noise = randomness.normal(batch.shape, settings.seed, "held out" if held_out else "watch", 0, range(len(rows)))
        slices = slices or Slices(-(-settings.batch // settings.accumulation), "the watch's pictures")
        if latents is None:
            latents = in_slices(setup.host, batch, noise, reference.make, slices, tick)
        return cls(batch, noise, latents, reference, slices)

    @property
    def teacher(self) -> Tensor:
        """The latents that the student is compared with, [N, C, h, w] on the CPU."""
        return self.latents["x"]

    def __call__(self, host: Host, recipe: Recipe, role: str) -> Numbers:
        """The measures of ``role`` at ``recipe``."""
        return self.measured(host, self.student(host, recipe, role))

    def measured(self, host: Host, found: Tensor) -> Numbers:
        """The measures of a student's latents on the watch's prompts and noise."""
        numbers = compare(found, self.teacher, min(EACH, len(self.noise)))
        far = self.looked if self.by_look(host) else self.missed
        if "plain" not in self.latents:
            return numbers | ({"distance": far(host, found)} if self.by_look(host) else {})
        self.plain = far(host, self.latents["plain"]) if self.plain is None else self.plain
        # nothing to be asked for: no share of it is missed
        return numbers | {"distance": far(host, found) / self.plain if self.plain > 1e-6 else math.nan}

    def by_look(self, host: Host) -> bool:
        """Whether the distance is the base's look."""
        return ("plain" not in self.latents or "pictures" in self.latents) and len(looks(host)) > 0

    def looked(self, host: Host, found: Tensor) -> float:
        """How far a student's latents look from the teacher's, or from a person's pictures."""
        self.seen = self.seen or self.look(host, self.latents.get("pictures", self.teacher))
        return apart(self.look(host, found), self.seen)

    def missed(self, host: Host, found: Tensor) -> float:
        """What a student's latents miss of what it is asked for."""
        return self.reference.missed(host, self.latents, found)

    def look(self, host: Host, latents: Tensor) -> list[Tensor]:
        """Of each of the base's blocks [N, channels] on the CPU, of latents on the watch's prompts."""
        at = looks(host)

        def made(part: Batch, x: Tensor) -> Latents:
            return {f"{place}": value for place, value in enumerate(look(host, at, part, x))}

        return list(in_slices(host, self.batch, latents, made, self.slices).values())

    def student(self, host: Host, recipe: Recipe, role: str) -> Tensor:
        """``role``'s latents on the watch's prompts and noise, with its adapter's inputs, [N, C, h, w] on the CPU."""

        def drawn(part: Batch, z: Tensor) -> Latents:
            inputs = self.reference.inputs(self.latents, list(part.samples), z)
            return {"x": draw(host, recipe, role, part, z, inputs)}

        return in_slices(host, self.batch, self.noise, drawn, self.slices)["x"]


def watched(prompts: int, settings: Settings) -> Tensor:
    """[N]: which of so many prompts the watch draws, `EACH` pictures of one after the other."""
    each = min(EACH, settings.watch_samples)
    return torch.linspace(0, prompts - 1, settings.watch_samples // each).round().long().repeat_interleave(each)


def others(prompts: int, rows: Tensor) -> Tensor:
    """[N]: as `watched`, of the prompts that ``rows`` [N] leave out; where these are all, ``rows``."""
    left = sorted(set(range(prompts)) - set(rows.tolist()))
    each = min(EACH, len(rows))
    if not left:
        return rows
    at = torch.linspace(0, len(left) - 1, len(rows) // each).round().long().repeat_interleave(each)
    return torch.tensor(left)[at]


@torch.no_grad()
def draw(host: Host, recipe: Recipe, role: str, batch: Batch, noise: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """``role``'s x0 by ``recipe`` from ``noise``. inputs: its adapter's."""
    with host.denoiser.roles.use(role, **inputs):
        return sample(
            host.denoiser, recipe, batch.cond, noise, lambda step: batch.normal(f"watch renoise {step}"), batch.nulls()
        )


def in_slices(
    host: Host,
    batch: Batch,
    noise: Tensor,
    make: Callable[[Batch, Tensor], Latents],
    slices: Slices,
    tick: Tick = silent,
) -> Latents:
    """``make(batch, noise)`` in slices, joined on the CPU. tick: told after each slice."""

    def made(rows: list[int]) -> Latents:
        host.poll()
        at = torch.tensor(rows, device=batch.device)
        teachers = None if batch.teachers is None else batch.teachers[at]
        part = replace(batch, cond=batch.cond[at], samples=rows, teachers=teachers)
        found = {name: value.cpu() for name, value in make(part, noise[rows].to(batch.device)).items()}
        tick("pictures to compare with", rows[-1] + 1, len(noise))
        return found

    parts = slices(range(len(noise)), made)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def compare(student: Tensor, teacher: Tensor, each: int) -> Numbers:
    """The watch's measures of latents [N, C, h, w], ``each`` of one prompt after the other."""
    centre = (student - teacher).unflatten(0, (-1, each)).mean(1).square().mean().sqrt()
    detail = patch_distance(student, teacher)
    return {
        "distance": detail,
        "detail": detail,
        "content": float(centre / teacher.square().mean().sqrt()),
        "variety": variety(student, each) / max(variety(teacher, each), 1e-12),
        "spread": float(student.std() / teacher.std()),
    }


def patch_distance(a: Tensor, b: Tensor, directions: int = 128, most: int = 16384) -> float:
    """Sliced Wasserstein-2 distance (arXiv:1310.0306) between the 3x3 patches of two sets of latents of equal count."""
    patches = [unfold(side.float(), 3, padding=0).transpose(1, 2).flatten(0, 1) for side in (a, b)]
    step = max(1, len(patches[0]) // most)
    axes = torch.randn(patches[0].shape[1], directions, generator=randomness.generator("patch directions"))
    axes = axes / axes.norm(dim=0)
    first, second = ((side[::step] @ axes).sort(0).values for side in patches)
    return float((first - second).square().mean().sqrt())


def variety(x: Tensor, each: int) -> float:
    """Mean rms distance between pictures of one prompt."""
    groups = x.float().flatten(1).unflatten(0, (-1, each))
    return float(torch.stack([torch.pdist(group).mean() for group in groups]).mean()) if each > 1 else 0.0
