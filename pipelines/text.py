"""The text of a call: prompts encoded as the families' own pipelines do, or embeddings given in their place."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.cond import Cond
from ..core.errors import OneStepError
from ..core.families import FAMILIES, detect
from ..core.lengths import lengths_of
from .call_values import texts_of
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
from .own_tokens import of_own_tokens
from .places import on_device
from .texts_modern import behind_system, conditioned, masked, of_each
from .threads import lock_of

Embeds = Tensor | Sequence[Tensor]
"""[P, L, C], or of texts of several lengths [L, C] of each, as ZImagePipeline has them: no mask is needed then."""


def t5_tokens(pipe: Any) -> int:
    """Tokens of T5's text. Flux-schnell, which embeds no guidance, was trained with half of Flux-dev's.

    SD3 without T5 has none: diffusers would append 256 zeros by default, ComfyUI appends nothing, and both shall draw
    the same.
    """
    transformer = getattr(pipe, "transformer", None)
    if "text_encoder_3" in pipe.components:
        return 256 if pipe.text_encoder_3 is not None else 0
    return 256 if transformer is not None and not transformer.config.guidance_embeds else 512


def encode(
    pipe: Any, kind: str, prompts: list[str], device: torch.device, length: int | None = None, negative: bool = False
) -> Cond:
    """Text and pooled text of ``prompts``, by the encode_prompt of ``pipe``, a pipeline of the ``kind`` in PIPELINES
    or a relative of it. length: tokens that T5 pads a prompt to; None is `t5_tokens`. negative: see `encode_text`."""
    _check_encoders(pipe, kind)
    # a tokenizer keeps how the latest call wanted its padding, and diffusers' calls differ in that
    with lock_of(pipe.tokenizer):
        if kind in (Z_IMAGE, KREA2):
            return of_each(pipe, kind, list(prompts), device)
        if kind == QWEN_IMAGE:
            # as long as its pipeline's call reads, half of encode_prompt's own default
            return masked(*pipe.encode_prompt(list(prompts), device, max_sequence_length=512))
        if kind == LUMINA2:
            return behind_system(pipe, prompts, device, negative)
        if kind in (KLEIN, FLUX2):
            return Cond(pipe.encode_prompt(list(prompts), device)[0])
        if kind == ANIMA:
            return conditioned(pipe, list(prompts), device)
        if kind == WAN:
            # as many tokens as its pipeline's call reads, more than twice encode_prompt's own default
            told = {"do_classifier_free_guidance": False, "max_sequence_length": FAMILIES["wan"].tokens}
            return Cond(pipe.encode_prompt(list(prompts), device=device, **told)[0])
        if kind in (CHROMA, PIXART):
            return of_own_tokens(pipe, kind, list(prompts), device)
        return _encoded(pipe, kind, prompts, device, t5_tokens(pipe) if length is None else length)


def _encoded(pipe: Any, kind: str, prompts: list[str], device: torch.device, length: int) -> Cond:
    more: dict[str, Any] = {"device": device, "num_images_per_prompt": 1}
    if kind == FLUX:
        text, pooled, _ = pipe.encode_prompt(prompts, prompts, max_sequence_length=length, **more)
        return Cond(text, pooled=pooled)
    more["do_classifier_free_guidance"] = False
    if kind == SD3:
        text, _, pooled, _ = pipe.encode_prompt(prompts, prompts, prompts, max_sequence_length=length, **more)
        return Cond(text, pooled=pooled)
    if kind == SDXL:
        text, _, pooled, _ = pipe.encode_prompt(prompts, **more)
        return Cond(text, pooled=pooled)
    return Cond(pipe.encode_prompt(prompts, **more)[0])


def embeddings(
    pipe: Any, texts: str | Sequence[str], device: torch.device, each: int, negative: bool = False
) -> tuple[Embeds, Tensor | None]:
    """Text and pooled text of ``texts``, ``each`` times in a row; needs the text encoders of ``pipe`` alone. negative:
    see `encode_text`."""
    prompts, kind = texts_of(texts), pipeline_of(pipe.components)
    with on_device(device, *encoders_of(pipe)):
        cond = encode(pipe, kind, prompts, device, negative=negative).repeat(each)
    if kind in (Z_IMAGE, QWEN_IMAGE, KREA2, CHROMA, LUMINA2, PIXART):
        return [text[:length] for text, length in zip(cond.text, lengths_of(cond), strict=True)], None
    return cond.text, cond.pooled


def encoders_of(pipe: Any) -> list[Any]:
    """The text encoders that a pipeline has."""
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_conditioner")
    found = (getattr(pipe, name, None) for name in names)
    return [module for module in found if module is not None]


FIRST, BOTH = ("text_encoder", "tokenizer"), ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
TEXT_ALONE = (SD, Z_IMAGE, KLEIN, FLUX2, QWEN_IMAGE, KREA2, WAN, CHROMA, LUMINA2, PIXART)
ENCODERS: dict[str, tuple[str, ...]] = dict.fromkeys(TEXT_ALONE, FIRST)
ENCODERS |= dict.fromkeys((SDXL, SD3, FLUX), BOTH) | {ANIMA: (*FIRST, "t5_tokenizer", "text_conditioner")}
"""Which parts a text cannot do without."""


def _check_encoders(pipe: Any, kind: str) -> None:
    for part in ENCODERS[kind]:
        if getattr(pipe, part, None) is None:
            raise OneStepError(
                f"this pipeline has no {part} to read a prompt with: load it, or give prompt_embeds, and "
                "negative_prompt_embeds where guidance or steering is on"
            )
    if kind == SD3 and pipe.text_encoder_3 is None and pipe.transformer is None:
        raise OneStepError("SD3 without T5 encodes a prompt as wide as its transformer reads: load the transformer too")


@dataclass(frozen=True)
class PromptInput:
    """What a call is given as its prompt, or as its negative prompt.

    name: "prompt" or "negative_prompt". texts: one or several, None or "" where embeddings are given.
    embeds: as the first result of the family's encode_prompt. pooled: [P, C'], where the family has it.
    """

    name: str
    texts: str | Sequence[str] | None
    embeds: Embeds | None = None
    pooled: Tensor | None = None

    @property
    def empty(self) -> bool:
        return not self.texts and self.embeds is None

    @property
    def count(self) -> int:
        """How many texts or embeddings. Raises OneStepError for none, for both, and for half of the embeddings."""
        embeds = f"{self.name}_embeds"
        if self.embeds is None and self.pooled is not None:
            raise OneStepError(f"{pooled_name(self.name)} is given without {embeds}: give both, of the same texts")
        if self.embeds is None:
            return len(self.listed)
        if self.texts:
            raise OneStepError(f"{self.name} and {embeds} are both given: give one of them")
        if isinstance(self.embeds, list | tuple):
            return len([_checked(embeds, value, ("tokens", "width")) for value in self.embeds])
        return len(_checked(embeds, self.embeds, ("prompts", "tokens", "width")))

    @property
    def listed(self) -> list[str]:
        return texts_of(self.texts, self.name)


def pooled_name(name: str) -> str:
    """The argument that holds the pooled text of "prompt" or "negative_prompt", as diffusers names it."""
    return f"{name.removesuffix('prompt')}pooled_prompt_embeds"


def conditions(host: Any, given: PromptInput, size: tuple[int, int], pooled_needed: bool = True) -> Cond:
    """One row for each text or embedding of ``given``, at ``size`` (width, height).

    pooled_needed: whether embeddings of a model that reads pooled text must have theirs.
    """
    if given.count and given.embeds is not None:
        return host.with_sizes(_from_embeds(given, host.network, pooled_needed).to("cpu", torch.float32), size)
    return host.encode(given.listed, size, negative=given.name != "prompt")


def negative_conditions(
    host: Any, given: PromptInput, prompts: int, size: tuple[int, int], guided: bool, steered: bool
) -> Cond | None:
    """One row for all of ``prompts`` prompts, or one for each, on the host's device; None where nothing acts by it.

    Nothing given is the empty text.
    """
    if not guided and not steered:
        if not given.empty:
            logging.warning('OneStep: the negative prompt does nothing at guidance 1: give steering too, "nag" for one')
        return None
    if given.embeds is None and given.texts is None:
        given = replace(given, texts="")
    found: Cond = conditions(host, given, size, pooled_needed=guided).to(host.device)
    if len(found) not in (1, prompts):
        raise OneStepError(f"there are {len(found)} negative prompts for {prompts} prompts: give one, or as many")
    return found


def at_guidance(cond: Cond, embedded: float | None) -> Cond:
    """``cond``, whose embedded guidance, where it has one, is ``embedded``."""
    if cond.guidance is None or embedded is None:
        return cond
    return cond.with_(guidance=torch.full((len(cond),), float(embedded)))


def beside(null: Cond, cond: Cond) -> Cond:
    """``null``, of one prompt or of as many, for each sample of ``cond`` in its order, at its sizes and guidance."""
    return null.repeat(len(cond) // len(null)).with_(size=cond.size, guidance=cond.guidance)


def _from_embeds(given: PromptInput, network: Any, pooled_needed: bool) -> Cond:
    """The embeddings of ``given``, checked against what ``network`` reads."""
    text_width, pooled_width = widths(network)
    if isinstance(given.embeds, list | tuple):
        if FAMILIES[detect(network)].lengths not in ("grouped", "masked"):
            raise OneStepError(f"{given.name}_embeds is a list, this model reads a tensor [prompts, tokens, width]")
        shape = ("tokens", text_width)
        return Cond.concat([Cond(_checked(f"{given.name}_embeds", value, shape)[None]) for value in given.embeds])
    text = _checked(f"{given.name}_embeds", given.embeds, ("prompts", "tokens", text_width))
    refuse_padding(f"{given.name}_embeds", text, network)
    text = filled(text, network)
    if pooled_width is None:
        if given.pooled is not None:
            raise OneStepError(f"{pooled_name(given.name)} is given, and this model reads no pooled text: leave it out")
        return Cond(text)
    if given.pooled is None:
        if pooled_needed:
            name = pooled_name(given.name)
            raise OneStepError(f"{given.name}_embeds is given without {name}, which this model reads too: give both")
        return Cond(text)
    pooled = _checked(pooled_name(given.name), given.pooled, ("prompts", pooled_width))
    if len(pooled) != len(text):
        name = pooled_name(given.name)
        raise OneStepError(f"{given.name}_embeds has {len(text)} rows, {name} {len(pooled)}: give one for each prompt")
    return Cond(text, pooled=pooled)


def filled(text: Tensor, network: Any) -> Tensor:
    """``text`` [P, L, C] with the zeros that ``network`` is shown behind it: Wan's own encode_prompt, by itself, gives
    226 tokens, and its pipeline's call 512."""
    known = FAMILIES[detect(network)]
    return pad(text, (0, 0, 0, max(0, known.tokens - text.shape[1]))) if known.zeros else text


