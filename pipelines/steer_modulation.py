"""SD3 and Flux modulate all tokens of the text by one pooled text; here each text's tokens by its own.

A block asks its norm for a text's normed tokens and for what scales, shifts and gates them later, one vector for all
tokens. Of texts with vectors of their own the norm here keeps one for each token, answers with a vector that changes
nothing, and the layers behind it apply what was kept.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from diffusers.models.normalization import AdaLayerNormZeroSingle
from torch import Tensor, nn

from ..core.errors import OneStepError
from .threads import is_here


@dataclass
class Modulation:
    """What one network's blocks share within a forward.

    embeddings: [B, C] each, of time and pooled text, one for each text behind the positive. lengths: tokens of the
    positive text and of each behind it. Without embeddings, and in other threads, every block is as it was.
    """

    embeddings: list[Tensor] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    thread: int = field(default_factory=get_ident)

    @property
    def acting(self) -> bool:
        return bool(self.embeddings) and is_here(self.thread)

    def set(self, embeddings: list[Tensor], lengths: list[int]) -> None:
        self.embeddings, self.lengths = embeddings, lengths

    def clear(self) -> None:
        """After a forward: nothing of it stays in memory."""
        self.embeddings = []
        for kept in self.kept:
            kept.gate = kept.shift = kept.scale = kept.last_gate = None


@dataclass
class Kept:
    """Of one block's forward, [B, L, C] each: what gates attention's answer; of the MLP, what shifts and scales what it
    reads, and gates its answer."""

    gate: Tensor | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None
    last_gate: Tensor | None = None


class TextNorm:
    """A block's norm of the texts' tokens, or, in Flux' single blocks, of the texts' and the picture's.

    No module, as LastLayer is none: the network's tree, which other threads may be walking through, stays as it is.
    """

    def __init__(self, inner: nn.Module, modulation: Modulation, kept: Kept) -> None:
        self.inner, self.modulation, self.kept = inner, modulation, kept

    def __call__(self, states: Tensor, *told: Tensor, **more: Tensor) -> Any:
        """states: [B, L, C]. told or emb: [B, C], of time and the positive's pooled text."""
        others = self.modulation.embeddings
        if not self.modulation.acting:
            return self.inner(states, *told, **more)
        own = told[0] if told else more["emb"]
        lengths, embeddings = [*self.modulation.lengths], [own, *others]
        if isinstance(self.inner, AdaLayerNormZeroSingle):
            lengths, embeddings = [*lengths, states.shape[1] - sum(lengths)], [*embeddings, own]
        pairs = zip(states.split(lengths, 1), embeddings, strict=True)
        found = [self.inner(part, one) if told else self.inner(part, emb=one) for part, one in pairs]
        if isinstance(found[0], Tensor):
            return torch.cat(found, 1)
        normed, *vectors = zip(*found, strict=True)
        return torch.cat(normed, 1), *self._kept([for_each(parts, lengths) for parts in vectors], found[0][1])

    def _kept(self, vectors: list[Tensor], like: Tensor) -> list[Tensor]:
        """Keeps the vectors of each token; those that change nothing, [B, C] each."""
        one, nothing = torch.ones_like(like), torch.zeros_like(like)
        if len(vectors) == 1:
            self.kept.last_gate = vectors[0]
            return [one]
        self.kept.gate, self.kept.shift, self.kept.scale, self.kept.last_gate = vectors
        return [one, nothing, nothing, one]


class LastLayer:
    """A block's last layer of the texts' tokens: its MLP, or, in Flux' single blocks, its output projection."""

    def __init__(self, inner: nn.Module, modulation: Modulation, kept: Kept) -> None:
        self.inner, self.modulation, self.kept = inner, modulation, kept

    def __call__(self, states: Tensor) -> Any:
        kept = self.kept
        if not self.modulation.acting or kept.last_gate is None:
            return self.inner(states)
        if states.shape[1] != kept.last_gate.shape[1]:
            raise OneStepError(
                "this network computes its feed-forward layers in chunks, which steering by a negative's own pooled "
                "text cannot follow: call disable_forward_chunking() first"
            )
        if kept.scale is not None and kept.shift is not None:
            states = states * (1 + kept.scale) + kept.shift
        return kept.last_gate * self.inner(states)


def for_each(vectors: tuple[Tensor, ...], lengths: list[int]) -> Tensor:
    """[B, C] of each text -> [B, L, C], of each token."""
    return torch.cat([one[:, None].expand(-1, n, -1) for one, n in zip(vectors, lengths, strict=True)], 1)


def install(network: Any, modulation: Modulation, undo: ExitStack) -> dict[str, Kept]:
    """Puts the layers above into each block until ``undo`` closes. What each block keeps, by its attention's path."""
    found = {}
    for kind, norm, last in (
        ("transformer_blocks", "norm1_context", "ff_context"),
        ("single_transformer_blocks", "norm", "proj_out"),
    ):
        for number, block in enumerate(getattr(network, kind, ())):
            kept = found[f"{kind}.{number}.attn"] = Kept()
            _replace(block, norm, TextNorm(getattr(block, norm), modulation, kept), undo)
            if getattr(block, last) is not None:
                _replace(block, last, LastLayer(getattr(block, last), modulation, kept), undo)
    modulation.kept = list(found.values())
    return found


def _replace(block: nn.Module, name: str, layer: Any, undo: ExitStack) -> None:
    """Covers a block's layer by an attribute, which Python finds before the network's tree."""
    undo.callback(block.__dict__.pop, name)
    block.__dict__[name] = layer
