"""A negative text inside ComfyUI's attention: what its attn2_replace patches and its attention override call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ..core.errors import OneStepError
from ..core.guidance import Steering, Streams, texts

OVERRIDE = "optimized_attention_override"
"""ComfyUI's place for it in transformer_options."""
Attend = Callable[..., Tensor]


@dataclass
class Reached:
    """Whether a forward has reached an attention that is to be steered."""

    once: bool = False


@dataclass
class CrossPatch:
    """A U-Net block's attn2_replace. negative: keys and values [B, L, H D]. earlier: the patch that was there before.

    empty: how many of the negative's tokens, the last, are the empty text's. rows: [B] bool, which rows are steered;
    None = all.
    """

    steering: Steering
    negative: tuple[Tensor, Tensor]
    empty: int
    rows: Tensor | None
    reached: Reached
    earlier: Attend | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """q: [B, N, H D]; k, v: [B, L, H D]; options: ComfyUI's extra_options. Returns [B, N, H D]."""
        if len(q) != len(self.negative[0]):
            raise OneStepError(
                f"another patch on this MODEL makes {len(q)} pictures of {len(self.negative[0])} inside "
                "cross-attention, which Negative Steering cannot follow: take one of the two away"
            )

        heads, precision = options["n_heads"], options["attn_precision"]

        def look(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return optimized_attention(q, k, v, heads, attn_precision=precision, transformer_options=options)

        self.reached.once = True
        found = None if self.earlier is None else self.earlier(q, k, v, options)
        return steered(self.steering, look, (q, k, v), self.negative, self.empty, heads, self.rows, found)


def steered(
    steering: Steering,
    look: Attend,
    positive: tuple[Tensor, Tensor, Tensor],
    negative: tuple[Tensor, Tensor],
    empty: int,
    heads: int,
    rows: Tensor | None,
    found: Tensor | None = None,
) -> Tensor:
    """Cross-attention of ``positive`` (q, k, v), pushed away from ``negative`` (k, v); [B, N, H D] all.

    look: the host's attention of q, k, v. empty: as in CrossPatch. found: what an earlier patch made of ``positive``
    instead.
    """
    if steering.mode == "vsf":
        q, k, v, k_negative, v_negative = (_heads(part, heads) for part in (*positive, *negative))
        other = None if found is None else _heads(found, heads)
        pushed = _flat(steering.cross(q, k, v, (k_negative, v_negative), other))
        if rows is None:
            return pushed
        found = look(*positive) if found is None else found
    else:
        found = look(*positive) if found is None else found
        away = (look(positive[0], *text) for text in texts(negative, empty))
        # NAG's norm is a token's over all heads: one head of their whole width has the same
        each = heads if empty else 1
        pushed = _flat(steering.apart(*(_heads(z, each) for z in (found, *away))))
    return pushed if rows is None else torch.where(rows[:, None, None], pushed, found)


@dataclass
class JointAttention:
    """The attention override of a network whose texts and picture are one sequence: [text+, text-, image].

    lengths: of the two texts. image: the picture's tokens where the network also attends to them alone, else None.
    empty, rows: as in CrossPatch. earlier: the override that was there before; it keeps the calls that are not joint.
    filling: as in `Steering.joint`.
    """

    steering: Steering
    lengths: tuple[int, int]
    empty: int
    image: int | None
    rows: Tensor | None
    reached: Reached
    earlier: Attend | None
    filling: int = 0

    def __call__(
        self,
        attend: Attend,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **rest: Any,
    ) -> Tensor:
        """ComfyUI's attention: [B, L, H D], or [B, H, L, D] where a reshape is skipped, in and out."""
        length = k.shape[2 if skip_reshape else 1]
        if length == self.image:
            rest |= {"mask": mask, "skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
            return followed(self.earlier, attend)(q, k, v, heads, **rest)
        self._check(length, mask)
        self.reached.once = True
        sizes = [*self.lengths, length - sum(self.lengths)]
        q, k, v = (part if skip_reshape else _heads(part, heads) for part in (q, k, v))
        queries, keys, values = (Streams(*part.split(sizes, 2)) for part in (q, k, v))
        found = torch.cat(self.steering.joint(queries, keys, values, self.rows, self.empty, self.filling), 2)
        return found if skip_output_reshape else _flat(found)

    def _check(self, length: int, mask: Tensor | None) -> None:
        if mask is not None:
            raise OneStepError(
                "attention is masked (by a style model's strength in the positive, or by another patch), which "
                "Negative Steering does not serve: take that away, or sample without steering"
            )
        text = sum(self.lengths)
        if length <= text or self.image not in (None, length - text):
            raise OneStepError(
                f"attention has {length} tokens, {text} of them the texts' and {self.image or 'some'} expected of the "
                "picture: another patch adds tokens, which Negative Steering cannot follow; take one of the two away"
            )


@dataclass
class CrossOverride:
    """The attention override of a network whose context holds both texts: it tells their keys and values apart again.

    lengths, empty, rows, earlier: as in JointAttention. text_is_next: whether the next attention is one to the context.
    """

    steering: Steering
    lengths: tuple[int, int]
    empty: int
    rows: Tensor | None
    reached: Reached
    earlier: Attend | None
    text_is_next: bool = False

    def __call__(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, heads: int, **rest: Any) -> Tensor:
        """q: [B, N, H D]; k, v: [B, L, H D] of the texts, the video or reference pictures. Returns [B, N, H D]."""
        attention = followed(self.earlier, attend)

        def look(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, heads, **rest)

        reshaped = bool(rest.get("skip_reshape"))
        if not self.text_is_next or k.shape[2 if reshaped else 1] != sum(self.lengths):
            return look(q, k, v)
        if reshaped:
            rest = {name: value for name, value in rest.items() if name != "skip_reshape"}
            q, k, v = (_flat(part) for part in (q, k, v))
        self.reached.once = True
        (k, k_negative), (v, v_negative) = k.split(self.lengths, 1), v.split(self.lengths, 1)
        return steered(self.steering, look, (q, k, v), (k_negative, v_negative), self.empty, heads, self.rows)

    def before_self_attention(self, q: Tensor, k: Tensor, v: Tensor, **told: Any) -> dict[str, Any]:
        """ComfyUI's attn1_patch of a network that calls it before its attention."""
        self.text_is_next = False
        return {}

    def before_cross_attention(self, q: Tensor, k: Tensor, v: Tensor, **told: Any) -> dict[str, Any]:
        """ComfyUI's attn2_patch of a network that calls it before its attention."""
        self.text_is_next = True
        return {}

    def after_self_attention(self, told: dict[str, Any]) -> Tensor:
        """ComfyUI's attn1_patch of a video network."""
        self.text_is_next = True
        return told["x"]

    def after_cross_attention(self, told: dict[str, Any]) -> Tensor:
        """ComfyUI's attn2_patch of a video network."""
        self.text_is_next = False
        return told["x"]


def followed(earlier: Attend | None, attend: Attend) -> Attend:
    """``attend`` as the override that was there before has it."""
    return attend if earlier is None else lambda *args, **rest: earlier(attend, *args, **rest)


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, H D], or [B, L, H, D] as SD3 has its values -> [B, H, L, D]"""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """[B, H, L, D] -> [B, L, H D]"""
    return x.transpose(1, 2).flatten(2)
