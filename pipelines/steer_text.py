"""The negative as steering takes it: tokens, padded as its mode wants them, and the pooled text; the empty text too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.cond import Cond
from ..core.errors import OneStepError
from ..core.guidance import Steering
from .encode import encode_text, pads_in_front
from .text import refuse_padding

Text = str | Sequence[str] | Tensor | Sequence[Tensor] | Cond


@dataclass(frozen=True)
class Away:
    """What a network is steered away from.

    tokens: [n, L, C] of an encoder; the last ``empty`` of them are the empty text's. lengths: how many of the others
    each row begins with, where rows have different numbers; None: all. pooled: [n or 1, P] of the negative and of the
    empty text; none where the prompt's modulates them too. first: the place of the negative's first token, where a
    family numbers them and the tokenizer pads in front.
    """

    tokens: Tensor
    empty: int = 0
    lengths: tuple[int, ...] | None = None
    pooled: tuple[Tensor, ...] = ()
    first: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def each(self, batch: int) -> list[int]:
        """Tokens of the negative of each of ``batch`` rows, without what fills it up and the empty text."""
        lengths = self.lengths or (self.tokens.shape[1] - self.empty,) * len(self)
        return [length for length in lengths for _ in range(batch // len(lengths))]

    def shortened(self, states: Tensor, length: int) -> Tensor:
        """[B, H, L, D] of rows with ``length`` tokens, without what fills them up; the empty text stays behind them."""
        return torch.cat([states[:, :, :length], states[:, :, states.shape[2] - self.empty :]], 2)

    def lengthened(self, states: Tensor, length: int) -> Tensor:
        """The same filled up again."""
        missing = self.tokens.shape[1] - self.empty - length
        filled = states.new_zeros(*states.shape[:2], missing, states.shape[3])
        return torch.cat([states[:, :, :length], filled, states[:, :, length:]], 2)


def alike(*numbers: Sequence[int]) -> list[tuple[Any, ...]]:
    """The rows that have the same of these ``numbers`` of each row, and those numbers."""
    each = list(zip(*numbers, strict=True))
    return [(torch.tensor([row for row, own in enumerate(each) if own == told]), *told) for told in sorted(set(each))]


def away_of(
    pipe: Any,
    network: Any,
    negative: Text,
    empty: Text | None,
    steering: Steering,
    width: int,
    pooled: int,
    tokens: int = 0,
) -> Away:
    """Texts are encoded as ``steering`` wants them. width, pooled: of the tokens and the pooled text that the network
    reads; tokens: of a padded text, where it numbers them. OneStepError for a text that it does not read."""
    negative, empty = _joined(negative), _joined(empty)
    told = not isinstance(negative, Tensor | Cond)
    found = _cond_of(pipe, negative, steering)
    _check(found, network, width, pooled, "negative")
    if not pooled:
        found = replace(found, pooled=None)
    if not steering.wants_empty or steering.neutral:
        cut = _cut(found, steering)
        return cut if steering.wants_padding or not pads_in_front(pipe) else _placed(cut, tokens)
    if empty is None and not told:
        raise OneStepError('perp measures from the empty text: give empty=..., "" encoded as the negative is')
    zero = _cond_of(pipe, "" if empty is None else empty, steering)
    _check(zero, network, width, pooled, "empty text")
    if len(zero) != 1:
        raise OneStepError(f"there are {len(zero)} empty texts: give one, [1, tokens, width]")
    return _with_empty(_cut(found, steering), _cut(zero, steering))


def _joined(text: Any) -> Any:
    """Z-Image's encode_prompt gives a tensor [L, C] for each text."""
    if isinstance(text, list) and text and all(isinstance(one, Tensor) and one.ndim == 2 for one in text):
        return Cond.concat([Cond(one[None]) for one in text])
    return text


def _cond_of(pipe: Any, text: Any, steering: Steering) -> Cond:
    if isinstance(text, Cond):
        return text
    if isinstance(text, Tensor):
        return Cond(text)
    texts = [text] if isinstance(text, str) else list(text) if isinstance(text, Sequence) else [text]
    if not texts or not all(isinstance(one, str) for one in texts):
        raise OneStepError(
            f"the negative is {type(text).__name__}: give a text, one for each prompt, or the text's tokens, the first "
            "result of encode_prompt"
        )
    # a pipeline of this package is its family's own over the same parts
    pipe = pipe.plain() if hasattr(pipe, "plain") else pipe
    return encode_text(pipe, texts, padded=steering.wants_padding, negative=True)


def _cut(cond: Cond, steering: Steering) -> Away:
    """Without the tokens that the mask hides."""
    pooled = (cond.pooled,) if steering.wants_pooled and cond.pooled is not None else ()
    if cond.mask is None:
        return Away(cond.text, pooled=pooled)
    lengths = tuple(int(count) for count in cond.mask.sum(1))
    tokens = cond.text[:, : max(lengths)]
    return Away(tokens, 0, lengths if len(set(lengths)) > 1 else None, pooled)


def _placed(away: Away, tokens: int) -> Away:
    """Its tokens where they are in a text of so many ``tokens``, padded in front."""
    if away.lengths and tokens:
        raise OneStepError(
            "VSF's negatives have several numbers of tokens, which this model counts from a text's end: give one "
            "negative for all prompts, or steer by nasa, nag or perp"
        )
    return replace(away, first=max(0, tokens - away.tokens.shape[1]))


def _with_empty(away: Away, zero: Away) -> Away:
    tokens = torch.cat([away.tokens, zero.tokens.to(away.tokens).expand(len(away), -1, -1)], 1)
    pooled = away.pooled + zero.pooled if away.pooled and zero.pooled else ()
    return Away(tokens, zero.tokens.shape[1], away.lengths, pooled)


def _check(cond: Cond, network: Any, width: int, pooled: int, what: str) -> None:
    text, count = cond.text, "1 or prompts" if what == "negative" else "1"
    if text.ndim != 3 or 0 in text.shape:
        raise OneStepError(
            f"the {what} is {tuple(text.shape)}: give a text, or its tokens [{count}, tokens, width], the first result "
            "of encode_prompt"
        )
    if text.shape[2] != width:
        raise OneStepError(
            f"the {what}'s tokens are {text.shape[2]} wide, this network reads {width}: encode it by this "
            "pipeline's own encode_prompt"
        )
    if cond.mask is None:
        refuse_padding(f"the {what}", text, network)
    elif cond.mask.shape != text.shape[:2] or not _leading(cond.mask):
        raise OneStepError(
            f"the {what}'s mask is {tuple(cond.mask.shape)} for tokens {tuple(text.shape)}: give True for the tokens "
            "that each text begins with, at least one, and False behind them"
        )
    if pooled and cond.pooled is not None and cond.pooled.shape != (len(text), pooled):
        raise OneStepError(
            f"the {what}'s pooled text is {tuple(cond.pooled.shape)}, this network reads [{len(text)}, {pooled}]: give "
            "the pooled result of this pipeline's own encode_prompt"
        )


def _leading(mask: Tensor) -> bool:
    """Whether each row is True at its beginning and nowhere else."""
    kept = mask.bool()
    return bool(kept[:, 0].all()) and not bool((kept[:, 1:] & ~kept[:, :-1]).any())
