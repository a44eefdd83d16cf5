"""The scale k of classifier-free guidance in a matching loss, constant or drawn for each sample; and what it adds to
an answer, as it is or rescaled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.denoiser import TokenNorm, as_host
from ...core.schedule import expand
from ..engine.batch import Batch


@dataclass(frozen=True)
class RandomScale:
    """k ~ U[low, high], one for each sample: the same for teacher and critic (PG-SB, arXiv:2412.02687)."""

    low: float
    high: float

    def __call__(self, batch: Batch) -> Tensor:
        # k = low + (high - low) u
        return self.low + (self.high - self.low) * batch.uniform("guidance scale")


Scale = float | RandomScale


def scale_of(scale: Scale, batch: Batch) -> Tensor:
    """k [B] of a batch's samples, float64."""
    return scale(batch) if isinstance(scale, RandomScale) else torch.full((len(batch),), scale, dtype=torch.float64)


Tokens = tuple[TokenNorm, Tensor] | None
"""A denoiser's token_norm and the x that it was asked at, where it has one."""


def guided(d_c: Tensor, d_u: Tensor, k: Tensor, rescale: float = 0.0, tokens: Tokens = None) -> Tensor:
    """D^k = D_u + k (D_c - D_u) [B, ...] for k [B], as the host has it. rescale: phi, the share of it that is brought
    back to D_c's own deviation, against the saturation of a large k."""
    answer = d_u + expand(k, d_c) * (d_c - d_u)
    if tokens is not None:
        answer = as_host(*tokens, d_c, answer)
    if rescale == 0:
        return answer
    # arXiv:2305.08891, Eq. 15 and 16: phi D^k std(D_c) / std(D^k) + (1 - phi) D^k
    ratio = d_c.flatten(1).std(1) / answer.flatten(1).std(1).clamp_min(1e-12)
    return expand(rescale * ratio + (1 - rescale), answer) * answer


def added(d_c: Tensor, d_u: Tensor, k: Tensor, rescale: float = 0.0, tokens: Tokens = None) -> Tensor:
    """D^k - D_c [B, ...]: what guidance adds to an answer."""
    # without rescaling it is (k - 1) (D_c - D_u), which is 0 exactly at k = 1
    changed = rescale or tokens is not None
    return guided(d_c, d_u, k, rescale, tokens) - d_c if changed else expand(k - 1, d_c) * (d_c - d_u)
