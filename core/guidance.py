"""Negative prompts without a second pass: the negative text acts inside attention, on the picture's rows alone.

NASA: Negative-Away Steer Attention (arXiv:2412.02687). NAG: Normalized Attention Guidance (arXiv:2505.21179). VSF:
Value Sign Flip (arXiv:2508.10931). Perp: NAG whose negative is weighed apart from the prompt, and leaves it alone as in
Perp-Neg (arXiv:2304.04968). Z+ is what the picture's queries find in the positive text, Z- what the same queries find
in the negative text, Z0 what they find in the empty one; all act before the attention's output projection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import Partial, attention, merge, partial_attention
from ..kernels.steered import Steer, steered_attention
from ..kernels.steering import limited
from ..kernels.steering import nag as nag
from ..kernels.steering import nasa as nasa
from .errors import OneStepError
from .families import FAMILIES, STEERING
from .families.family import Numbers as Numbers

MODES = ("nasa", "nag", "vsf", "perp")
LAYERS = ("all", "decoder")


DEFAULTS = STEERING
"""By family and mode, what a Steering without numbers of its own is steered by.

NAG: its authors' pipelines and workflows for few-step SDXL, SD3.5-turbo, Flux and Wan. VSF: its authors' examples, who
have no U-Net; there it takes the tokens' share of attention. NASA: inside what its authors call safe for one step.
Z-Image, FLUX.2, Qwen-Image, Chroma, Krea 2, Anima and PixArt-Sigma, of which no authors have numbers, have Flux' scales
with each method's usual norm and offset, the last two VSF's of U-Nets, whose attention they have; nobody measured.
Perp: measured (benchmarks/results/negative-tiny.md).
"""
NEUTRAL = {"nasa": 0.0, "nag": 1.0, "perp": 1.0}
"""The scale at which a mode changes nothing, and below which it would steer towards the negative. VSF has none: at 0
the negative still takes its share of attention."""


def perp(
    positive: Tensor,
    negative: Tensor,
    empty: Tensor,
    scale: float,
    weight: float,
    keep: float,
    tau: float,
    alpha: float,
    order: float = 1,
) -> Tensor:
    """NAG from the empty text's Z0, where the negative has a weight n of its own and spares what it shares with the
    prompt. Z+, Z-, Z0: [B, H, N, D]. n = 1 and keep = 0 is NAG; at keep = 1 what they share is left alone, as in
    Perp-Neg; above it, the prompt gains there."""
    wide, least = torch.promote_types(positive.dtype, torch.float32), 8 * torch.finfo(positive.dtype).eps
    z, other, zero = (found.to(wide) for found in (positive, negative, empty))
    # a = Z+ - Z0,   b = Z- - Z0,   b' = b - keep max(0, <a, b>) / |a|^2 a, over a head's width
    a, b = z - zero, other - zero
    b = b - keep * _shared(a, b, least * z) * a
    # Z~ = Z+ + (s - 1) (a - n b') = s G
    g = z / scale + (1 - 1 / scale) * (a - weight * b)
    return limited(z, g, scale, tau, alpha, order).to(positive.dtype)


def vsf(positive: Partial, negative: Partial, scale: float, offset: float) -> Tensor:
    """One softmax over the keys of both, where the negative's scores lose ``offset`` and V- := -s V-."""
    return merge(positive, negative.shifted(-offset).scaled(-scale))


class Streams(NamedTuple):
    """Queries, keys, values or outputs of joint attention, [B, H, N, D] each: two texts and one picture."""

    positive: Tensor
    negative: Tensor
    image: Tensor


