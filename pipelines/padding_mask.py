"""diffusers' Cosmos network scales its padding mask by torchvision, which diffusers does not install."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers.models.transformers.transformer_cosmos as cosmos
from torch import Tensor
from torch.nn.functional import interpolate


def resize(picture: Tensor, size: list[int], interpolation: Any = None) -> Tensor:
    """[B, C, H, W] to ``size`` (height, width), each the nearest, as torchvision's of this name."""
    return picture if list(picture.shape[-2:]) == list(size) else interpolate(picture, size, mode="nearest")


def without_torchvision() -> None:
    """Where there is no torchvision, the network scales by torch, as it would by that."""
    if not hasattr(cosmos, "transforms"):
        kinds = SimpleNamespace(NEAREST="nearest")
        cosmos.transforms = SimpleNamespace(functional=SimpleNamespace(resize=resize), InterpolationMode=kinds)
