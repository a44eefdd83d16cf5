"""The watch: a few numbers that say whether a student learns, far cheaper than judging its pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import unfold

from ..core import randomness
from ..core.recipe import Recipe
from ..core.sampling import sample
from .batch import Batch
from .host import Host
from .objectives.distribution_matching import Scores
from .pairs import teach
from .prompts import Prompts
from .settings import Settings

Numbers = dict[str, float]
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


@dataclass
class Watch:
    """Student against teacher on fixed prompts and fixed noise, in latents.

    distance: sliced Wasserstein between their 3x3 patches, 0 = same distribution of detail.
    content: rms of each prompt's mean picture against the teacher's, over the teacher's rms.
    variety: mean distance between pictures of one prompt, as a share of the teacher's.
    spread: standard deviation of all latents, as a share of the teacher's; above 1 is burnt, below 1 is dull.
    """

    batch: Batch
    noise: Tensor
    teacher: Tensor

    @classmethod
    def prepare(cls, host: Host, settings: Settings, prompts: Prompts, teacher: Tensor | None = None) -> Watch:
        """The fixed prompts and noise, with the teacher's latents on them (computed here, unless a run kept them)."""
        each = min(EACH, settings.watch_samples)
        count = settings.watch_samples // each
        rows = torch.linspace(0, len(prompts) - 1, count).round().long().repeat_interleave(each)
        batch = prompts.of(prompts.sizes[0], rows, -1, range(len(rows)))
        noise = randomness.normal(batch.shape, settings.seed, "watch", 0, range(len(rows)))
        if teacher is None:
            teacher = in_slices(host, batch, noise, lambda part, z: teach(host, settings, part, z))
        return cls(batch, noise, teacher)

    def __call__(self, host: Host, recipe: Recipe, role: str) -> Numbers:
        """The measures of ``role`` at ``recipe``."""
        return compare(self.student(host, recipe, role), self.teacher, min(EACH, len(self.noise)))

    def student(self, host: Host, recipe: Recipe, role: str) -> Tensor:
        """``role``'s latents on the watch's prompts and noise, [N, C, h, w] on the CPU."""
        return in_slices(host, self.batch, self.noise, lambda part, z: draw(host, recipe, role, part, z))


@torch.no_grad()
def draw(host: Host, recipe: Recipe, role: str, batch: Batch, noise: Tensor) -> Tensor:
    """``role``'s x0 by ``recipe`` from ``noise``."""
    with host.denoiser.roles.use(role):
        return sample(
            host.denoiser, recipe, batch.cond, noise, lambda step: batch.normal(f"watch renoise {step}"), batch.nulls()
        )


def in_slices(host: Host, batch: Batch, noise: Tensor, make: object) -> Tensor:
    """``make(batch, noise)`` in slices of at most 16 samples, joined on the CPU."""
    parts = []
    for rows in torch.arange(len(noise)).split(MICRO):
        host.poll()
        at = rows.to(batch.device)
        part = Batch(batch.cond[at], batch.null, batch.seed, batch.step, rows.tolist(), batch.shape, batch.device)
        parts.append(make(part, noise[rows].to(batch.device)).cpu())  # type: ignore[operator]
    return torch.cat(parts)


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