@dataclass(frozen=True)
class Steering:
    """How a negative text pushes away.

    mode: "nasa", "nag", "vsf" or "perp". scale: NASA's a (0 = off), NAG's and Perp's s (1 = off), VSF's s. tau, alpha,
    order: NAG's and Perp's limit of the norm, blend and the norm's order. offset: what VSF takes from the negative's
    scores. None: the family's own, in `DEFAULTS`. layers: "all", or "decoder", which leaves a U-Net's encoder as it is:
    pictures keep their quality better, a word is kept away a little less (benchmarks/results/negative-tiny.md). weight,
    keep: of Perp's negative, beside the prompt's 1, and how far it spares what it shares with the prompt. OneStepError
    for a value out of range.
    """

    mode: str = "nasa"
    scale: float | None = None
    tau: float | None = None
    alpha: float | None = None
    order: float | None = None
    offset: float | None = None
    layers: str = "all"
    weight: float = 1.5
    keep: float = 2.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise OneStepError(f"no steering mode {self.mode!r:.40}: choose one of {', '.join(MODES)}")
        if self.layers not in LAYERS:
            raise OneStepError(f"steering's layers are {self.layers!r:.40}: choose one of {', '.join(LAYERS)}")
        for name, low, high, wanted in LIMITS:
            value = getattr(self, name)
            if value is None and name in Numbers._fields:
                continue
            least = NEUTRAL.get(self.mode, low) if name == "scale" else low
            if not (isinstance(value, int | float) and math.isfinite(value) and least <= value <= high):
                found = f"steering's {name} is {value!r:.40}"
                raise OneStepError(f"{found}: with {self.mode} it must lie in {least:g} to {high:g}. {wanted}")

    def of_family(self, family: str) -> Steering:
        """With every number: this one's own, else the family's. OneStepError where it has no such layers."""
        if self.layers != "all" and not (family in FAMILIES and FAMILIES[family].unet):
            raise OneStepError(
                f"steering's layers are {self.layers!r}, which only U-Nets have, and this is {family}: set layers=all"
            )
        usual = DEFAULTS[family][self.mode]._asdict()
        return replace(self, **{name: value for name, value in usual.items() if getattr(self, name) is None})

    @property
    def numbers(self) -> Numbers:
        """Of a steering whose numbers are all there, as `of_family` returns it."""
        return Numbers(*(getattr(self, name) for name in Numbers._fields))

    @property
    def neutral(self) -> bool:
        """Whether this steering changes nothing at all, so that a host need not take part."""
        return NEUTRAL.get(self.mode) == self.scale or (self.mode in ("nag", "perp") and self.alpha == 0)

    @property
    def wants_empty(self) -> bool:
        """Whether the empty text's tokens must follow the negative's."""
        return self.mode == "perp"

    @property
    def wants_padding(self) -> bool:
        """Whether the negative is padded as the prompt is. VSF's authors encode it without padding, each token of which
        would take its share of attention with its sign flipped."""
        return self.mode != "vsf"

    @property
    def wants_pooled(self) -> bool:
        """Whether a text's stream in SD3 and Flux is modulated by its own pooled text, as NAG's authors have it in
        ComfyUI and for Flux, or by the prompt's, as VSF's have it."""
        return self.mode != "vsf"

    def cross(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        negative: tuple[Tensor, Tensor],
        found: Tensor | None = None,
        empty: int = 0,
    ) -> Tensor:
        """Cross-attention of the picture to its text, steered. q: [B, H, N, D]. k, v: [B, H, L, D].

        negative: its keys and values, [B, H, M, D] each; the last ``empty`` of them are the empty text's. found: what a
        host has made of the positive instead, as a picture's prompt beside the text. Returns [B, H, N, D].
        """
        if self.mode in ("nasa", "nag") and found is None and not empty:
            scale, tau, alpha, order, _ = self.numbers
            return steered_attention(q, k, v, *negative, Steer(scale, self.mode == "nag", tau, alpha, order))
        if self.mode != "vsf":
            away = (attention(q, k, v) for k, v in texts(negative, empty))
            return self.apart(attention(q, k, v) if found is None else found, *away)
        plain, numbers = partial_attention(q, k, v), self.numbers
        steered = vsf(plain, partial_attention(q, *negative), numbers.scale, numbers.offset)
        # what is found beyond plain attention stays
        return steered if found is None else steered + (found - plain.out)

    def joint(
        self, q: Streams, k: Streams, v: Streams, rows: Tensor | None = None, empty: int = 0, filling: int = 0
    ) -> Streams:
        """Joint attention with one picture and its texts: the doubled network's, its picture's rows computed once.

        The picture sees the texts apart; each text sees itself and the picture. rows: [B] bool, which pictures are
        steered; None = all. The others see the positive text alone. empty: as in `cross`. filling: how many tokens,
        the last of the negative without the empty text, only fill it up: VSF, which flips a text's own tokens, hides
        them from the picture.
        """
        # All queries look at the picture's keys at once; the picture's and a text's, as neighbours, at that text's.
        queries = torch.cat((q.positive, q.image, q.negative), 2)
        first, image, last = q.positive.shape[2], q.image.shape[2], q.negative.shape[2] - empty
        of_positive, to_image, *of_away = _found(queries, k.image, v.image, [first, image, last, empty])
        own_positive, to_positive = _found(queries[:, :, : first + image], k.positive, v.positive, [first, image])
        (_, *negative), *others = texts((q.negative, k.negative, v.negative), empty)
        away = [(queries[:, :, first : first + image + last], *negative)]
        away += [(torch.cat((q.image, late), 2), *there) for late, *there in others]
        to_away, own_away = zip(*(_found(q, k, v, [image, k.shape[2]]) for q, k, v in away), strict=True)
        plain = to_image.joined(to_positive)
        if self.mode == "vsf":
            own = [part[:, :, : part.shape[2] - filling] for part in negative]
            away_alone = partial_attention(q.image, *own) if filling else to_away[0]
            steered = vsf(plain, away_alone, self.numbers.scale, self.numbers.offset)
        else:
            steered = self.apart(plain.out, *(merge(to_image, found) for found in to_away))
        if rows is not None:
            steered = torch.where(rows[:, None, None, None], steered, plain.out)
        of_texts = [merge(*parts) for parts in zip(of_away, own_away, strict=False)]
        return Streams(merge(of_positive, own_positive), torch.cat(of_texts, 2) if empty else of_texts[0], steered)

    def apart(self, positive: Tensor, negative: Tensor, empty: Tensor | None = None) -> Tensor:
        """NASA, NAG or Perp of Z+, Z- and, for Perp, Z0: [B, H, N, D] each."""
        scale, tau, alpha, order, _ = self.numbers
        if self.mode == "nasa":
            return nasa(positive, negative, scale)
        if self.mode == "nag":
            return nag(positive, negative, scale, tau, alpha, order)
        assert empty is not None  # hosts see to it, by wants_empty
        return perp(positive, negative, empty, scale, self.weight, self.keep, tau, alpha, order)


