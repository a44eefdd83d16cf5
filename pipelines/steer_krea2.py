"""Krea 2, steered: [prompt, negative, picture] in one sequence, each text refined as if alone.

Its own pipeline has padding in the midst of each prompt, under a mask; no text token has a place, so that here the
prompt's own come first, the negative's behind them, and what fills a row up is neither seen nor read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.nn.functional import pad

from ..core.guidance import Streams
from .heads import merged
from .steer_joint import Given
from .steer_one_stream import apart, beside
from .steer_run import Run


@dataclass(frozen=True)
class Alike:
    """Rows of a forward whose texts are equally long. rows: which; a slice is all. texts: tokens of each."""

    rows: Any
    texts: tuple[int, ...]

    def split(self, states: Tensor, picture: int) -> list[Tensor]:
        """[B, H, N, D] -> these rows of each text and, where it has tokens, of the picture, which lies last."""
        own = states[self.rows]
        found = list(own[:, :, : sum(self.texts)].split(self.texts, 2))
        return [*found, own[:, :, own.shape[2] - picture :]] if picture else found

    def joined(self, found: list[Tensor], length: int, picture: bool) -> Tensor:
        """[B, H, length, D] of what `split` took apart, zeros between the texts and the picture."""
        texts, last = torch.cat(found[:-1] if picture else found, 2), found[-1:] if picture else []
        missing = length - texts.shape[2] - sum(part.shape[2] for part in last)
        return torch.cat([pad(texts, (0, 0, 0, missing)), *last], 2)


@dataclass
class FusedTexts:
    """The texts of a steered forward. divided: as in `Family`."""

    run: Run
    divided: float
    alike: list[Alike] = field(default_factory=list)
    picture: int = 0
    time = "timestep"

    def counted(self, time: float) -> float:
        """The network's time as its schedule counts it."""
        return time * self.divided

    def latents_and_prompts(self, given: Given) -> tuple[Any, Any]:
        return given["hidden_states"], given["encoder_hidden_states"]

    def joined(self, given: Given) -> Given:
        text, mask = given["encoder_hidden_states"], given.get("encoder_attention_mask")
        prompts = [row.flatten(1) if mask is None else row[mask[at].bool()].flatten(1) for at, row in enumerate(text)]
        rows = beside(self.run, prompts)
        self.alike, self.picture = _grouped([tuple(map(len, row)) for row in rows]), given["hidden_states"].shape[1]
        longest = max(sum(map(len, row)) for row in rows)
        whole = torch.stack([pad(torch.cat(row), (0, 0, 0, longest - sum(map(len, row)))) for row in rows])
        return {
            "encoder_hidden_states": whole.unflatten(2, text.shape[2:]),
            "encoder_attention_mask": None,
            "position_ids": pad(given["position_ids"][text.shape[1] :], (0, 0, longest, 0)),
        }

    def clear(self) -> None:
        self.alike = []


def _grouped(lengths: list[tuple[int, ...]]) -> list[Alike]:
    rows: dict[tuple[int, ...], list[int]] = {}
    for row, own in enumerate(lengths):
        rows.setdefault(own, []).append(row)
    if len(rows) == 1:
        return [Alike(slice(None), lengths[0])]
    return [Alike(torch.tensor(numbers), own) for own, numbers in rows.items()]


class FusedSteered:
    """Steers one attention of texts and picture, or, where it has no picture, keeps the texts apart."""

    def __init__(self, inner: Any, texts: FusedTexts, picture: bool) -> None:
        self.inner, self.texts, self.picture = inner, texts, picture

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        run = self.texts.run
        if not run.acting:
            return self.inner(attn, hidden_states, attention_mask, image_rotary_emb)  # type: ignore[no-any-return]
        run.reached = run.reached or self.picture
        q, k, v = _projected(attn, hidden_states, image_rotary_emb)
        out, flags = torch.zeros_like(v), run.chosen(hidden_states)
        picture = self.texts.picture if self.picture else 0
        for alike in self.texts.alike:
            parts = [alike.split(part, picture) for part in (q, k, v)]
            found = self._steered(alike, parts, flags) if self.picture else apart(parts)
            out[alike.rows] = alike.joined(found, out.shape[2], self.picture)
        # the gate is each token's own
        gated = merged(out).to(hidden_states.dtype) * torch.sigmoid(attn.to_gate(hidden_states))
        return attn.to_out[0](gated)  # type: ignore[no-any-return]

    def _steered(self, alike: Alike, parts: list[list[Tensor]], flags: Tensor | None) -> list[Tensor]:
        """Of all texts together and of the picture. parts: of queries, keys and values."""
        q, k, v = (Streams(text, torch.cat(others, 2), image) for text, *others, image in parts)
        empty = alike.texts[2] if len(alike.texts) > 2 else 0
        chosen = None if flags is None else flags[alike.rows]
        out = self.texts.run.steering.joint(q, k, v, chosen, empty)
        return [out.positive, out.negative, out.image]


def _projected(attn: Any, states: Tensor, rotary: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, H, N, D], each head of keys and values for those that share it."""
    q, k = (attn.norm_q(_heads(attn.to_q, states, attn)), attn.norm_k(_heads(attn.to_k, states, attn)))
    v = _heads(attn.to_v, states, attn)
    if rotary is not None:
        q, k = (apply_rotary_emb(part, rotary, sequence_dim=1) for part in (q, k))
    shared = attn.num_heads // attn.num_kv_heads
    k, v = (part.repeat_interleave(shared, dim=2) for part in (k, v))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _heads(layer: Any, states: Tensor, attn: Any) -> Tensor:
    """[B, N, H, D] of what ``layer`` gives."""
    found: Tensor = layer(states)
    return found.unflatten(-1, (-1, attn.head_dim))
