"""What the tests of the diffusers adapter share: noisy latents, and a role that changes something."""

from __future__ import annotations

import torch
from torch import Tensor

from onestep.pipelines.adapt import DiffusersHost

SIZE = (16, 16)
SIZES = {"qwen_image": (64, 64), "lumina2": (64, 64), "pixart": (40, 40)}
"""Of families whose pictures are no smaller."""


def noisy(host: DiffusersHost, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, *host.latent_shape(SIZES.get(host.family, SIZE)), dtype=dtype)


def with_student(host: DiffusersHost, role: str = "student", seed: int = 1) -> list[Tensor]:
    """The parameters of a role away from B = 0."""
    host.denoiser.roles.add(role, 2, seed)
    parameters = host.denoiser.roles.parameters(role)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.1 * torch.randn_like(parameter)
    return parameters
