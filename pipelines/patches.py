"""Latents as rows of tokens, a patch each, and where the patches lie."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(x: Tensor, p: int = 2) -> Tensor:
    """[B, C, h, w] -> [B, h w / p^2, p^2 C]: a token for each p x p patch, its channels outermost."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // p**2, p**2 * c)


def unpack(tokens: Tensor, height: int, width: int, p: int = 2) -> Tensor:
    """The inverse of :func:`pack`, for latents of ``height`` x ``width``."""
    b, _, c = tokens.shape
    patches = tokens.reshape(b, height // p, width // p, c // p**2, p, p)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, c // p**2, height, width)


def positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """[rows columns, 3] of (0, row, column): where each patch lies."""
    lines = (torch.arange(count, dtype=torch.float32, device=device) for count in (rows, columns))
    row, column = torch.meshgrid(*lines, indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], -1).reshape(-1, 3)
