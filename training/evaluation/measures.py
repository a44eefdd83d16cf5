"""Distances between two sets of pictures, variety within one prompt, intervals, peak memory. Pure functions.

One distance is never enough: the Frechet distance sees means and covariances of a judge's features, the sliced
Wasserstein distance sees whole marginals of the pixels, and needs no judge.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...core import randomness

DIRECTIONS = 128
DRAWS = 200


@dataclass(frozen=True)
class Estimate:
    """A measure with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


# -- distances between distributions ----------------------------------------------------------------------------------


def frechet(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of two sets of features [N, F] and [M, F], each taken as a Gaussian; float64."""
    a, b = a.double(), b.double()
    return gaussian_frechet(a.mean(0), covariance(a), b.mean(0), covariance(b))


def gaussian_frechet(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Dowson and Landau 1982, Eq. 6), for means [F], covariances [F, F].

    tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2), whose matrix is symmetric: its eigenvalues are real, and never
    negative but by rounding.
    """
    root = symmetric_root(cov_a.double())
    cross = torch.linalg.eigvalsh(root @ cov_b.double() @ root).clamp_min(0).sqrt().sum()
    between = (mean_a.double() - mean_b.double()).square().sum()
    return max(0.0, float(between + cov_a.trace() + cov_b.trace() - 2 * cross))


def symmetric_root(matrix: Tensor) -> Tensor:
    """The positive square root of a symmetric positive semi-definite [F, F], by its eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def covariance(x: Tensor) -> Tensor:
    """[F, F] of [N, F], over N - 1."""
    centred = x - x.mean(0)
    return centred.T @ centred / max(1, len(x) - 1)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD of features [N, F] and [M, F], k(x, y) = (x y / F + 1)^3: KID (arXiv:1801.01401, Eq. 4)."""
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        k = kernel(x, x)
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def projected(x: Tensor, seed: int = 0, directions: int = DIRECTIONS) -> Tensor:
    """[N, directions] of [N, ...]: along fixed random unit vectors, the same for every set of one seed and width."""
    x = x.flatten(1).float()
    axes = torch.randn(x.shape[1], directions, generator=randomness.generator(seed, "directions"))
    return x @ (axes / axes.norm(dim=0))


def sliced_wasserstein(a: Tensor, b: Tensor, seed: int = 0, directions: int = DIRECTIONS) -> float:
    """Sliced Wasserstein-2 distance (arXiv:1310.0306) of two sets [N, ...] of equal count."""
    return sliced(projected(a, seed, directions), projected(b, seed, directions))


def sliced(a: Tensor, b: Tensor) -> float:
    """The same of sets already projected: in one dimension the best transport joins equal ranks."""
    return float((a.sort(0).values - b.sort(0).values).square().mean().sqrt())


# -- within one set ---------------------------------------------------------------------------------------------------


def variety(x: Tensor, each: int) -> Tensor:
    """[N / each]: mean distance between the pictures of one prompt, for x [N, ...] with ``each`` a prompt in a row.

    A distance is the root mean square over the elements. 0 for one picture a prompt.
    """
    groups = x.flatten(1).double().unflatten(0, (-1, each))
    if each < 2:
        return torch.zeros(len(groups), dtype=torch.float64)
    return torch.stack([torch.pdist(group).mean() for group in groups]) / x[0].numel() ** 0.5


def obeyed(chosen: Tensor, asked: Tensor) -> float:
    """Share of the classes [N] that are what was ``asked`` [N], where that is not -1 (nothing asked); nan for none."""
    known = asked >= 0
    return float((chosen[known] == asked[known]).double().mean())


# -- intervals --------------------------------------------------------------------------------------------------------


def bootstrap(
    statistic: Callable[[Tensor], float], prompts: int, each: int, seed: int = 0, draws: int = DRAWS
) -> Estimate:
    """``statistic(rows)`` of all rows, with the 95 % interval of redrawing prompts, ``each`` rows of one together.

    The normal interval, v -+ 1.96 sd of the redrawn values (Efron and Tibshirani 1993, ch. 12.4): sets redrawn with
    doubles lie farther apart than the real ones do, so that their quantiles would miss v itself.
    """
    rows = torch.arange(prompts * each).unflatten(0, (prompts, each))
    value = statistic(rows.flatten())
    generator = randomness.generator(seed, "bootstrap")
    redrawn = [statistic(rows[torch.randint(prompts, (prompts,), generator=generator)].flatten()) for _ in range(draws)]
    known = torch.tensor([found for found in redrawn if math.isfinite(found)], dtype=torch.float64)
    half = 1.96 * float(known.std()) if len(known) > 1 else math.nan
    return Estimate(value, value - half, value + half)


# -- memory -----------------------------------------------------------------------------------------------------------

PROC = Path("/proc/self")


def reset_peak(device: torch.device) -> None:
    """Start a new measurement of peak memory, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        (PROC / "clear_refs").write_text("5")  # Linux: VmHWM falls to what is in use now


def peak_bytes(device: torch.device) -> tuple[int, str]:
    """The most memory in use since :func:`reset_peak`, and what was counted; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "allocated on the GPU"
    try:
        lines = (PROC / "status").read_text().splitlines()
        found = next(line for line in lines if line.startswith("VmHWM:"))
        return int(found.split()[1]) * 1024, "resident in main memory"
    except (OSError, StopIteration):
        return _lifetime_peak()


def _lifetime_peak() -> tuple[int, str]:
    try:
        import resource
    except ImportError:  # Windows
        return 0, "not measured here"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "resident in main memory, since the start"
