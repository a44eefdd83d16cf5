"""What a student's pictures look like to its frozen base, and distances between two sets of such features.

Candidates for a measure that every model can have without a judge (benchmarks/measure.py ranks them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from onestep.core import randomness
from onestep.core.roles import TEACHER
from onestep.core.schedule import add_noise
from onestep.training.evaluation.measures import covariance, gaussian_frechet, kernel_distance
from onestep.training.watch.measures import patch_distance

SHARES = (0.05, 0.15, 0.3)
"""Of the model's time: the low noise levels at which the base looks."""


@contextmanager
def pooled_outputs(blocks: list[Any]) -> Iterator[list[Tensor]]:
    """Within, each of ``blocks`` leaves the mean and the deviation over its positions, [B, 2 C], in the list."""
    found: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        told = output[-1] if isinstance(output, tuple) else output  # a joint block answers (text, picture)
        flat = told.flatten(2).transpose(1, 2) if told.ndim == 4 else told
        found.append(torch.cat([flat.mean(1), flat.std(1)], 1).float())

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def look(host: Any, latents: Tensor, cond: Any, share: float, seed: int) -> tuple[list[Tensor], Tensor]:
    """What the base does to the latents [N, C, h, w] with noise at ``share`` of its time: per block [N, 2 C], and its
    answer less the latents, [N, C, h, w]. The noise is the same for every set of latents of one seed."""
    denoise, rows = host.denoiser, range(len(latents))
    sigma = denoise.schedule.sigma_at(torch.full((len(latents),), share, dtype=torch.float64))
    noise = randomness.normal(latents.shape[1:], seed, f"features {share}", 0, rows)
    x = add_noise(denoise.schedule, latents, noise, sigma)
    with pooled_outputs(host.blocks) as found, denoise.roles.use(TEACHER):
        x0 = denoise(x, sigma, cond)
    return found, x0 - latents


def of_latents(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """Distances of the latents [N, C, h, w] themselves that the watch does not have today."""
    flat = [side.flatten(1) for side in (student, teacher)]
    coarse = [avg_pool2d(side, 2) for side in (student, teacher)]
    return {
        "latents: patches of halves": patch_distance(*coarse),
        "latents: patches, twice differenced": patch_distance(fine(student), fine(teacher)),
        "latents: sliced, whole": sliced(*flat),
        "latents: frechet, 32 axes": frechet(*flat),
        "latents: energy": energy(*flat),
        "latents: kernel": kernel(*flat),
    }


def fine(x: Tensor) -> Tensor:
    """What its neighbours' mean leaves of each element."""
    return x - avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


# -- distances between features [N, F] of a student and of its teacher, drawn from the same prompts --------------------


def scaled(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """In units of the teacher's deviation, feature by feature, about its mean; float64."""
    a, b = student.double(), teacher.double()
    mean, deviation = b.mean(0), b.std(0).clamp_min(1e-6)
    return (a - mean) / deviation, (b - mean) / deviation


def frechet(student: Tensor, teacher: Tensor, width: int = 32) -> float:
    """Squared Frechet distance along the ``width`` first principal axes of both sets together, per axis."""
    a, b = scaled(student, teacher)
    both = torch.cat([a, b])
    axes = torch.linalg.svd(both - both.mean(0), full_matrices=False)[2][:width].T
    a, b = a @ axes, b @ axes
    return gaussian_frechet(a.mean(0), covariance(a), b.mean(0), covariance(b)) / a.shape[1]


def frechet_random(student: Tensor, teacher: Tensor, width: int = 16) -> float:
    """The same along ``width`` random axes."""
    a, b = scaled(student, teacher)
    axes = torch.randn(a.shape[1], width, dtype=torch.float64, generator=randomness.generator("feature axes"))
    a, b = a @ (axes / axes.norm(dim=0)), b @ (axes / axes.norm(dim=0))
    return gaussian_frechet(a.mean(0), covariance(a), b.mean(0), covariance(b)) / width


def frechet_diagonal(student: Tensor, teacher: Tensor) -> float:
    """Squared Frechet distance of independent Gaussians: (m_a - m_b)^2 + (s_a - s_b)^2, mean over features."""
    a, b = scaled(student, teacher)
    return float(((a.mean(0) - b.mean(0)).square() + (a.std(0) - b.std(0)).square()).mean())


def means(student: Tensor, teacher: Tensor) -> float:
    """Squared distance of the means alone, mean over features."""
    a, b = scaled(student, teacher)
    return float((a.mean(0) - b.mean(0)).square().mean())


def kernel(student: Tensor, teacher: Tensor) -> float:
    """KID's squared MMD; unbiased, so that it may be below 0."""
    return kernel_distance(*scaled(student, teacher))


def energy(student: Tensor, teacher: Tensor) -> float:
    """Energy distance 2 E|a - b| - E|a - a'| - E|b - b'|, without a sample's distance to itself."""
    a, b = scaled(student, teacher)
    within = [torch.pdist(side).mean() for side in (a, b)]
    return float(2 * torch.cdist(a, b).mean() - within[0] - within[1]) / a.shape[1] ** 0.5


def sliced(student: Tensor, teacher: Tensor, directions: int = 256) -> float:
    """Sliced Wasserstein-2."""
    a, b = scaled(student, teacher)
    axes = torch.randn(a.shape[1], directions, dtype=torch.float64, generator=randomness.generator("feature slices"))
    a, b = ((side @ (axes / axes.norm(dim=0))).sort(0).values for side in (a, b))
    return float((a - b).square().mean().sqrt())


def prompt_means(student: Tensor, teacher: Tensor, each: int = 4) -> float:
    """rms of each prompt's mean feature against the teacher's."""
    a, b = scaled(student, teacher)
    return float((a - b).unflatten(0, (-1, each)).mean(1).square().mean().sqrt())


def paired(student: Tensor, teacher: Tensor) -> float:
    """rms between the two pictures of one noise."""
    a, b = scaled(student, teacher)
    return float((a - b).square().mean().sqrt())


DISTANCES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "frechet, 32 axes": frechet,
    "frechet, 16 random axes": frechet_random,
    "frechet, diagonal": frechet_diagonal,
    "means": means,
    "kernel": kernel,
    "energy": energy,
    "sliced": sliced,
    "prompt means": prompt_means,
    "paired": paired,
}
