"""A text's own tokens, without those that a tokenizer fills it up by."""

from __future__ import annotations

from typing import Any

import torch

from ..core.cond import Cond
from ..core.families import FAMILIES
from .threads import lock_of


def of_own_tokens(pipe: Any, kind: str, prompts: list[str], device: torch.device) -> Cond:
    """T5's states of each text's own tokens, as ComfyUI reads it. Chroma's pipeline in diffusers shows the network one
    token of padding too, and of the others a part: it adds its mask, 1 and 0, to the scores. PixArt's reads a text in
    small letters."""
    longest = next(known.longest for known in FAMILIES.values() if kind in known.pipelines)
    read = pipe._text_preprocessing(prompts) if hasattr(pipe, "_text_preprocessing") else prompts
    counts = [length_of(pipe, pipe.tokenizer, text, longest) for text in read]
    more: dict[str, Any] = {"device": device, "do_classifier_free_guidance": False}
    texts = pipe.encode_prompt(prompts, max_sequence_length=max(counts), **more)[0]
    return Cond.concat([Cond(text[None, :count]) for text, count in zip(texts, counts, strict=True)])


def length_of(pipe: Any, tokenizer: Any, text: str, most: int | None = None) -> int:
    """How many tokens a text has, with those that begin and end it: one at least, and no more than ``most``, or than
    its encoder takes."""
    if hasattr(pipe, "maybe_convert_prompt"):  # a textual inversion may have several vectors
        text = pipe.maybe_convert_prompt(text, tokenizer)
    most = tokenizer.model_max_length if most is None else most
    with lock_of(tokenizer):
        return max(1, len(tokenizer(text, max_length=most, truncation=True).input_ids))
