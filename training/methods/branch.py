"""Guidance learnt a branch at a time: of two answers that one loss is of, one graph at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.cond import Cond
from ...core.denoiser import Denoiser


class Branch:
    """A role's answer whose graph is made once the others' are gone, at a forward more. answer: a leaf, without it."""

    def __init__(self, denoise: Denoiser, role: str, x: Tensor, sigma: Tensor, cond: Cond) -> None:
        self.denoise, self.role, self.asked = denoise, role, (x, sigma, cond)
        with torch.no_grad(), denoise.roles.use(role):
            found = denoise(*self.asked)
        self.answer = found.detach().requires_grad_()

    def backward(self) -> None:
        """With what has come to the answer."""
        with self.denoise.roles.use(self.role):
            answer = self.denoise(*self.asked)
        answer.backward(self.answer.grad)
