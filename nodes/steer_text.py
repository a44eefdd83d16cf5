"""Which tokens of a CONDITIONING a negative has: with the padding of its text encoder, or its own alone."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..core.errors import OneStepError
from ..core.families import FAMILIES

OWN = "onestep_unpadded"
"""In a CONDITIONING's dictionary: (the text's own tokens [1, L, C], the padded ones that they belong to)."""
WHOLE = "onestep_whole"
"""In that of a text without its padding: how many tokens it has with it."""
TOKEN_IDS = tuple(known.token_ids for known in FAMILIES.values() if known.token_ids)
CLIP = {"l": "clip_l", "g": "clip_g", "h": "clip_h"}
Tokens = dict[str, list[list[Any]]]


class EncodeNegative(io.ComfyNode):  # type: ignore[misc]
    """A text as CONDITIONING that tells its own tokens from padding."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OneStepEncodeNegative",
            display_name="CLIP Text Encode (Negative)",
            category="OneStep/guidance",
            description="What CLIP Text Encode gives, with the text's own tokens told from padding: every mode of "
            "Negative Steering takes it, and VSF needs it.",
            search_aliases=["negative prompt", "clip text encode", "vsf", "unpadded"],
            inputs=[
                io.Clip.Input("clip", tooltip="The model's own text encoder."),
                io.String.Input(
                    "text", multiline=True, dynamic_prompts=True, tooltip="What to keep away from, as people or blurry."
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="For Negative Steering; elsewhere it is CLIP Text Encode's.")],
        )

    @classmethod
    def execute(cls, clip: Any, text: str) -> io.NodeOutput:
        if clip is None:
            raise OneStepError("there is no text encoder: plug in the checkpoint's CLIP, or a CLIP loader")
        return io.NodeOutput(encode_negative(clip, text))


def encode_negative(clip: Any, text: str) -> Any:
    """The CONDITIONING of ``text``, as CLIP Text Encode makes it, in which each entry holds its own tokens too.

    CLIP is causal: its padding, behind the text, changes none of the text's tokens. T5 sees both ways, and reads the
    text at the length that it has.
    """
    padded = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    if any(name in told for _, told in padded for name in TOKEN_IDS):
        return padded  # the network makes its text itself, and fills it up
    tokens = _shortest(clip, clip.tokenize(text))
    own = clip.encode_from_tokens_scheduled(tokens)
    for (whole, told), (short, _) in zip(padded, own, strict=True):
        told[OWN] = short[:, _real(clip, tokens, short.shape[1])], whole
    return padded


def own_tokens(negative: Any) -> Any:
    """CONDITIONING without padding. OneStepError where it does not say what is padding."""
    return [[_own(text, told), told | {WHOLE: text.shape[1]}] for text, told in negative]


def _own(text: Tensor, told: dict[str, Any]) -> Tensor:
    if any(name in told for name in TOKEN_IDS):
        return text
    tokens, whole = told.get(OWN, (None, None))
    if whole is text:
        return tokens
    mask = told.get("attention_mask")
    real = text.abs().amax((0, 2)) > 0 if mask is None or mask.shape != text.shape[:2] else mask.bool().any(0)
    count = int(real.nonzero().max()) + 1 if bool(real.any()) else 0
    if 0 < count < text.shape[1] or (mask is not None and count):
        return text[:, :count]
    raise OneStepError(
        "VSF flips each token of the negative, and this one does not tell its text from padding: encode it with CLIP "
        "Text Encode (Negative), and join several with Conditioning (Combine)"
    )


# -- tokens -----------------------------------------------------------------------------------------------------------


def _shortest(clip: Any, tokens: Tokens) -> Tokens:
    """Without padding where an encoder takes a text of any length; CLIP takes 77 tokens at a time."""
    return {
        name: batches if name in CLIP else [batch[: _length(clip, name, batch)] for batch in batches]
        for name, batches in tokens.items()
    }


def _length(clip: Any, name: str, batch: list[Any]) -> int:
    """How many tokens a batch has up to the one that ends it, with that one; where none does, up to its padding."""
    tokenizers = clip.tokenizer
    end = getattr(tokenizers, CLIP.get(name, name), None) or getattr(tokenizers, tokenizers.clip)
    numbers = [token if isinstance(token, int) else -1 for token, *_ in batch]
    if end.end_token is None:
        return max((index + 1 for index, token in enumerate(numbers) if token != end.pad_token), default=len(batch))
    return numbers.index(end.end_token) + 1 if end.end_token in numbers else len(batch)


def _real(clip: Any, tokens: Tokens, count: int) -> list[int]:
    """Which of ``count`` encoded tokens are the text's: CLIP's, batch behind batch, then T5's."""
    names = [name for name in CLIP if name in tokens]
    real: list[int] = []
    at = 0
    for batches in zip(*(tokens[name] for name in names), strict=False):
        longest = max(_length(clip, name, batch) for name, batch in zip(names, batches, strict=True))
        real += range(at, at + longest)
        at += min(map(len, batches))
    absent = getattr(clip.cond_stage_model, "t5xxl", True) is None
    rest = 0 if absent else sum(len(batch) for name in tokens if name not in CLIP for batch in tokens[name])
    for before, kept in ((at, real), (0, [])):
        if count == before + rest:
            return [*kept, *range(before, count)]
    if count == at:
        return real
    if not names and count <= rest:  # Qwen-Image's leaves its template's tokens out
        return list(range(count))
    raise OneStepError(
        f"this text encoder made {count} tokens of {at} and {rest}, in an order that is not known here: use NASA, NAG "
        "or PERP with its CLIP Text Encode"
    )


NODES = [EncodeNegative]
