"""Lumina 2, steered: [prompt, negative, picture] in one sequence, each text refined and placed as if alone.

The network reads the texts of each row as one, under a mask. Positions are those of each text right before the picture,
and every attention keeps the texts apart.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from ..core.families import FAMILIES
from ..core.one_stream import Texts
from .heads import normed
from .steer_joint import Given
from .steer_one_stream import Alike, StreamAttention, beside, grouped
from .steer_run import Run


@dataclass
class Lumina2Stream:
    """The texts of a steered forward. prompts: the mask of the prompts alone."""

    run: Run
    network: Any
    alike: list[Alike] = field(default_factory=list)
    texts: list[Texts] = field(default_factory=list)
    prompts: Tensor | None = None
    time = "timestep"

    def counted(self, time: float) -> float:
        return float(FAMILIES["lumina2"].time_of(time))

    def latents_and_prompts(self, given: Given) -> tuple[Any, Any]:
        return given["hidden_states"], given["encoder_hidden_states"]

    def joined(self, given: Given) -> Given:
        pictures, prompts = given["hidden_states"], given["encoder_hidden_states"]
        self.prompts = given["encoder_attention_mask"]
        lengths = self.prompts.sum(1).tolist()
        rows = beside(self.run, [text[:length] for text, length in zip(prompts, lengths, strict=True)])
        self.texts = [Texts(tuple(map(len, row)), 1) for row in rows]
        size = pictures.shape[2] * pictures.shape[3] // self.network.config.patch_size**2
        self.alike = grouped([size] * len(pictures), self.texts, behind=True)
        text = pad_sequence([torch.cat(row) for row in rows], batch_first=True)
        ends = torch.tensor([sum(each.own) for each in self.texts], device=text.device)
        there = torch.arange(text.shape[1], device=text.device) < ends[:, None]
        return {"encoder_hidden_states": text, "encoder_attention_mask": there}

    def clear(self) -> None:
        self.alike, self.texts, self.prompts = [], [], None

    def install(self, undo: ExitStack) -> None:
        """Positions until ``undo`` closes."""
        places = self.network.rope_embedder
        undo.callback(setattr, self.network, "rope_embedder", places)
        self.network.rope_embedder = Places(places, self)


class Places(torch.nn.Module):
    """The network's rotary embedding, which cuts the picture into tokens too."""

    inner: Any

    def __init__(self, inner: Any, stream: Lumina2Stream) -> None:
        super().__init__()
        # no child: the network's tree stays as it was
        self.__dict__["inner"], self.stream = inner, stream

    def forward(self, pictures: Tensor, mask: Tensor) -> Any:
        """(tokens, angles of the texts, of the pictures, of both; tokens of each text, of text and picture)."""
        stream = self.stream
        if not (stream.run.acting and stream.prompts is not None):
            return self.inner(pictures, mask)
        tokens, _, of_pictures, *_ = self.inner(pictures, stream.prompts)
        of_texts = [self._turned(texts, pictures.device) for texts in stream.texts]
        whole = [torch.cat([text, picture]) for text, picture in zip(of_texts, of_pictures, strict=True)]
        apart = pad_sequence(of_texts, batch_first=True)
        apart = pad(apart, (0, 0, 0, mask.shape[1] - apart.shape[1]))
        lengths = [list(map(len, parts)) for parts in (of_texts, whole)]
        return tokens, apart, of_pictures, pad_sequence(whole, batch_first=True), *lengths

    def _turned(self, texts: Texts, device: torch.device) -> Tensor:
        """[T, D / 2] complex, of the tokens of all texts of a row; rows and columns turn none of them."""
        ids = torch.zeros(1, sum(texts.own), 3, dtype=torch.long, device=device)
        time = texts.times.to(device) - 1  # the first token of a text alone is at 0 here
        ids[0, :, 0] = time.abs()
        angles = self.inner._get_freqs_cis(ids)[0]
        # times below 0 turn the other way
        return torch.where(time[:, None] < 0, angles.conj(), angles)


class Lumina2Steered:
    """Steers one attention, whose keys and values have fewer heads than its queries."""

    def __init__(self, inner: Any, stream: Lumina2Stream, picture: bool) -> None:
        self.inner, self.stream, self.attended = inner, stream, StreamAttention(stream, picture)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **more: Any,
    ) -> Tensor:
        if not self.stream.run.acting:
            told = attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            return self.inner(*told, **more)  # type: ignore[no-any-return]
        parts = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        width = attn.to_q.out_features // attn.heads
        q, k, v = (part.unflatten(-1, (-1, width)) for part in parts)
        q, k = normed(q, attn.norm_q), normed(k, attn.norm_k)
        q, k = (apply_rotary_emb(part, image_rotary_emb, use_real=False) for part in (q, k))
        k, v = (part.repeat_interleave(attn.heads // part.shape[2], 2) for part in (k, v))
        steered = self.attended(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), hidden_states)
        for layer in attn.to_out:
            steered = layer(steered)
        return steered
