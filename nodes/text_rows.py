"""Texts of a batch that ComfyUI's network hands its blocks in one row, a row each again: adapters act by samples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def a_row_each(blocks: Iterable[nn.Module]) -> None:
    """By forward hooks of blocks that are called with the picture [B, N, C], then the texts [1, B L, C]."""
    for block in blocks:
        block.register_forward_pre_hook(_apart)


def _apart(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    picture, texts, *rest = args
    return picture, texts.reshape(len(picture), -1, texts.shape[-1]), *rest
