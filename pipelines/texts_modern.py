"""Texts of language models, as the pipelines of the families that read them encode them: see `text`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.cond import Cond
from ..core.families import FAMILIES
from ..core.lengths import cut
from .kinds import KREA2


def masked(text: Tensor, mask: Tensor | None) -> Cond:
    return Cond(text, None if mask is None else mask.bool())


def of_each(pipe: Any, kind: str, prompts: list[str], device: torch.device) -> Cond:
    """Where its encode_prompt gives each text by itself, or is asked for it."""
    if kind == KREA2:
        return Cond.concat([_fused(*pipe.encode_prompt(prompt, device)) for prompt in prompts])
    texts, _ = pipe.encode_prompt(prompts, device, do_classifier_free_guidance=False)
    return Cond.concat([Cond(text[None]) for text in texts])


def _fused(text: Tensor, mask: Tensor) -> Cond:
    """A text's own tokens, whose layers lie beside one another, of [1, L, layers, C] with padding in its midst: their
    order does not matter, as none of them has a place."""
    return Cond(text[mask.bool()].flatten(1)[None])


def behind_system(pipe: Any, prompts: list[str], device: torch.device, negative: bool) -> Cond:
    """Texts as Lumina2Pipeline reads its negatives, which is as they are, a prompt with its system prompt."""
    known = FAMILIES["lumina2"]
    texts = list(prompts) if negative else [known.said(prompt, pipe.system_prompt) for prompt in prompts]
    nothing = torch.zeros(len(texts), 1, 1), torch.zeros(len(texts), 1)
    told = {"negative_prompt": texts, "prompt_embeds": nothing[0], "prompt_attention_mask": nothing[1]}
    *_, text, mask = pipe.encode_prompt(None, device=device, **told)
    return cut(masked(text * mask[..., None].to(text.dtype), mask))


def conditioned(pipe: Any, prompts: list[str], device: torch.device) -> Cond:
    """What Anima's conditioner makes of the states of one text encoder at the places of another's token ids."""
    from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep

    told = AnimaTextEncoderStep.encode_prompt(pipe, prompts, prepare_unconditional_embeds=False, device=device)
    conditioner = pipe.text_conditioner
    return Cond(
        conditioner(
            source_hidden_states=told["qwen_prompt_embeds"].to(device, conditioner.dtype),
            target_input_ids=told["t5_input_ids"].to(device),
            target_attention_mask=told["t5_attention_mask"].to(device),
            source_attention_mask=told["qwen_attention_mask"].to(device),
        )
    )