LIMITS = (
    ("scale", 0, 100, "NASA acts at 0.1 to 0.5, NAG at 2 to 8, VSF at 0.5 to 4, Perp at 10 to 30."),
    ("tau", 1, 100, "NAG's and Perp's limit of the norm; 2.5 to 3.5 is usual."),
    ("alpha", 0, 1, "NAG's and Perp's blend; 0.125 to 0.5 is usual."),
    ("order", 1, 2, "The order of NAG's and Perp's norm: 1 or 2."),
    ("weight", 0, 100, "Of Perp's negative; 1 to 3 is usual."),
    ("keep", 0, 100, "How much of what it shares with the prompt Perp's negative loses; 0 to 3 is usual."),
    ("offset", 0, 100, "What VSF takes from the negative's scores; 0 to 0.2 is usual."),
)


def texts(parts: tuple[Tensor, ...], empty: int) -> list[tuple[Tensor, ...]]:
    """``parts`` [..., M, D] of the negative and, where M ends with ``empty`` tokens of it, of the empty text."""
    split = [part.split([part.shape[-2] - empty, empty], -2) for part in parts]
    return list(zip(*split, strict=True))[: 2 if empty else 1]


def _shared(a: Tensor, b: Tensor, least: Tensor) -> Tensor:
    """<a, b> / |a|^2 [B, H, N, 1] over a head's width; 0 where it is negative, as nothing is shared there. It fades
    where a is shorter than ``least``, which is what rounding leaves of nothing."""
    square = torch.maximum((a * a).sum(3, keepdim=True), (least * least).sum(3, keepdim=True))
    return ((a * b).sum(3, keepdim=True) / square.clamp_min(torch.finfo(square.dtype).tiny)).clamp_min(0)


def _found(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> list[Partial]:
    """What queries find in keys, apart for the streams of these lengths that they are made of."""
    out, lse = partial_attention(q, k, v)
    return [Partial(*rows) for rows in zip(out.split(lengths, 2), lse.split(lengths, 2), strict=True)]
