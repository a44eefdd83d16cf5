"""Tokens of an attention as heads and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def heads(states: Tensor, attn: Any) -> Tensor:
    """[B, N, H D] -> [B, H, N, D]"""
    return states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def merged(states: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H D]"""
    return states.transpose(1, 2).flatten(2)


def normed(states: Tensor, norm: Any) -> Tensor:
    return states if norm is None else norm(states)


def normed_heads(states: Tensor, attn: Any, norm: Any) -> Tensor:
    """[B, N, H D] -> [B, H, N, D], normed by a head's channels, or by those of all heads at once as Wan does."""
    weight = getattr(norm, "weight", None)
    if weight is not None and weight.numel() == states.shape[-1]:
        return heads(norm(states), attn)
    return normed(heads(states, attn), norm)


def repeated(states: Tensor, batch: int) -> Tensor:
    """[n, ...] -> [batch, ...]: each of the n ``batch`` / n times in a row."""
    if len(states) == 1:
        return states.expand(batch, *states.shape[1:])
    return states.repeat_interleave(batch // len(states), 0)
