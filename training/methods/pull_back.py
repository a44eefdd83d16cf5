"""Cotangents of what teacher and critic answer, on the student's x: one network's Jacobian product after another.

A graph is of one role and one condition, and gone before the next is made: no more is held at once than in the
student's own backward. The networks' weights and factors take no gradient, so that a base may be stored in 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ...core.cond import Cond
from ...core.denoiser import Denoiser
from ...core.schedule import expand
from .distribution_matching import Scores

Answer = tuple[str, Cond, Tensor]
"""(role, condition, cotangent of its answer [B, ...])."""


def pulled_back(denoise: Denoiser, scores: Scores, answers: Iterable[Answer]) -> Tensor:
    """alpha sum_i J_i^T c_i [B, ...] for answers D_i(x_s) with cotangents c_i and Jacobians J_i in x_s."""
    total = torch.zeros_like(scores.x_s)
    for role, cond, cotangent in answers:
        x_s = scores.x_s.detach().requires_grad_()
        with torch.enable_grad(), denoise.roles.use(role, train=False):
            (found,) = torch.autograd.grad(denoise(x_s, scores.sigma, cond), x_s, cotangent)
        total += found
    # x_s = alpha x + sigma n
    return expand(denoise.schedule.alpha(scores.sigma), total) * total