def refuse_padding(name: str, text: Tensor, network: Any) -> None:
    """Raises OneStepError where a text of [P, L, C] ends in zeros, which no encoder gives, and a mask would hide them,
    or is as long as its pipeline pads all. Zeros alone are a text like another."""
    longest = FAMILIES[detect(network)].longest
    if longest and text.shape[1] == longest:
        raise OneStepError(
            f"{name} has {longest} tokens a text, to which its own pipeline pads them, and all would be read: "
            "give a list of each text's own tokens, [tokens, width], as this pipeline's encode_prompt does"
        )
    padded = text.flatten(1).any(1) & ~text[:, -1].any(1)
    if FAMILIES[detect(network)].lengths == "masked" and bool(padded.any()):
        raise OneStepError(
            f"{name} ends in zeros, which only fill shorter texts up and would be read as text: give a list of "
            "each text's own tokens, [tokens, width], as this pipeline's encode_prompt does"
        )


def widths(network: Any) -> tuple[int, int | None]:
    """How wide the text tokens are that ``network`` reads, and its pooled text; None where it reads none."""
    width, pooled = FAMILIES[detect(network)].widths(network.config)
    return width, pooled or None


def _checked(name: str, value: Any, shape: tuple[str | int, ...]) -> Tensor:
    """``value`` where it is a tensor of finite numbers of ``shape``, in which a word stands for any length."""
    wanted = f"[{', '.join(map(str, shape))}]"
    if isinstance(value, Tensor) and value.ndim == len(shape) + 1 and "tokens" in shape:
        raise OneStepError(
            f"{name} is {list(value.shape)}, of one axis more than {wanted}: take that away. Of Krea 2's, which have "
            "an axis of layers and, it may be, padding, give a list of each text's own tokens, [tokens, layers * "
            "width], as this pipeline's encode_prompt does"
        )
    if not isinstance(value, Tensor) or not value.is_floating_point():
        what = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise OneStepError(f"{name} is {what}: give a tensor {wanted}, as encode_prompt returns it")
    fits = value.ndim == len(shape) and 0 not in value.shape
    if not fits or any(isinstance(size, int) and size != found for size, found in zip(shape, value.shape, strict=True)):
        raise OneStepError(
            f"{name} is {list(value.shape)}, this model reads {wanted}: encode it by this model's encoders"
        )
    if not bool(value.isfinite().all()):
        raise OneStepError(f"{name} holds numbers that are not finite (NaN or infinite): encode the text again")
    return value
