"""The rotary embedding of a network whose own op for it has no backward: by torch, through ComfyUI's hooks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core.families import FAMILIES
from .attention import differentiable_attention

Options = dict[str, Any]


def training_options(family: str) -> Options:
    """The transformer_options under which a network of ``family`` can be differentiated."""
    if not FAMILIES[family].fused_rotary:
        return {"optimized_attention_override": differentiable_attention}
    turned = TorchRotary()
    return {"optimized_attention_override": turned.attention, "patches": {"attn1_patch": [turned.take]}}


class TorchRotary:
    """``take`` keeps the angles of a self-attention from the network, which then norms its queries and keys and does
    not turn them; ``attention``, its very next call, turns them."""

    def __init__(self) -> None:
        self._angles: Tensor | None = None

    def take(self, q: Tensor, k: Tensor, v: Tensor, pe: Tensor | None = None, **told: Any) -> dict[str, None]:
        """An attn1_patch. pe: [1, S, 1, D / 2, 2, 2], the turn of each pair of channels D / 2 apart."""
        self._angles = pe
        return {"pe": None}

    def attention(self, kernel: Any, q: Tensor, k: Tensor, *rest: Any, **more: Any) -> Tensor:
        """An optimized_attention_override. q, k: [B, H, S, D] of a self-attention."""
        angles, self._angles = self._angles, None
        if angles is not None:
            q, k = turned(q, angles), turned(k, angles)
        return differentiable_attention(kernel, q, k, *rest, **more)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """[B, H, S, D] in x's dtype, float32 between.

    y_i = m_00 x_i + m_01 x_j,   y_j = m_10 x_i + m_11 x_j,   j = i + D / 2     (RoFormer, arXiv:2104.09864, Eq. 34)
    """
    turn = angles.transpose(1, 2)  # [1, 1, S, D / 2, 2, 2]
    first, second = x.to(turn.dtype).chunk(2, -1)
    return (turn[..., 0] * first[..., None] + turn[..., 1] * second[..., None]).movedim(-1, -2).flatten(-2).to(x.dtype)
