"""The watch: a few numbers that say whether a student learns, far cheaper than judging its pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import unfold

from ...core import randomness
from ...core.cond import Cond
from ...core.controls import Control, control_of
from ...core.recipe import Recipe
from ...core.sampling import sample
from ..data.pairs import teach
from ..engine.batch import Batch
from ..engine.prompts import Prompts
from ..host import Host
from ..methods.distribution_matching import Scores
from ..settings import Settings

Numbers = dict[str, float]
Kept = dict[str, Tensor]
"""x: the pictures that a student is compared with. Where it is told a control or negatives, plain: what it draws from
the watch's noise when it is not; control: that of x."""
EACH = 4
"""Pictures of one prompt: variety is measured among them."""
MICRO = 16


def score_metrics(scores: Scores) -> Numbers:
    """gap = rms(D_F - D_c) / rms(D_c - x); cos of the two; mean and standard deviation of the student's x."""
    numbers = {"x_mean": float(scores.x.mean()), "x_std": float(scores.x.std())}
    if scores.fake is None:
        return numbers
    delta, pull = scores.fake - scores.real, scores.real - scores.x
    cosine = torch.cosine_similarity(delta.flatten(1), pull.flatten(1)).mean()
    return numbers | {"gap": float(delta.norm() / pull.norm().clamp_min(1e-12)), "cos": float(cosine)}


def taught(host: Host, settings: Settings, batch: Batch, noise: Tensor) -> Kept:
    """The teacher's latents from the same noise."""
    return {"x": teach(host, settings, batch, noise)}


@dataclass(frozen=True)
class Reference:
    """What a student is compared with.

    make: (host, settings, a slice's prompts, the noise that the student draws from) -> what is kept of the slice.
    asked, negatives: what the student is asked for in place of the run's prompts, and told to keep away from, for each
    of the watch's samples.
    """

    make: Callable[[Host, Settings, Batch, Tensor], Kept] = taught
    asked: Cond | None = None
    negatives: Cond | None = None


Referee = Callable[[Host, Settings, Prompts, Path], Reference]
"""(host, settings, a run's prompts, the run's folder) -> what its student is compared with."""


def by_teacher(host: Host, settings: Settings, prompts: Prompts, folder: Path) -> Reference:
    """The teacher's pictures."""
    return Reference()


@dataclass
class Watch:
    """Student against teacher on fixed prompts and fixed noise, in latents.

    distance: sliced Wasserstein between their 3x3 patches, 0 = same distribution of detail.
    content: rms of each prompt's mean picture against the teacher's, over the teacher's rms.
    variety: mean distance between pictures of one prompt, as a share of the teacher's.
    spread: standard deviation of all latents, as a share of the teacher's; above 1 is burnt, below 1 is dull.

    A student that draws by a control has, for teacher, the pictures that its controls are of, and one with negatives
    what these are to make of its own pictures. Its distance is then the rms of what it misses (of the controls, or of
    the latents), as a share of what it misses when it is not told; and what is distance above is called detail.
    """

    batch: Batch
    noise: Tensor
    kept: Kept
    control: Control | None = None
    negatives: Cond | None = None

    @classmethod
    def prepare(
        cls,
        host: Host,
        settings: Settings,
        prompts: Prompts,
        kept: Kept | None = None,
        reference: Reference = Reference(),  # noqa: B008  (frozen)
    ) -> Watch:
        """The fixed prompts and noise, with what the student is compared with: by default the teacher's latents on
        them. Computed here, unless a run kept it."""
        rows = watched(len(prompts), settings)
        batch = prompts.of(prompts.sizes[0], rows, -1, range(len(rows)))
        if reference.asked is not None:
            batch = replace(batch, cond=reference.asked.to(batch.device))
        noise = randomness.normal(batch.shape, settings.seed, "watch", 0, range(len(rows)))
        if kept is None:
            kept = in_slices(host, batch, noise, lambda part, z: reference.make(host, settings, part, z))
        control = control_of(settings.control) if "control" in kept else None
        return cls(batch, noise, kept, control, reference.negatives)

    @property
    def teacher(self) -> Tensor:
        """The latents that the student is compared with, [N, C, h, w] on the CPU."""
        return self.kept["x"]

    def __call__(self, host: Host, recipe: Recipe, role: str) -> Numbers:
        """The measures of ``role`` at ``recipe``."""
        found = self.student(host, recipe, role)
        numbers = compare(found, self.teacher, min(EACH, len(self.noise)))
        if "plain" not in self.kept:
            return numbers
        missed, plain = (self._missed(host, x) for x in (found, self.kept["plain"]))
        # nothing to be told: no share of it is missed
        share = missed / plain if plain > 1e-6 else math.nan
        return numbers | {"detail": numbers["distance"], "distance": share}

    def _missed(self, host: Host, x: Tensor) -> float:
        """rms to what is asked for: of the latents, or of the controls of one picture of each prompt."""
        if self.control is None:
            return float((x - self.teacher).square().mean().sqrt())
        rows = range(0, len(x), min(EACH, len(x)))
        found = self.control(host.decode(x[rows]), rows)
        return float((found - self.kept["control"][rows]).square().mean().sqrt())

    def student(self, host: Host, recipe: Recipe, role: str) -> Tensor:
        """``role``'s latents on the watch's prompts and noise, told their controls or negatives, [N, C, h, w] on the
        CPU."""

        def drawn(part: Batch, z: Tensor) -> Kept:
            return {"x": draw(host, recipe, role, part, z, self._told(list(part.samples), z))}

        return in_slices(host, self.batch, self.noise, drawn)["x"]

    def _told(self, rows: list[int], like: Tensor) -> dict[str, Any]:
        """What the student's side is told for the samples ``rows``."""
        if self.negatives is not None:
            return {"negative": self.negatives[torch.tensor(rows)].to(like.device)}
        return {} if self.control is None else {"control": self.kept["control"][rows].to(like)}


def watched(prompts: int, settings: Settings) -> Tensor:
    """[N]: which of so many prompts the watch draws, `EACH` pictures of one after the other."""
    each = min(EACH, settings.watch_samples)
    return torch.linspace(0, prompts - 1, settings.watch_samples // each).round().long().repeat_interleave(each)


@torch.no_grad()
def draw(host: Host, recipe: Recipe, role: str, batch: Batch, noise: Tensor, told: Mapping[str, Any]) -> Tensor:
    """``role``'s x0 by ``recipe`` from ``noise``. told: what its side is told."""
    with host.denoiser.roles.use(role, **told):
        return sample(
            host.denoiser, recipe, batch.cond, noise, lambda step: batch.normal(f"watch renoise {step}"), batch.nulls()
        )


def in_slices(host: Host, batch: Batch, noise: Tensor, make: Callable[[Batch, Tensor], Kept]) -> Kept:
    """``make(batch, noise)`` in slices of at most 16 samples, joined on the CPU."""
    parts = []
    for rows in torch.arange(len(noise)).split(MICRO):
        host.poll()
        at = rows.to(batch.device)
        part = Batch(batch.cond[at], batch.null, batch.seed, batch.step, rows.tolist(), batch.shape, batch.device)
        parts.append(make(part, noise[rows].to(batch.device)))
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}


def compare(student: Tensor, teacher: Tensor, each: int) -> Numbers:
    """The watch's measures of latents [N, C, h, w], ``each`` of one prompt after the other."""
    centre = (student - teacher).unflatten(0, (-1, each)).mean(1).square().mean().sqrt()
    return {
        "distance": patch_distance(student, teacher),
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
