"""Negative prompts without a second pass: the negative text acts inside attention, on the picture's rows alone.

NASA: Negative-Away Steer Attention (Nguyen et al. 2024, SNOOPI, eq. 7). NAG: Normalized Attention Guidance (Chen et al.
2025, eq. 6-9). VSF: Value Sign Flip (Guo & Shirkey 2025). Z+ is what the picture's queries q find in the positive text,
Z- what the same q find in the negative text; all act before the attention's output projection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import Partial, attention, merge, partial_attention
from .errors import OneStepError

MODES = {"nasa": 0.3, "nag": 5.0, "vsf": 1.0}
"""Each mode and a scale that is safe to begin with."""
NEUTRAL = {"nasa": 0.0, "nag": 1.0}
"""The scale at which a mode changes nothing. VSF has none: at 0 the negative still takes its share of attention."""


def nasa(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Z = Z+ - a Z-"""
    return torch.add(positive, negative, alpha=-scale)


def nag(positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float, order: float = 1) -> Tensor:
    """Z+, Z-: [B, H, N, D]. Norms are those of a token over all heads, of order 1 (ComfyUI) or 2 (the paper's code)."""
    # Z~ = s Z+ - (s - 1) Z-
    guided = torch.add(positive * scale, negative, alpha=-(scale - 1))
    # Z^ = min(r, tau) / r Z~,  r = |Z~| / |Z+|
    ratio = _norm(guided, order) / _norm(positive, order).clamp_min(1e-6)
    limited = guided * (ratio.clamp_max(tau) / ratio.clamp_min(1e-6)).to(guided.dtype)
    # Z = alpha Z^ + (1 - alpha) Z+
    return torch.lerp(positive, limited, alpha)


def vsf(parts: tuple[Partial, ...], negative: Partial, scale: float, offset: float) -> Tensor:
    """One softmax over the keys of all parts and the negative's, whose scores lose ``offset``: V- := -s V-."""
    return merge(*parts, negative.shifted(-offset).scaled(-scale))


class Streams(NamedTuple):
    """Queries, keys, values or outputs of joint attention, [B, H, N, D] each: two texts and one picture."""

    positive: Tensor
    negative: Tensor
    image: Tensor


@dataclass(frozen=True)
class Steering:
    """How a negative text pushes away.

    mode: "nasa", "nag" or "vsf". scale: NASA's a (0 = off), NAG's s (1 = off), VSF's s. tau, alpha, order: NAG's limit
    of the norm, its blend and the norm's order. offset: what VSF takes from the negative's scores.
    Raises OneStepError for a value out of range.
    """

    mode: str = "nasa"
    scale: float = MODES["nasa"]
    tau: float = 2.5
    alpha: float = 0.25
    order: float = 1
    offset: float = 0.1

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise OneStepError(f"no steering mode {self.mode!r:.40}: choose one of {', '.join(MODES)}")
        for name, low, high, wanted in LIMITS:
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and low <= value <= high):
                raise OneStepError(f"steering's {name} is {value!r:.40}: it must lie in {low:g} to {high:g}. {wanted}")

    @property
    def neutral(self) -> bool:
        """Whether this steering changes nothing at all, so that a host need not take part."""
        return NEUTRAL.get(self.mode) == self.scale or (self.mode == "nag" and self.alpha == 0)

    def cross(self, q: Tensor, k: Tensor, v: Tensor, negative: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-attention of the picture to its text, steered. q, k, v: [B, H, N, D]; negative: its keys and values."""
        if self.mode == "vsf":
            return vsf((partial_attention(q, k, v),), partial_attention(q, *negative), self.scale, self.offset)
        return self.apart(attention(q, k, v), attention(q, *negative))

    def joint(self, q: Streams, k: Streams, v: Streams, rows: Tensor | None = None) -> Streams:
        """Joint attention with one picture and two texts: the doubled network's, its picture's rows computed once.

        The picture sees both texts apart; each text sees itself and the picture. rows: [B] bool, which pictures are
        steered; None = all. The others see the positive text alone.
        """
        # All queries look at the picture's keys together, and at each text's keys apart.
        lengths = [q.positive.shape[2], q.negative.shape[2], q.image.shape[2]]
        of_positive, of_negative, image = _split(partial_attention(torch.cat(q, 2), k.image, v.image), lengths)
        own_positive, positive = _towards(q.positive, q.image, k.positive, v.positive)
        own_negative, negative = _towards(q.negative, q.image, k.negative, v.negative)
        if self.mode == "vsf":
            steered = vsf((positive, image), negative, self.scale, self.offset)
        else:
            steered = self.apart(merge(positive, image), merge(negative, image))
        if rows is not None:
            steered = torch.where(rows[:, None, None, None], steered, merge(positive, image))
        return Streams(merge(own_positive, of_positive), merge(own_negative, of_negative), steered)

    def apart(self, positive: Tensor, negative: Tensor) -> Tensor:
        """NASA or NAG of Z+ and Z-, [B, H, N, D] each."""
        if self.mode == "nasa":
            return nasa(positive, negative, self.scale)
        return nag(positive, negative, self.scale, self.tau, self.alpha, self.order)


LIMITS = (
    ("scale", 0, 100, "NASA acts at 0.1 to 0.5, NAG at 2 to 8, VSF at 0.5 to 4."),
    ("tau", 1, 100, "NAG's limit of the norm; 2.5 is usual."),
    ("alpha", 0, 1, "NAG's blend; 0.25 is usual."),
    ("order", 1, 2, "The order of NAG's norm: 1 or 2."),
    ("offset", 0, 100, "What VSF takes from the negative's scores; 0.1 is usual."),
)


def _towards(text: Tensor, image: Tensor, k: Tensor, v: Tensor) -> tuple[Partial, ...]:
    """What a text's own queries and the picture's find in that text."""
    return _split(partial_attention(torch.cat((text, image), 2), k, v), [text.shape[2], image.shape[2]])


def _split(found: Partial, lengths: list[int]) -> tuple[Partial, ...]:
    """The rows of several streams' queries, apart."""
    pieces = zip(found.out.split(lengths, 2), found.lse.split(lengths, 2), strict=True)
    return tuple(Partial(out, lse) for out, lse in pieces)


def _norm(z: Tensor, order: float) -> Tensor:
    """[B, 1, N, 1] in float32: a token's norm over its heads and their width."""
    return torch.linalg.vector_norm(
        z, order, dim=(1, 3), keepdim=True, dtype=torch.promote_types(z.dtype, torch.float32)
    )
