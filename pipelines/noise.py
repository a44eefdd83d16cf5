"""The noise that a pipeline starts from, and takes between its steps."""

from __future__ import annotations

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..core.families import FAMILIES
from .adapt import DiffusersHost
from .call_values import check_latents
from .patches import pack, unpack

Generator = torch.Generator | list[torch.Generator] | None


class Noise:
    """Standard normal latents as the family's own pipeline would draw them, one batch a call."""

    def __init__(self, shape: tuple[int, ...], generator: Generator, host: DiffusersHost) -> None:
        self._shape, self._generator, self._host = shape, generator, host

    def start(self, latents: Tensor | None) -> Tensor:
        """Where a call begins: at ``latents``, standard normal of this shape, or at a fresh draw."""
        if latents is None:
            return self()
        return check_latents(latents, self._shape).to(self._host.device, torch.float32)

    def __call__(self, packed: bool = False) -> Tensor:
        """packed: in the order in which a scheduler that sees patches would."""
        height, width = self._shape[2:]
        known = FAMILIES[self._host.family]
        packed = packed and known.packed
        shape = pack(torch.empty(self._shape, device="meta"), known.patch).shape if packed else self._shape
        noise = randn_tensor(shape, generator=self._generator, device=self._host.device, dtype=self._host.network.dtype)
        return (unpack(noise, height, width, known.patch) if packed else noise).float()
