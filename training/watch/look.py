"""How far apart a student's pictures and its teacher's look to their frozen base: a distance that needs no judge.

The base answers both sets at `SHARE` of its time, with the same noise. Of each block's answer the deviation of each
channel over the picture is kept; the two sets' are compared by their energy distance, each feature in units of the
teacher's deviation. Of many candidates this orders students most as a judge of their pictures does
(benchmarks/results/measure.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.features import Deviations
from ...core.roles import TEACHER
from ...core.schedule import add_noise
from ..engine.batch import Batch
from ..host import Host

SHARE = 0.3
"""Of the base's time at which it looks."""


def looks(host: Host) -> Deviations:
    """Where the base is looked at."""
    roles = host.denoiser.roles
    return Deviations(roles.targets, host.blocks, roles.active_here)


@torch.no_grad()
def look(host: Host, at: Deviations, batch: Batch, latents: Tensor) -> list[Tensor]:
    """Of each block [B, channels], of ``latents`` [B, C, h, w] with the batch's own noise."""
    denoise = host.denoiser
    sigma = denoise.schedule.sigma_at(torch.full((len(latents),), SHARE, dtype=torch.float64))
    x = add_noise(denoise.schedule, latents, batch.normal("watch look"), sigma)
    with denoise.roles.use(TEACHER), at.kept(latents) as found:
        denoise(x, sigma, batch.cond)
    return found


def apart(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> float:
    """The root of the mean over blocks of the energy distance of features [N, F], each per root of F; 0 or more, and
    NaN where a feature is no number."""
    pairs = list(zip(student, teacher, strict=True))
    return math.sqrt(sum(_scaled(ours, theirs) for ours, theirs in pairs) / len(pairs))


def _scaled(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.double(), theirs.double()
    deviation = theirs.std(0).clamp_min(1e-6)
    return energy_distance(ours / deviation, theirs / deviation) / math.sqrt(ours.shape[1])


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| of features [N, F] and [M, F], of all pairs: never below 0, and 0 of
    equal sets (Szekely and Rizzo 2013, Eq. 2.5), NaN where a number is none; float64."""
    a, b = a.double(), b.double()
    found = 2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()
    return float(found.clamp_min(0))  # of rounding; Python's max(0, NaN) is 0
