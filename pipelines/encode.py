"""Texts as a pipeline's own encode_prompt gives them to its network, with the encoders' padding or without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from ..core.cond import Cond
from .kinds import (
    ANIMA,
    CHROMA,
    FLUX,
    FLUX2,
    KLEIN,
    KREA2,
    LUMINA2,
    PIXART,
    QWEN_IMAGE,
    SD,
    SD3,
    SDXL,
    WAN,
    Z_IMAGE,
    pipeline_of,
)
from .own_tokens import length_of
from .text import encode, t5_tokens


@torch.no_grad()
def encode_text(
    pipe: Any,
    texts: Sequence[str],
    *,
    padded: bool = True,
    device: torch.device | str | None = None,
    negative: bool = False,
) -> Cond:
    """The text and, where the network reads it, the pooled text of each of ``texts``, by the encoders of ``pipe``.

    padded: with the tokens that the encoders pad a text by, as diffusers draws a prompt; False gives the text's own
    tokens, from the first to the last that is none of padding. Texts of several lengths are then padded by zeros under
    the Cond's mask. device: the encoders'; None is the pipeline's. negative: of negative prompts, which Lumina2Pipeline
    reads without its system prompt.
    """
    kind, place = pipeline_of(pipe.components), torch.device(device or pipe._execution_device)
    if padded:
        return encode(pipe, kind, list(texts), place, negative=negative)
    return Cond.concat([_unpadded(pipe, kind, text, place, negative) for text in texts])


def _unpadded(pipe: Any, kind: str, text: str, device: torch.device, negative: bool) -> Cond:
    """CLIP is causal: its padding, behind the text, changes none of the text's tokens. T5 sees both ways, and reads the
    text at the length that it has."""
    if kind in (Z_IMAGE, QWEN_IMAGE, KREA2, CHROMA, LUMINA2, PIXART):
        return encode(pipe, kind, [text], device, negative=negative)
    if kind in (ANIMA, WAN):  # zeros fill it up
        cond, tokenizer = encode(pipe, kind, [text], device), pipe.t5_tokenizer if kind == ANIMA else pipe.tokenizer
        read = prompt_clean(text) if kind == WAN else text
        return Cond(cond.text[:, : length_of(pipe, tokenizer, read, cond.text.shape[1])])
    if kind in (KLEIN, FLUX2):
        return _of_its_own(pipe, kind, text, device)
    if kind in (SD, SDXL):
        cond = encode(pipe, kind, [text], device)
        return Cond(cond.text[:, : length_of(pipe, pipe.tokenizer, text)], pooled=cond.pooled)
    most, tokenizer = t5_tokens(pipe), pipe.tokenizer_2 if kind == FLUX else pipe.tokenizer_3
    cond = encode(pipe, kind, [text], device, length_of(pipe, tokenizer, text, most) if most else 0)
    if kind != SD3:
        return cond
    clip, t5 = cond.text[:, : length_of(pipe, pipe.tokenizer, text)], cond.text[:, pipe.tokenizer_max_length :]
    return Cond(torch.cat([clip, t5], 1), pooled=cond.pooled)


def _of_its_own(pipe: Any, kind: str, text: str, device: torch.device) -> Cond:
    """The tokens that the mask shows to a causal encoder, behind or before which padding may lie."""
    masks: list[torch.Tensor] = []

    def see(module: Any, args: Any, told: dict[str, Any]) -> None:
        masks.append(told["attention_mask"])

    handle = pipe.text_encoder.register_forward_pre_hook(see, with_kwargs=True)
    try:
        cond = encode(pipe, kind, [text], device)
    finally:
        handle.remove()
    return Cond(cond.text[:, masks[0][0].bool().to(cond.text.device)])


def pads_in_front(pipe: Any) -> bool:
    """Whether a pipeline's tokenizer, or its processor's, puts padding before a text."""
    tokenizer = getattr(pipe, "tokenizer", None)
    return getattr(getattr(tokenizer, "tokenizer", tokenizer), "padding_side", "right") == "left"
